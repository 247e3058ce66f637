"""Whole runs in several processes by the command line: the same result, and every way in which they end."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file
from several import apart, environment, torchrun

from truetune import checkpoint
from truetune.cli import run
from truetune.launch import _code_of, _signals
from truetune.messages import text
from truetune.messages.en import TEXTS
from truetune.rundir import RunDir
from truetune.trained import ADAPTER

STEPS, TOLERANCE = 24, 1e-5
# A learning rate at which 1e-7 of rounding is still 1e-5 at the end.
KEYS = ["--max-steps", str(STEPS), "--batch-size", "4", "--learning-rate", "1e-3", "--dtype", "float32"]
KEYS += ["--eval-split", "0.25", "--eval-steps", "12", "--save-steps", "4", "--sample-prompts", "none"]
KEYS += ["--max-tokens-per-forward", "2048", "--gradient-checkpointing", "false"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty rows: 30 to train, 10 held out."""
    path = tmp_path_factory.mktemp("data") / "sums.json"
    rows = [{"instruction": f"What is {n} plus {n}?", "output": f"It is {2 * n}."} for n in range(40)]
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def words(data: Path, tiny_qwen: Path) -> list[str]:
    """The words of the run, without its folder."""
    return ["train", str(data), "--model", str(tiny_qwen), *KEYS]


@pytest.fixture(scope="module")
def whole(words: list[str], short_answers: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run in one process."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert run([*words, "--output-dir", str(out)]) == 0
    return out


@pytest.fixture
def start(words: list[str], tmp_path: Path) -> Callable[..., Any]:
    """Start the command with more words, by itself or under torchrun, into `out`; its cache is the test's."""

    def go(*more: str, by: list[str] | None = None) -> subprocess.Popen[str]:
        command = by or [sys.executable]
        command = [*command, "-m", "truetune", *words, "--output-dir", str(tmp_path / "out"), *more]
        own = environment(TRUETUNE_CACHE=str(tmp_path / "cache"), LC_ALL="C.UTF-8")
        return subprocess.Popen(command, env=own, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return go


def end(process: subprocess.Popen[str], seconds: float = 200) -> tuple[int, str, str]:
    """Wait and return exit code, output and errors."""
    out, errors = process.communicate(timeout=seconds)
    return process.returncode, out, errors


def wait_for_steps(out: Path, number: int, process: subprocess.Popen[str]) -> None:
    """Wait until a run has taken so many steps."""
    deadline = time.monotonic() + 150
    while process.poll() is None and time.monotonic() < deadline:
        path = out / "events.jsonl"
        if path.is_file() and path.read_text().count('"kind": "step"') >= number:
            return
        time.sleep(0.01)
    raise AssertionError(process.communicate())


def rank_process(process: subprocess.Popen[str], rank: int) -> psutil.Process:
    """One of the processes below a launcher."""
    for child in psutil.Process(process.pid).children(recursive=True):
        if child.environ().get("RANK") == str(rank) and "truetune" in " ".join(child.cmdline()):
            return child
    raise AssertionError(f"no rank {rank}")


def told(out: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Events and adapter of a run's last checkpoint."""
    newest = checkpoint.by_step(out / "checkpoints")[-1]
    return list(RunDir(out).read_events()), load_file(newest / ADAPTER)


def assert_same(out: Path, whole: Path) -> None:
    """Every step once, all figures and the weights within the tolerance."""
    figures = apart(told(out), told(whole))
    assert all(value <= TOLERANCE for value in figures.values()), figures
    steps = [event["step"] for event in RunDir(out).read_events() if event["kind"] == "step"]
    assert steps == list(range(1, STEPS + 1))
    assert [line["step"] for line in RunDir(out).read_step_rows()] == steps
    assert RunDir(out).read_info()["state"] == "done"
    assert (out / "report.json").is_file()


def no_leftovers(process: subprocess.Popen[str], out: Path) -> None:
    """No process of the run goes on, or not for long."""
    deadline = time.monotonic() + 15
    while True:
        left = [p.pid for p in psutil.process_iter(["cmdline"]) if str(out) in " ".join(p.info["cmdline"] or [])]
        if not left:
            return
        assert time.monotonic() < deadline, left
        time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.faults)])
