"""The forecast of a run's time and memory, against the run itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from truetune import measure
from truetune.assembly import assemble
from truetune.cli import run
from truetune.config import resolve
from truetune.console import Console
from truetune.engine.objective import IMITATION
from truetune.engine.step import make_forwards
from truetune.measure import forecast
from truetune.preflight import preflight
from truetune.records import pairs_of

Write = Callable[..., Path]


def build(path: Path, model: Path, **keys: Any) -> Any:
    """Assembly and training rows of a run of 40 rows in batches of 4."""
    settings = resolve({"data": [str(path)], "model": str(model), "batch_size": 4, "dtype": "float32", **keys})
    flight = preflight(settings.config, Console(quiet=True))
    assembly = assemble(settings, flight, folder=path.parent / "out", console=Console(quiet=True))
    return assembly, flight.prepared.train


def test_tokens_of_the_run_are_counted(
    write_json: Write, rows: list[dict[str, str]], tiny_qwen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a fixed time a token, the forecast is the tokens that the run then computes: steps and evaluations."""
    assembly, train = build(write_json(rows), tiny_qwen, max_steps=12)
    need = forecast(assembly, train)
    step_tokens = measure._mean_tokens(
        assembly.loop.engine, train, plan=assembly.loop.plan, objective=assembly.loop.objective
    )
    per_token = need.seconds_per_step / step_tokens
    again, _ = build(write_json(rows), tiny_qwen, max_steps=12)
    events = list(again.loop.run(train, evaluate=again.evaluate))
    step_tokens = sum(event["computed_tokens"] for event in events if event["kind"] == "step")
    num_evaluations = sum(event["kind"] == "eval" for event in events)
    eval_tokens = sum(f.num_tokens for f in make_forwards(again.loop.engine, pairs_of(again.held_out)))
    expected = per_token * (step_tokens + num_evaluations * eval_tokens / measure.STEP_COST)
    assert num_evaluations > 1
    assert eval_tokens > 0
    assert need.seconds == pytest.approx(expected, rel=1e-6)
    assert need.num_steps == 12
    assert need.peak_bytes > 10**8


def test_long_runs_are_sampled(write_json: Write, rows: list[dict[str, str]], tiny_qwen: Path) -> None:
    """Fifty steps of three hundred say what all say, within some percent."""
    assembly, train = build(write_json(rows), tiny_qwen)
    engine, plan = assembly.loop.engine, replace(assembly.loop.plan, seed=1)
    sampled, whole = (
        measure._mean_tokens(engine, train, plan=replace(plan, num_steps=n), objective=IMITATION) for n in (300, 40)
    )
    assert sampled == pytest.approx(whole, rel=0.1)


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_check_measure_prints_and_writes_it(
    lang: str, write_json: Write, rows: list[dict[str, str]], tiny_qwen: Path, tmp_path: Path, capsys: Any
) -> None:
    """Time and memory on the screen and in the JSON; no run folder is left."""
    words = ["check", str(write_json(rows)), "--model", str(tiny_qwen), "--measure", "--json", str(tmp_path / "r.json")]
    before = {path.name for path in tmp_path.iterdir()}
    assert run([*words, "--max-steps", "2", "--lang", lang]) == 0
    out = capsys.readouterr().out
    assert {"en": "The whole run", "zh": "整个训练"}[lang] in out
    measured = json.loads((tmp_path / "r.json").read_text())["measured"]
    assert measured["num_steps"] == 2
    assert 0 < measured["seconds_per_step"] <= measured["seconds"]
    assert {path.name for path in tmp_path.iterdir()} - before == {"r.json"}


def test_check_measure_of_refused_rows_loads_nothing(write_json: Write, tmp_path: Path) -> None:
    path = write_json([{"instruction": "a", "input": "", "output": ""}])
    assert run(["check", str(path), "--model", str(tmp_path / "none"), "--measure"]) == 2
