"""Training from a stream: resumed from anywhere it is the same run, to the bit; memory does not grow with the file."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.small import small_model
from truetune.cli import run
from truetune.config import examples_folder
from truetune.rundir import RunDir

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("short_answers")]

NUM_STEPS = 12
KEYS = (
    "--streaming",
    "true",
    "--shuffle-rows",
    "11",
    "--batch-size",
    "4",
    "--save-steps",
    "2",
    "--save-total-limit",
    "9",
)
MORE = ("--lora-dropout", "0.1", "--learning-rate", "1e-2", "--dtype", "float32", "--eval-split", "0.2")


def write_rows(path: Path, numbers: range, *, bad: tuple[int, ...] = ()) -> None:
    """Rows as JSON lines; `bad` ones without an answer."""
    rows = ({"instruction": f"What is {n}?", "output": "" if n in bad else f"It is {n}."} for n in numbers)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small base and a folder of two files; an epoch is 8 steps."""
    folder = tmp_path_factory.mktemp("stream")
    small_model(folder / "base")
    (folder / "rows").mkdir()
    write_rows(folder / "rows" / "a.jsonl", range(25))
    write_rows(folder / "rows" / "b.jsonl", range(25, 40))
    return folder


def words(place: Path, out: Path, *more: str, data: Path | None = None) -> list[str]:
    """The command."""
    base = ["train", str(data or place / "rows"), "--model", str(place / "base"), "--output-dir", str(out)]
    return [*base, *KEYS, *MORE, "--max-steps", str(NUM_STEPS), *more]


def told(out: Path) -> list[Any]:
    """What a run says of its steps and evaluations, without the clock; the rows of each step."""
    free = ("seconds", "memory_bytes", "cpu_percent", "gpu_percent")
    events = [event for event in RunDir(out).read_events() if event["kind"] in ("step", "eval")]
    return [
        [{key: value for key, value in event.items() if key not in free} for event in events],
        list(RunDir(out).read_step_rows()),
        (out / "adapter" / "adapter_model.safetensors").read_bytes(),
    ]


