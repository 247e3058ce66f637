"""Twenty steps on real SmolLM2 weights: two and four processes equal one, and planted faults are seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from several import Told, apart, work
from worker import PLANTS, train

from truetune.config import resolve
from truetune.data.prepare import prepare
from truetune.data.template import build_renderer
from truetune.ranks import ALONE

pytestmark = pytest.mark.real

STEPS, ROWS_PER_STEP, FAULT_STEPS, TOLERANCE = 20, 4, 1, 1e-5
OF_SUMS = [plant for plant in PLANTS if "dropout" not in plant]
BOTH = [{"strategy": strategy, "steps": FAULT_STEPS} for strategy in ("shard", "replicate")]
FROZEN_BYTES = 30 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536 + 2 * 576) * 4
"""Of the layers, in fp32."""


@pytest.fixture(scope="module")
def job(smol: Path, smol_tokenizer: Any) -> dict[str, Any]:
    """The shorter rows of the bundled data, rendered by the real template."""
    path = Path(__file__).resolve().parents[2] / "examples" / "lighthouse.json"
    prepared = prepare(resolve({"data": [str(path)], "eval_split": 0}).config, build_renderer(smol_tokenizer, [2]))
    rows = sorted(prepared.train, key=lambda row: len(row.pairs[0]))[: STEPS * ROWS_PER_STEP]
    ids = [[(pair.prompt_ids, pair.answer_ids) for pair in row.pairs] for row in rows]
    return {"model": str(smol), "rows": ids, "steps": STEPS, "rows_per_step": ROWS_PER_STEP, "max_tokens": 256}


@pytest.fixture(scope="module")
def alone(job: dict[str, Any]) -> Told:
    """Events and adapter of one process."""
    return train(ALONE, job)[:2]


@pytest.fixture(scope="module")
def two(job: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Told, dict[str, Any]]]:
    """Two processes: the whole run, then each fault for a step, then a step of both strategies."""
    faults = [{**job, "steps": FAULT_STEPS, "plant": plant} for plant in OF_SUMS]
    return work(tmp_path_factory.mktemp("two"), [job, *faults, *(job | case for case in BOTH)], num_ranks=2)


def check(found: Told, alone: Told) -> None:
    """Within the tolerance everywhere, over a run in which the loss falls."""
    figures = apart(found, alone)
    print(figures)
    assert all(value <= TOLERANCE for value in figures.values()), figures
    losses = [event["loss"] for event in found[0] if event["kind"] == "step"]
    assert len(losses) == STEPS
    assert sum(losses[-7:]) < sum(losses[:7]) - 7 * 0.2


def test_two_processes_equal_one(alone: Told, two: Any) -> None:
    check(two[0][0], alone)


@pytest.mark.long
def test_four_processes_equal_one(job: dict[str, Any], alone: Told, tmp_path: Path) -> None:
    """Some ranks get nothing in some steps: four rows a step, and neighbours that share."""
    ((found, _),) = work(tmp_path, [job], num_ranks=4)
    check(found, alone)


def test_planted_faults_are_seen(alone: Told, two: Any) -> None:
    """Each one moves the loss or the grad norm far past the tolerance at once."""
    wanted = ([event for event in alone[0] if event.get("step", 99) <= FAULT_STEPS], alone[1])
    seen = {}
    for plant, (found, _) in zip(OF_SUMS, two[1 : len(OF_SUMS) + 1], strict=True):
        steps = [[e for e in events if e["kind"] == "step"] for events in (found[0], wanted[0])]
        seen[plant] = max(
            abs(a[name] / b[name] - 1) for a, b in zip(*steps, strict=True) for name in ("loss", "grad_norm")
        )
    print(seen)
    assert len(seen) == 4
    assert min(seen.values()) > 1000 * TOLERANCE, seen


def test_a_spread_base_takes_less_memory(alone: Told, two: Any) -> None:
    """The same step with its layers spread over two ranks: most of half of them less at the peak."""
    spread, whole = two[-2:]
    figures = apart(spread[0], whole[0])
    print(figures, spread[1]["most_peak"], whole[1]["most_peak"])
    assert all(value <= TOLERANCE for value in figures.values()), figures
    assert spread[1]["most_held"] * 4 == whole[1]["most_held"] * 4 - FROZEN_BYTES // 2
    assert spread[1]["most_peak"] < whole[1]["most_peak"] - 0.6 * FROZEN_BYTES / 2
    assert spread[0][0][0]["eval_loss"] == pytest.approx(alone[0][0]["eval_loss"], rel=TOLERANCE)