def test_stopped_and_resumed_with_other_ranks(number: int, start: Any, whole: Path, tmp_path: Path) -> None:
    """A signal to the parent: all stop after one step, rank 0 saves; 2 ranks, then 1, are one run. Said once."""
    out = tmp_path / "out"
    process = start("--devices", "2")
    wait_for_steps(out, 3, process)
    os.kill(process.pid, number)
    code, said, errors = end(process)
    assert code == 128 + number, errors
    assert errors.count(text("error.stopped")) == 1
    assert "Traceback" not in errors
    assert said.count(f"step 1/{STEPS}: ") == 1
    steps = [event["step"] for event in RunDir(out).read_events() if event["kind"] == "step"]
    assert 3 <= len(steps) < STEPS
    assert checkpoint.step_of(checkpoint.by_step(out / "checkpoints")[-1]) == steps[-1]
    assert RunDir(out).read_info()["state"] == "stopped"
    no_leftovers(process, out)
    code, said, errors = end(start("--resume", "--devices", "1"))
    assert code == 0, errors
    assert "ranks (2 → 1)" in said
    assert_same(out, whole)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.faults)])
def test_a_rank_is_killed_and_the_run_goes_on_in_shards(rank: int, start: Any, whole: Path, tmp_path: Path) -> None:
    """kill -9: all end within seconds, the rank and the signal are named; then 3 ranks go on, sharded."""
    out = tmp_path / "out"
    process = start("--devices", "2")
    wait_for_steps(out, 6, process)
    rank_process(process, rank).kill()
    began = time.monotonic()
    code, _, errors = end(process)
    assert time.monotonic() - began < 20
    assert code == 3, errors
    assert text("error.rank_killed", rank=rank, signal="SIGKILL") in errors
    assert "Traceback" not in errors
    no_leftovers(process, out)
    path, skipped = checkpoint.find(out / "checkpoints")
    assert path is not None
    assert skipped == {}
    code, _, errors = end(start("--resume", "--devices", "3", "--strategy", "shard"))
    assert code == 0, errors
    assert_same(out, whole)


@pytest.mark.slow
@pytest.mark.faults
def test_torchrun_starts_again_by_itself(start: Any, whole: Path, tmp_path: Path) -> None:
    """A rank is killed; torchrun starts both again with the same words, and they go on from the newest checkpoint."""
    out = tmp_path / "out"
    by = [*torchrun(2, "--max-restarts=2")]
    process = start("--resume", by=by)
    wait_for_steps(out, 6, process)
    rank_process(process, 1).kill()
    code, said, errors = end(process)
    assert code == 0, errors
    resumed = re.findall(TEXTS["train.resumed"].replace("{step}", r"(\d+)"), said)
    assert len(resumed) == 1
    assert int(resumed[0]) >= 4
    assert_same(out, whole)