@pytest.fixture(scope="module")
def whole(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody interrupts."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert run(words(place, out)) == 0
    return out


def test_rows_of_a_step_are_told_by_their_places(whole: Path, place: Path) -> None:
    """From a spike of the curve to the line in the file, in every epoch."""
    lines = list(RunDir(whole).read_step_rows())
    assert [line["step"] for line in lines] == list(range(1, NUM_STEPS + 1))
    found = [place for line in lines for place in line["where"]]
    assert len(found) == 4 * NUM_STEPS
    for at in found:
        name, _, number = at.rpartition(":")
        assert json.loads(Path(name).read_text().splitlines()[int(number) - 1])["output"]
    # Eight are held out, and are learned in no epoch.
    assert len(set(found[:32])) == 32
    assert len(set(found)) == 32
    steps = [event for event in RunDir(whole).read_events() if event["kind"] == "step"]
    assert 1.3 < steps[-1]["epoch"] < 1.7
    assert steps[-1]["loss"] < steps[0]["loss"]


def test_stopped_anywhere_and_resumed_twice_it_is_the_same_run(whole: Path, place: Path, tmp_path: Path) -> None:
    """Cut back to one checkpoint, then to a later one: rows, losses and weights to the bit."""
    out = tmp_path / "out"
    assert run(words(place, out)) == 0
    assert told(out) == told(whole)
    for keep in (2, 6, 8):
        for path in (out / "checkpoints").iterdir():
            if int(path.name.rpartition("-")[2]) > keep:
                shutil.rmtree(path)
        RunDir(out).write_info(state="stopped")
        assert run(words(place, out, "--resume")) == 0
        assert told(out) == told(whole)


@pytest.mark.long
def test_killed_at_a_moment_of_chance(whole: Path, place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for more in ((), ("--resume",)):
        process = subprocess.Popen(
            [sys.executable, "-m", "truetune", *words(place, out, *more)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        before = len(list(RunDir(out).read_step_rows()))
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if len(list(RunDir(out).read_step_rows())) > before:
                break
            time.sleep(0.003)
        time.sleep(random.random() * 0.2)
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=30)
    if RunDir(out).read_info()["state"] != "done":
        assert run(words(place, out, "--resume")) == 0
    assert told(out) == told(whole)


def test_steps_are_taken_again_from_a_checkpoint(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["verify", str(whole), "--resume-exact", "3"]) == 0
    assert "damaged" not in capsys.readouterr().out


def test_files_that_were_touched_are_not_gone_on_with(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = tmp_path / "rows.jsonl", tmp_path / "out"
    write_rows(data, range(40))
    assert run(words(place, out, "--max-steps", "4", data=data)) == 0
    RunDir(out).write_info(state="stopped")
    write_rows(data, range(1, 41))
    assert run(words(place, out, "--max-steps", "4", "--resume", data=data)) == 2
    assert "changed since the run began: data" in capsys.readouterr().err
    assert run(words(place, out, "--max-steps", "4", "--resume", "--allow-changed", data=data)) == 2
    assert "others now" in capsys.readouterr().err


def test_refused_rows_stop_the_run_with_its_state_saved(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Far behind the first rows: the steps before are saved, and with `invalid: skip` the run goes on from there."""
    monkeypatch.setattr("truetune.data.head.HEAD_ROWS", 35)
    data, out = tmp_path / "rows.jsonl", tmp_path / "out"
    write_rows(data, range(60), bad=(46, 50))
    assert run(words(place, out, data=data)) == 2
    said = capsys.readouterr().err
    assert f"{data}:47" in said
    assert f"{data}:51" in said
    assert "--invalid skip --resume" in said
    last = len(list(RunDir(out).read_step_rows()))
    assert 5 < last < NUM_STEPS
    assert (out / "checkpoints" / f"checkpoint-{last:06d}").is_dir()
    assert run(words(place, out, "--resume", "--invalid", "skip", "--allow-changed", data=data)) == 0
    skipped = tmp_path / "skipped"
    assert run(words(place, skipped, "--invalid", "skip", data=data)) == 0
    assert told(out) == told(skipped)
    for folder in (out, skipped):
        assert run(["verify", str(folder)]) == 0
        refused = [json.loads(line) for line in (folder / "refused.jsonl").read_text().splitlines()]
        assert [line["where"] for line in refused] == [f"{data}:47", f"{data}:51"]
        assert refused[0]["step"] == last + 1
        assert all(line["reason"] and line["fix"] for line in refused)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "max_steps is not given"),
        (["--max-steps", "3", "--num-train-epochs", "2"], "num_train_epochs is not for streamed data"),
        (["--max-steps", "3", "--data-weights", "2"], "data_weights is not for streamed data"),
    ],
)
def test_keys_that_do_not_fit_are_refused(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["train", "x.json", "--model", "m", "--streaming", "true", *words]) == 2
    assert said in capsys.readouterr().err


def test_a_search_does_not_stream(place: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("streaming: true\nmax_steps: 3\n")
    assert run(["tune", str(place / "rows"), "--model", str(place / "base"), "--config", str(config)]) == 2
    assert "does not stream" in capsys.readouterr().err


def test_check_reads_all_rows_of_what_will_be_streamed(place: Path, tmp_path: Path) -> None:
    config, report = tmp_path / "c.yaml", tmp_path / "r.json"
    config.write_text("streaming: true\nmax_steps: 3\n")
    found = ["check", str(place / "rows"), "--model", str(place / "base"), "--config", str(config)]
    assert run([*found, "--json", str(report)]) == 0
    assert json.loads(report.read_text())["rows_read"] == 40


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_the_example_runs(lang: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    examples, out = examples_folder(), tmp_path / "out"
    monkeypatch.chdir(examples.parent)
    more = ["--model", str(place / "base"), "--output-dir", str(out), "--max-steps", "2", "--max-length", "4096"]
    assert run(["train", "--config", str(examples / "streaming.yaml"), *more, "--lang", lang]) == 0
    assert {"en": "Streamed: these are the first", "zh": "流式：以上是前"}[lang] in capsys.readouterr().out
    assert (out / "adapter" / "adapter_model.safetensors").is_file()


MEMORY = """
import json, sys, psutil
from itertools import islice
from truetune.config import resolve
from truetune.data.head import prepare_stream
from truetune.data.template import build_renderer
from truetune.model import eos_ids, load_tokenizer
from pathlib import Path
data, base, block = sys.argv[1:]
config = resolve({"data": [data], "streaming": True, "max_steps": 10**9, "shuffle_rows": int(block)}).config
renderer = build_renderer(load_tokenizer(Path(base)), eos_ids(Path(base)))
feed = prepare_stream(config, renderer).feed
used, marks = psutil.Process(), []
for step, (epoch, rows) in enumerate(feed.steps(0, batch_size=100), start=1):
    feed.position_at(step)
    while len(marks) < 10 and epoch >= (len(marks) + 1) / 10:
        marks.append(used.memory_info().rss)
    if len(marks) == 10:
        break
print(json.dumps([marks, step]))
"""


@pytest.fixture
def remembered(place: Path, tmp_path: Path) -> Callable[[int], list[int]]:
    """Return the memory at each tenth of a file of so many rows."""

    def read(num_rows: int) -> list[int]:
        path = tmp_path / "many.jsonl"
        with path.open("w") as file:
            for n in range(num_rows):
                file.write(json.dumps({"instruction": f"What is {n}?" + " Well?" * 10, "output": f"{n}."}) + "\n")
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, str(path), str(place / "base"), "2000"],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        marks, steps = json.loads(done.stdout)
        assert steps * 100 > 0.9 * num_rows
        return list(marks)

    return read


@pytest.mark.long
def test_memory_is_flat(remembered: Callable[[int], list[int]]) -> None:
    """From the second tenth of a file to its end: no more than noise, a small part of what the rows would take."""
    marks = remembered(40_000)
    assert len(marks) == 10
    assert marks[-1] - marks[1] < 12e6, [round(mark / 1e6) for mark in marks]
