"""`truetune verify`: damage anywhere in a run is named; steps taken again are the same, and a lie is found out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from truetune import disk
from truetune.cli import run
from truetune.messages import text
from truetune.rundir import RunDir

pytestmark = pytest.mark.slow

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def finished(tiny_qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 8 steps with dropout, saved at 3, 6 and 8, evaluated at 4 and 8."""
    import torch

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("verify")
    rows = [{"instruction": f"What is {n} plus {n}?", "output": f"It is {2 * n}."} for n in range(40)]
    (folder / "rows.json").write_text(json.dumps(rows))
    words = ["train", str(folder / "rows.json"), "--model", str(tiny_qwen), "--output-dir", str(folder / "out")]
    more = ["--max-steps", "8", "--save-steps", "3", "--eval-steps", "4", "--lora-dropout", "0.1", "--batch-size", "4"]
    assert run([*words, *more]) == 0
    return folder / "out"


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "out"))


def test_all_is_good(finished: Path, capsys: Capture) -> None:
    assert run(["verify", str(finished)]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = ["config.yaml", "data", *(f"checkpoints/checkpoint-{n:06d}" for n in (4, 6, 8)), "adapter"]
    assert lines[: len(names)] == [text("verify.good", name=name) for name in names] or "checkpoint-000003" in str(
        lines
    )
    assert lines[-2:] == [text("verify.good", name=name) for name in ("events.jsonl", "steps.jsonl")]


PARTS = {
    "data/train.arrow": "data",
    "data/refused.jsonl": "data",
    "data/duplicates.jsonl": "data",
    "adapter/adapter_model.safetensors": "adapter",
    "adapter/tokenizer.json": "adapter",
    "checkpoints/checkpoint-000008/trainer_state.json": "checkpoints/checkpoint-000008",
}


@pytest.mark.parametrize("name", PARTS)
def test_damage_is_named(name: str, copy: Path, capsys: Capture) -> None:
    path = copy / name
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]) if content else b"x")
    assert run(["verify", str(copy)]) == 3
    said = capsys.readouterr()
    assert text("verify.bad", name=PARTS[name], problem=path.name) in said.out
    assert text("error.verify_damaged", count=1) in said.err


@pytest.mark.parametrize("file", ["events.jsonl", "steps.jsonl"])
@pytest.mark.parametrize("how", ["lost", "twice"])
def test_a_step_that_is_lost_or_told_twice(how: str, file: str, copy: Path, capsys: Capture) -> None:
    lines = (copy / file).read_text().splitlines(keepends=True)
    at = next(n for n, line in enumerate(lines) if json.loads(line).get("step") == 5)
    lines[at : at + 1] = [] if how == "lost" else [lines[at]] * 2
    (copy / file).write_text("".join(lines))
    assert run(["verify", str(copy)]) == 3
    assert file in capsys.readouterr().out


def test_a_configuration_that_is_none(copy: Path) -> None:
    (copy / "config.yaml").write_text("lora_r: many\n")
    assert run(["verify", str(copy)]) == 3


def test_no_run(tmp_path: Path, capsys: Capture) -> None:
    assert run(["verify", str(tmp_path)]) == 2
    assert text("error.verify_no_run") in capsys.readouterr().err


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 8])
def test_steps_taken_again_are_the_same(steps: int, finished: Path, capsys: Capture) -> None:
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    assert run(["verify", str(finished), "--resume-exact", str(steps)]) == 0
    said = capsys.readouterr().out
    assert f"{steps} steps after step" in said
    assert "the same to the bit" in said
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("name", ["loss", "grad_norm", "learning_rate", "eval_loss"])
def test_a_number_that_is_not_what_it_was(name: str, copy: Path, capsys: Capture) -> None:
    run_dir = RunDir(copy)
    told = list(run_dir.read_events())
    event = [event for event in told if name in event][-1]
    event[name] *= 1 + 1e-12
    run_dir.events.write_text("".join(disk.to_json(event) + "\n" for event in told))
    assert run(["verify", str(copy), "--resume-exact", "2"]) == 4
    said = capsys.readouterr().err
    assert f"{name} {event[name]} → " in said


def test_a_weight_that_is_not_what_it_was(copy: Path, capsys: Capture) -> None:
    """Also where its manifest was made to agree."""
    from safetensors.torch import load_file, save_file

    last = copy / "checkpoints" / "checkpoint-000008"
    weights: dict[str, Any] = load_file(last / "adapter_model.safetensors")
    name = sorted(weights)[0]
    weights[name][0, 0] += 1e-6
    save_file(weights, last / "adapter_model.safetensors", metadata={"format": "pt"})
    facts = {key: value for key, value in disk.read_manifest(last).items() if key not in ("format", "files", "sha256")}
    (last / "manifest.json").unlink()
    disk.seal(last, **facts)
    assert run(["verify", str(copy)]) == 0
    assert run(["verify", str(copy), "--resume-exact", "2"]) == 4
    assert f"adapter_model.safetensors: {name}" in capsys.readouterr().err


@pytest.mark.parametrize("steps", ["9", "0", "x"])
def test_steps_that_it_has_not(steps: str, finished: Path) -> None:
    assert run(["verify", str(finished), "--resume-exact", steps]) == 2