@pytest.mark.slow
@pytest.mark.long
def test_a_fault_of_all_ranks_is_told_once(start: Any, tmp_path: Path) -> None:
    """Exit code of the fault, its three parts once, nothing else; nothing written."""
    code, _, errors = end(start("--devices", "2", "--target-modules", "no_such"))
    assert code == 2
    assert errors.count("no_such") == 1
    assert "Traceback" not in errors
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_example_trains_on_two(tiny_base: Path, tmp_path: Path) -> None:
    """Two steps of examples/devices.yaml, by the command line: two ranks, one run folder."""
    root = Path(__file__).resolve().parents[2]
    line = ["train", "--config", "examples/devices.yaml", "--model", str(tiny_base), "--max-steps", "2"]
    words = [sys.executable, "-m", "truetune", *line, "--output-dir", str(tmp_path / "out"), "--sample-prompts", "none"]
    done = subprocess.run(words, cwd=root, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    steps = [event["step"] for event in RunDir(tmp_path / "out").read_events() if event["kind"] == "step"]
    assert steps == [1, 2]
    assert done.stdout.count("step 1/2") == 1
    assert (tmp_path / "out" / "adapter" / ADAPTER).is_file()


@pytest.mark.slow
@pytest.mark.long
def test_a_stream_on_two_is_that_on_one(start: Any, tmp_path: Path) -> None:
    """Every rank reads it, and takes its part of the same steps; a checkpoint's place is everybody's."""
    words = ["--streaming", "true", "--shuffle-rows", "8", "--num-train-epochs", "3", "--max-steps", "4"]
    told = []
    for number in (1, 2):
        out = tmp_path / f"out{number}"
        code, _, errors = end(start("--devices", str(number), *words, "--output-dir", str(out)))
        assert code == 0, errors
        told.append((list(RunDir(out).read_events()), load_file(out / "adapter" / ADAPTER)))
        (tmp_path / f"steps{number}").write_bytes((out / "steps.jsonl").read_bytes())
    assert (tmp_path / "steps1").read_bytes() == (tmp_path / "steps2").read_bytes()
    assert len((tmp_path / "steps1").read_bytes().splitlines()) == 4
    assert max(apart(*told).values()) < 1e-5


@pytest.mark.slow
@pytest.mark.faults
def test_a_second_signal_ends_at_once(start: Any, whole: Path, tmp_path: Path) -> None:
    """No process is left, the checkpoints stand."""
    out = tmp_path / "out"
    process = start("--devices", "2")
    wait_for_steps(out, 6, process)
    os.kill(process.pid, signal.SIGINT)
    os.kill(process.pid, signal.SIGINT)
    code, _, errors = end(process, 30)
    assert code == 130, errors
    no_leftovers(process, out)
    path, skipped = checkpoint.find(out / "checkpoints")
    assert path is not None
    assert skipped == {}


@pytest.mark.slow
@pytest.mark.faults
def test_the_launcher_is_killed(start: Any, whole: Path, tmp_path: Path) -> None:
    """Its ranks do not go on without it: they stop as by SIGTERM, and save."""
    out = tmp_path / "out"
    process = start("--devices", "2")
    wait_for_steps(out, 6, process)
    process.kill()
    end(process, 30)
    no_leftovers(process, out)
    assert RunDir(out).read_info()["state"] == "stopped"
    steps = [event["step"] for event in RunDir(out).read_events() if event["kind"] == "step"]
    assert checkpoint.step_of(checkpoint.by_step(out / "checkpoints")[-1]) == steps[-1] < STEPS


# --- without processes ---


def test_under_nohup_a_closed_terminal_is_ignored() -> None:
    """Whatever these tests themselves were started under."""
    handled = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    before = {number: signal.signal(number, signal.SIG_DFL) for number in handled}
    try:
        assert "SIGHUP" in _signals()
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        assert _signals() == ["SIGTERM", "SIGINT", "SIGQUIT"]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Failure:
    """What torch's launcher says of a process."""

    def __init__(self, exitcode: int) -> None:
        self.exitcode = exitcode


@pytest.mark.parametrize(
    ("codes", "wanted"),
    [({0: 4, 1: 4}, 4), ({0: 75, 1: 2}, 2), ({0: 3, 1: -15}, 3), ({1: 1}, 1), ({0: 143, 1: -15}, 143)],
)
def test_exit_code_of_what_a_rank_told(codes: dict[int, int], wanted: int) -> None:
    assert _code_of({rank: Failure(code) for rank, code in codes.items()}) == wanted


@pytest.mark.parametrize(
    ("codes", "key", "where"),
    [
        ({0: 75, 1: -9}, "rank_killed", "rank 1"),
        ({0: -9, 1: 75, 2: 75}, "rank_killed", "rank 0"),
        ({0: -15, 1: -9}, "rank_killed", "rank 1"),
        ({0: -15, 1: -15}, "rank_killed", "rank 0"),
        ({0: 75, 1: 75}, "rank_lost", "ranks"),
    ],
)
def test_a_rank_that_could_not_tell(codes: dict[int, int], key: str, where: str) -> None:
    from truetune.errors import MachineError

    with pytest.raises(MachineError) as error:
        _code_of({rank: Failure(code) for rank, code in codes.items()})
    assert (error.value.key, error.value.where) == (key, where)


def test_several_that_cannot_meet(words: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """WORLD_SIZE alone, as some schedulers set it: an error, and not several runs side by side."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run([*words, "--output-dir", str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()


def test_one_process_is_not_several(
    data: Path, tiny_qwen: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """What does not train in several processes refuses to run in each of them."""
    for name, value in {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "x",
        "MASTER_PORT": "1",
        "WORLD_SIZE": "2",
    }.items():
        monkeypatch.setenv(name, value)
    assert run(["check", str(data), "--model", str(tiny_qwen), "--measure"]) == 2
    assert text("error.ranks_unused", n=2) in capsys.readouterr().err


def test_api_says_how_to_start_several(data: Path, tiny_qwen: Path, tmp_path: Path) -> None:
    import truetune
    from truetune.errors import UserError

    with pytest.raises(UserError) as error:
        truetune.train(data, model=tiny_qwen, devices=2, output_dir=tmp_path / "out")
    assert error.value.key == "devices_not_started"
    with pytest.raises(UserError) as error:
        truetune.train(data, model=tiny_qwen, strategy="shard", output_dir=tmp_path / "out")
    assert error.value.key == "shard_alone"
