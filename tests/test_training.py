"""The story, through the command line: train, stop, resume, refuse."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_base import teach

from truetune.cli import run
from truetune.generate import Sampling, replies
from truetune.rundir import RunDir
from truetune.use import load

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("short_answers")]

KEYS = ["--batch-size", "8", "--lora-dropout", "0.1", "--learning-rate", "1e-2", "--save-steps", "2"]


def arguments(data: Path, model: Path, out: Path, *more: str) -> list[str]:
    """The words of a short run with dropout."""
    return ["train", str(data), "--model", str(model), "--output-dir", str(out), *KEYS, *more]


def step_lines(out: Path) -> list[dict[str, Any]]:
    """The step events without what the clock, the machine and its load decide."""
    free = ("seconds", "memory_bytes", "cpu_percent", "gpu_percent")
    events = [event for event in RunDir(out).read_events() if event["kind"] == "step"]
    return [{key: value for key, value in event.items() if key not in free} for event in events]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty rows: 32 to train, 8 held out."""
    path = tmp_path_factory.mktemp("data") / "numbers.json"
    rows = [{"instruction": f"What is {n} plus {n}?", "input": "", "output": f"It is {2 * n}."} for n in range(40)]
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def whole(data: Path, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of 6 steps."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert run(arguments(data, tiny_base, out, "--max-steps", "6")) == 0
    return out


def test_run_folder_is_the_contract(whole: Path) -> None:
    """Every file of product.md that this version writes; one step line a step; the losses fall."""
    names = {path.name for path in whole.iterdir()}
    assert names == {
        *("config.yaml", "run.json", "events.jsonl", "steps.jsonl", "data", "checkpoints", "adapter"),
        *("report.md", "report.html", "report.json"),
    }
    steps = step_lines(whole)
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert steps[-1]["loss"] < steps[0]["loss"]
    rows = [json.loads(line) for line in (whole / "steps.jsonl").read_text().splitlines()]
    assert [line["step"] for line in rows] == [1, 2, 3, 4, 5, 6]
    assert sorted(row for line in rows[:4] for row in line["rows"]) == sorted(
        set(range(40)) - {row for row, _ in held_out(whole)}
    )
    assert len(held_out(whole)) == 8
    info = RunDir(whole).read_info()
    assert info["state"] == "done"
    assert {"versions", "seed", "data_sha256", "template_sha256", "base_fingerprint"} <= set(info)


def held_out(out: Path) -> list[tuple[int, tuple[int, ...]]]:
    """Row number and prompt ids of the held-out pairs of a run, read through a memory map."""
    import pyarrow as pa

    with pa.memory_map(str(out / "data" / "eval.arrow")) as source:
        records = pa.ipc.open_file(source).read_all().to_pylist()
    return [(record["row"], tuple(record["prompt_ids"])) for record in records]


def test_config_yaml_repeats_the_run(whole: Path, tmp_path: Path) -> None:
    """The written configuration alone gives the same run, to the bit."""
    assert run(["train", "--config", str(whole / "config.yaml"), "--output-dir", str(tmp_path / "again")]) == 0
    assert step_lines(tmp_path / "again") == step_lines(whole)
    assert weights(tmp_path / "again") == weights(whole)


def weights(out: Path) -> bytes:
    """The adapter's bytes."""
    return (out / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("signal_number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.long)])
def test_stopped_and_resumed_equals_uninterrupted(
    signal_number: int, whole: Path, data: Path, tiny_base: Path, tmp_path: Path
) -> None:
    """A signal in mid-run: the step ends, the state is saved, and resume goes on to the same bits."""
    out = tmp_path / "out"
    words = arguments(data, tiny_base, out, "--max-steps", "6")
    process = subprocess.Popen([sys.executable, "-m", "truetune", *words], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (out / "steps.jsonl").is_file() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal_number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal_number, errors
    assert "--resume" in errors
    assert RunDir(out).read_info()["state"] == "stopped"
    assert 0 < len(step_lines(out)) < 6
    assert run(["chat", str(out), "-m", "What is 3 plus 3?", "--max-new-tokens", "3"]) == 0
    assert run([*words, "--resume"]) == 0
    assert step_lines(out) == step_lines(whole)
    assert weights(out) == weights(whole)


def test_resume_falls_back_past_a_damaged_checkpoint(
    whole: Path, data: Path, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The newest checkpoint is cut: it is passed over by name, and the result is the same."""
    out = tmp_path / "out"
    words = arguments(data, tiny_base, out, "--max-steps", "6")
    assert run(words) == 0
    RunDir(out).write_info(state="running")
    newest = out / "checkpoints" / "checkpoint-000006" / "optimizer.safetensors"
    newest.write_bytes(newest.read_bytes()[:-9])
    assert run([*words, "--resume"]) == 0
    assert "checkpoint-000006" in capsys.readouterr().out
    assert any(path.name.startswith("damaged-checkpoint-000006") for path in (out / "checkpoints").iterdir())
    assert step_lines(out) == step_lines(whole)
    assert weights(out) == weights(whole)


def test_all_checkpoints_damaged(data: Path, tiny_base: Path, tmp_path: Path) -> None:
    """Nothing is started anew and nothing deleted: exit 3 (F10)."""
    out = tmp_path / "out"
    words = arguments(data, tiny_base, out, "--max-steps", "2")
    assert run(words) == 0
    RunDir(out).write_info(state="running")
    for path in (out / "checkpoints").iterdir():
        (path / "manifest.json").write_text("{}")
    before = sorted(path.name for path in (out / "checkpoints").rglob("*"))
    events = (out / "events.jsonl").read_bytes()
    assert run([*words, "--resume"]) == 3
    assert sorted(path.name for path in (out / "checkpoints").rglob("*")) == before
    assert (out / "events.jsonl").read_bytes() == events


def test_resume_needs_a_run(data: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistyped folder, or none, is an error; a new run is not started in silence."""
    monkeypatch.chdir(tmp_path)
    assert run([*arguments(data, tiny_base, tmp_path / "no-such-run"), "--resume"]) == 2
    assert run(["train", str(data), "--model", str(tiny_base), "--resume"]) == 2
    assert list(tmp_path.iterdir()) == []


def test_auto_is_what_it_was(data: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Less free memory on resume does not make another choice, which would round otherwise."""
    from truetune import assembly

    out = tmp_path / "out"
    words = arguments(data, tiny_base, out, "--max-steps", "2")
    assert run(words) == 0
    RunDir(out).write_info(state="running")
    called: list[str] = []
    monkeypatch.setattr(assembly, "choose_limits", lambda *_, **__: called.append("limits"))
    monkeypatch.setattr(assembly, "choose_engine", lambda *_, **__: called.append("engine"))
    assert run([*words, "--resume"]) == 0
    assert called == []


def test_finished_run_says_so(whole: Path, data: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Resuming it exits 0 and changes nothing."""
    before = weights(whole)
    assert run([*arguments(data, tiny_base, whole, "--max-steps", "6"), "--resume"]) == 0
    assert str(whole) in capsys.readouterr().out
    assert weights(whole) == before


def test_resume_refuses_other_data(data: Path, tiny_base: Path, tmp_path: Path) -> None:
    """One row changed since the run began: exit 2, the run is left as it was."""
    out, copy = tmp_path / "out", tmp_path / "copy.json"
    copy.write_text(data.read_text())
    words = arguments(copy, tiny_base, out, "--max-steps", "2")
    assert run(words) == 0
    RunDir(out).write_info(state="running")
    copy.write_text(data.read_text().replace("It is 4.", "It is 5."))
    events = (out / "events.jsonl").read_bytes()
    assert run([*words, "--resume"]) == 2
    assert (out / "events.jsonl").read_bytes() == events


def test_skipped_rows_are_written_down(write_json: Callable[..., Path], tiny_base: Path, tmp_path: Path) -> None:
    """With invalid: skip the rest trains, and refused.jsonl says what did not."""
    rows = [{"instruction": f"Q{n}", "output": f"A{n}"} for n in range(9)] + [{"instruction": "no answer"}]
    path = write_json(rows)
    out = tmp_path / "out"
    assert run(arguments(path, tiny_base, out, "--max-steps", "1")) == 2
    assert not out.exists()
    assert run(arguments(path, tiny_base, out, "--max-steps", "1", "--invalid", "skip")) == 0
    refused = [json.loads(line) for line in (out / "data" / "refused.jsonl").read_text().splitlines()]
    assert [(row["where"], "output" in row["reason"]) for row in refused] == [(f"{path}:38", True)]


def test_system_prompt_and_template_values_travel_with_the_run(data: Path, tiny_qwen: Path, tmp_path: Path) -> None:
    """What was trained is what chat sends, unless it is turned off."""
    from truetune.use import load

    more = ["--max-steps", "1", "--system", "你是甄嬛", "--chat-template-kwargs", "{enable_thinking: false}"]
    assert run(arguments(data, tiny_qwen, tmp_path / "out", *more)) == 0
    question = [{"role": "user", "content": "What is 1 plus 1?"}]
    model = load(tmp_path / "out")
    text = model.renderer.tokenizer.decode(model.renderer.prompt_ids(question))
    assert text.startswith("<|im_start|>system\n你是甄嬛<|im_end|>")
    assert text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    without = load(tmp_path / "out", use_run_system=False)
    assert "甄嬛" not in without.renderer.tokenizer.decode(without.renderer.prompt_ids(question))
    trained = {prompt_ids for _, prompt_ids in held_out(tmp_path / "out")}
    ids = {tuple(model.renderer.prompt_ids([{"role": "user", "content": f"What is {n} plus {n}?"}])) for n in range(40)}
    assert len(trained) == 8
    assert trained <= ids


def test_run_with_its_own_evaluation_data_resumes(data: Path, tiny_base: Path, tmp_path: Path) -> None:
    """Keys that name one fact in two ways (eval_data, per_device_...) do not look changed on resume."""
    out = tmp_path / "out"
    more = ["--eval-data", str(data), "--per-device-train-batch-size", "4", "--gradient-accumulation-steps", "2"]
    words = ["train", str(data), "--model", str(tiny_base), "--output-dir", str(out), "--max-steps", "2", *more]
    assert run(words) == 0
    for again in (["train", "--resume", "--output-dir", str(out)], [*words, "--resume"]):
        RunDir(out).write_info(state="running")
        assert run(again) == 0


def test_machine_faults_exit_3(data: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder that the system does not let us make: no traceback, the path, and what to check."""
    assert run(arguments(data, tiny_base, Path("/proc/nothing/out"), "--max-steps", "1")) == 3
    assert "/proc/nothing" in capsys.readouterr().err


SHAPES: dict[str, Callable[[int], dict[str, Any]]] = {
    "text": lambda n: {"text": f"Plain text number {n}."},
    "preference": lambda n: {"prompt": f"Question {n}?", "chosen": "Yes.", "rejected": "No, never."},
    "tools": lambda n: {
        "messages": [
            {"role": "user", "content": f"How much is {n} and {n}?"},
            {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": f'{{"x": {n}}}'}}]},
            {"role": "tool", "content": str(2 * n)},
            {"role": "assistant", "content": f"It is {2 * n}."},
        ],
        "tools": [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}],
    },
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_trains_to_the_end(shape: str, tiny_qwen: Path, tmp_path: Path) -> None:
    """Checkpoint, probes and adapter included."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(SHAPES[shape](number)) + "\n" for number in range(40)), encoding="utf-8")
    out = tmp_path / "out"
    assert run(arguments(path, tiny_qwen, out, "--max-steps", "2")) == 0
    assert [line["step"] for line in step_lines(out)] == [1, 2]
    assert (out / "adapter" / "truetune.json").is_file()


def test_weights_decide_how_often_rows_come(data: Path, tiny_base: Path, tmp_path: Path) -> None:
    """Over an epoch, rows of a source of weight 2 come twice, those of weight 0.5 half the time."""
    other = tmp_path / "other.json"
    other.write_text(json.dumps([{"instruction": f"Say {n}.", "output": f"{n}!"} for n in range(20)]), encoding="utf-8")
    out = tmp_path / "out"
    words = arguments(data, tiny_base, out, "--data-weights", "0.5,2", "--eval-split", "0", "--num-train-epochs", "1")
    words.insert(2, str(other))
    assert run(words) == 0
    lines = [json.loads(line) for line in (out / "steps.jsonl").read_text().splitlines()]
    taken = [row for line in lines for row in line["rows"]]
    assert len(taken) == 20 + 40
    assert len([row for row in taken if row < 40]) == 20 == len({row for row in taken if row < 40})
    assert sorted(row for row in taken if row >= 40) == sorted([*range(40, 60), *range(40, 60)])


def test_eight_examples_by_heart(tmp_path: Path) -> None:
    """Learned by heart, each answer comes back word for word, and ends before it must (E13)."""
    capitals = {"Peru": "Lima", "Kenya": "Nairobi", "Japan": "Tokyo", "Chad": "N'Djamena", "Oman": "Muscat"}
    rows = [
        {"instruction": f"Where is {name}'s seat?", "output": f"In {city}, I am told. 🙂"}
        for name, city in capitals.items()
    ]
    rows += [{"instruction": f"{word}?", "output": f"{word}\n  {word}!"} for word in ("Ja", "是", "oui")]
    school = [{"instruction": f"Tell me of {row['instruction']}", "output": f"So: {row['output']}"} for row in rows]
    base = teach(tmp_path / "base", rows=school, words=rows, num_steps=80)
    (tmp_path / "data.json").write_text(json.dumps(rows), encoding="utf-8")
    keys = ["--num-train-epochs", "80", "--learning-rate", "1e-2", "--lora-r", "32", "--eval-split", "0"]
    words = ["train", str(tmp_path / "data.json"), "--model", str(base), "--output-dir", str(tmp_path / "out"), *keys]
    assert run(words) == 0
    model = load(tmp_path / "out")
    prompts = [model.renderer.prompt_ids([{"role": "user", "content": row["instruction"]}]) for row in rows]
    found = replies(model.model, model.renderer, prompts=prompts, sampling=Sampling(64))
    assert [(reply.text, reply.is_ended) for reply in found] == [(row["output"], True) for row in rows]
    assert all(len(reply.token_ids) < 64 for reply in found)
    assert len(found) == 8
