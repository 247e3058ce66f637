"""Real processes: killed at random moments, stopped by signals, two at once, a full disk, too little memory.

`make test-faults` kills fifty times, `make test` three.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hurt import NUM_STEPS, assert_same, digest, events, orphans, words

from truetune import checkpoint, disk
from truetune.cli import run
from truetune.lock import RunLock
from truetune.messages import text
from truetune.rundir import RunDir

pytestmark = pytest.mark.slow

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "LC_ALL": "C.UTF-8"}
LONG = {"num_train_epochs": 20, "save_steps": 4, "eval_steps": 10}
LONG_STEPS = 60


@pytest.fixture
def start(data: Path, held_out: Path, tiny_base: Path, tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Start the run in a process of its own."""

    def begin(*more: str, out: Path | None = None, limit: Callable[[], None] | None = None, **keys: Any) -> Any:
        command = words(data, tiny_base, out or tmp_path / "out", *more, **{"eval_data": held_out, **keys})
        return subprocess.Popen(
            [sys.executable, "-m", "truetune", *command],
            env={**os.environ, **ENVIRONMENT, "TRUETUNE_CACHE": str(tmp_path / "cache")},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=limit,
        )

    return begin


def _end(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def _wait_for_steps(process: subprocess.Popen[str], out: Path, count: int = 1) -> bool:
    """Wait until that many steps are told of, by a process that lives; False if it ended before."""
    lines = out / "steps.jsonl"
    # A run that goes on cuts them back first, to another file.
    before = lines.stat().st_ino if lines.exists() else 0
    start, end = None, time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None:
        if lines.exists() and lines.stat().st_ino != before:
            taken = len(lines.read_bytes().splitlines())
            start = taken if start is None and before else start or 0
            if taken >= start + count:
                return True
        time.sleep(0.002)
    return False


@pytest.fixture(scope="module")
def long_whole(data: Path, held_out: Path, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The long run that nobody kills."""
    out = tmp_path_factory.mktemp("long") / "out"
    command = words(data, tiny_base, out, **{"eval_data": held_out, **LONG})
    subprocess.run(
        [sys.executable, "-m", "truetune", *command], env={**os.environ, **ENVIRONMENT}, check=True, capture_output=True
    )
    assert len([event for event in events(out) if event["kind"] == "step"]) == LONG_STEPS
    return out


def _kill_often(number: int, start: Callable[..., Any], whole: Path, tmp_path: Path) -> tuple[int, int]:
    """Kill runs at random moments until `number` live ones were hit; return the kills, and the most steps repeated."""
    draw = random.Random(number)
    kills = runs = most_repeated = 0
    while kills < number:
        out = tmp_path / f"out{runs}"
        runs += 1
        is_done = False
        while not is_done:
            process = start(*(["--resume"] if out.exists() else []), out=out, **LONG)
            taken = len(events(out))
            if kills < number and _wait_for_steps(process, out):
                time.sleep(draw.uniform(0, 1.2))
                is_done = process.poll() is not None
                process.kill()
            code, _, errors = _end(process)
            if is_done or code == 0:
                assert code == 0, errors
                break
            if kills < number:
                assert code == -signal.SIGKILL, errors
                assert run(["verify", str(out)]) == 0
                kills += 1
                steps = [event["step"] for event in events(out) if event["kind"] == "step"]
                good, _ = checkpoint.find(out / "checkpoints")
                saved = 0 if good is None else checkpoint.step_of(good)
                most_repeated = max(most_repeated, steps[-1] - saved if steps else 0)
                assert len(events(out)) >= taken or good is not None
        assert run(["verify", str(out)]) == 0
        assert events(out) == events(whole)
        assert (digest(out), orphans(out)) == (digest(whole), [])
    return kills, most_repeated


@pytest.mark.long
def test_kill_a_few_times(start: Callable[..., Any], long_whole: Path, tmp_path: Path) -> None:
    kills, most_repeated = _kill_often(3, start, long_whole, tmp_path)
    assert kills == 3
    assert most_repeated <= LONG["save_steps"]


def test_kill_one_that_starts_at_the_base(
    start: Callable[..., Any], data: Path, held_out: Path, tiny_base: Path, tmp_path: Path
) -> None:
    """PiSSA: what it started at is in the checkpoint, and the run goes on to the same bits."""
    keys = {"lora_init": "pissa", "lora_dropout": 0, "num_train_epochs": 8, "save_steps": 2}
    out, whole = tmp_path / "out", tmp_path / "whole"
    process = start(out=out, **keys)
    assert _wait_for_steps(process, out, 3)
    process.kill()
    assert _end(process)[0] == -signal.SIGKILL
    told = events(out)
    assert run(words(data, tiny_base, out, "--resume", eval_data=held_out, **keys)) == 0
    assert run(words(data, tiny_base, whole, eval_data=held_out, **keys)) == 0
    assert events(out) == events(whole)
    assert len(told) < len(events(whole))
    assert (digest(out), orphans(out)) == (digest(whole), [])


@pytest.mark.faults
def test_kill_fifty_times(start: Callable[..., Any], long_whole: Path, tmp_path: Path) -> None:
    """Each of them hit a live run (F1); at most `save_steps` steps are repeated."""
    kills, most_repeated = _kill_often(50, start, long_whole, tmp_path)
    assert kills == 50
    assert 0 < most_repeated <= LONG["save_steps"]


@pytest.mark.parametrize(
    ("number", "times"),
    [
        (signal.SIGINT, 1),
        pytest.param(signal.SIGTERM, 2, marks=pytest.mark.long),
        pytest.param(signal.SIGHUP, 1, marks=pytest.mark.faults),
        pytest.param(signal.SIGTERM, 1, marks=pytest.mark.faults),
        pytest.param(signal.SIGINT, 2, marks=pytest.mark.faults),
        pytest.param(signal.SIGHUP, 2, marks=pytest.mark.faults),
    ],
)
def test_signals(
    times: int, number: signal.Signals, start: Callable[..., Any], long_whole: Path, tmp_path: Path
) -> None:
    """Once: the step ends and is saved. Twice: at once, and what was saved before is whole (F4)."""
    out = tmp_path / "out"
    process = start(**LONG)
    assert _wait_for_steps(process, out, 6)
    process.send_signal(number)
    if times == 2:
        time.sleep(0.001)
        process.send_signal(number)
    code, _, errors = _end(process)
    # The second one is the system's own: Python ends itself on Ctrl-C, the others end it.
    assert code in (128 + number, -number), errors
    if times == 1:
        assert code == 128 + number
        assert RunDir(out).read_info()["state"] == "stopped"
        assert disk.damage(out / "adapter") is None
        assert run(["chat", str(out), "-m", "What is 3 plus 3?", "--max-new-tokens", "3"]) == 0
        assert run(["verify", str(out)]) == 0
    assert _end(start("--resume", **LONG))[0] == 0
    assert events(out) == events(long_whole)
    assert (digest(out), orphans(out)) == (digest(long_whole), [])


def test_two_at_once(
    data: Path, tiny_base: Path, start: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second one is refused, whether it resumes or not, and names the first (F17)."""
    out = tmp_path / "out"
    process = start(**LONG)
    assert _wait_for_steps(process, out)
    for more in ([], ["--resume"]):
        assert run(words(data, tiny_base, out, *more)) == 3
        assert (
            f"another process writes into this run: {process.pid} on {socket.gethostname()}" in capsys.readouterr().err
        )
    assert run(["runs", str(tmp_path)]) == 0
    assert "running" in capsys.readouterr().out
    process.kill()
    _end(process)
    assert run(["runs", str(tmp_path)]) == 0
    assert "killed" in capsys.readouterr().out


def test_the_other_one_was_faster(data: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both found the folder free; while this one loaded its model, the other began (F17)."""
    from truetune import training

    assemble, out = training.assemble, tmp_path / "out"

    def slow(*rest: Any, **more: Any) -> Any:
        RunDir(out).path.mkdir()
        RunDir(out).write_info(state="running", date="2026-01-01")
        return assemble(*rest, **more)

    monkeypatch.setattr(training, "assemble", slow)
    assert run(words(data, tiny_base, out)) == 2
    assert [path.name for path in out.iterdir()] == ["run.json"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of forty megabytes; where none may be mounted, files may not grow beyond what one would hold."""
    folder = tmp_path / "small"
    folder.mkdir()
    is_mounted = not subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(folder)], capture_output=True, check=False
    ).returncode
    if not is_mounted:
        (folder / ".not-mounted").touch()
    yield folder
    if is_mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_fills(
    start: Callable[..., Any], small_disk: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Full before a save: exit 3 with both numbers, what was saved is whole; with room again it goes on (F6)."""
    if (small_disk / ".not-mounted").exists():
        limits = (20_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
        hurt = {"limit": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits)}
    else:
        (small_disk / "ballast").write_bytes(bytes((40 << 20) - disk.MARGIN_BYTES - 60_000))
        hurt = {}
    out = small_disk / "out"
    code, _, errors = _end(start(out=out, **hurt))
    assert code == 3, errors
    assert "the disk is full" in errors
    assert "MB free" in errors
    (small_disk / "ballast").unlink(missing_ok=True)
    code, _, errors = _end(start("--resume", out=out))
    assert code == 0, errors
    assert_same(out, whole)


STARVED = """
import os, resource, sys
import peft, pyarrow, torch, transformers
import truetune.loop, truetune.training
from truetune.cli import run

where, words = sys.argv[1], sys.argv[2:]
take_step = truetune.loop.train_step

def hungry(*args, **keys):
    torch.empty(1 << 34, dtype=torch.uint8)
    return take_step(*args, **keys)

if where == "step 1":
    truetune.loop.train_step = hungry
megabytes = {"begin": 20, "step 1": 4096}[where]
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize() + (megabytes << 20)
resource.setrlimit(resource.RLIMIT_AS, (size, size))
os._exit(run(words))
"""


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads /proc")
@pytest.mark.parametrize("where", ["begin", "step 1"])
def test_too_little_memory(where: str, data: Path, tiny_base: Path, tmp_path: Path) -> None:
    """Too little for what is loaded, or for a step of any size: advice with numbers and exit 3, no traceback (F15).

    What the system's killer does is what kill -9 does.
    """
    command = [sys.executable, "-c", STARVED, where, *words(data, tiny_base, tmp_path / "out")]
    environment = {**os.environ, **ENVIRONMENT, "TRUETUNE_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 3, done.stderr
    assert "memory ran out: " in done.stderr
    assert "GB free" in done.stderr
    assert ("step 1" in done.stderr) == (where == "step 1")


def test_no_network(
    data: Path, held_out: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is connected to, from the first word to the last (F23)."""

    def refuse(*_: Any) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert run(words(data, tiny_base, tmp_path / "out", eval_data=held_out)) == 0


NAMES = ("with space", "甄嬛传", "🚂 run", "n" * 255, "-dash", "a'b\"c", "ends.")


@pytest.mark.parametrize("name", NAMES)
def test_names_of_folders(
    name: str, data: Path, held_out: Path, tiny_base: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any name that the system takes (F24), relative, too."""
    monkeypatch.chdir(tmp_path)
    out = Path(f"./{name}")
    assert run(words(data, tiny_base, out, eval_data=held_out)) == 0
    assert_same(out.absolute(), whole)
    RunDir(out).write_info(state="running")
    assert run(words(data, tiny_base, out, "--resume", eval_data=held_out)) == 0
    assert run(["chat", str(out.absolute()), "-m", "Hi", "--max-new-tokens", "2"]) == 0


def test_a_linked_folder(data: Path, held_out: Path, tiny_base: Path, whole: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert run(words(data, tiny_base, tmp_path / "link", eval_data=held_out)) == 0
    assert_same(tmp_path / "real", whole)


def test_a_name_that_is_too_long(data: Path, tiny_base: Path, tmp_path: Path) -> None:
    assert run(words(data, tiny_base, tmp_path / ("n" * 256))) == 3


# --- a base that is broken (F11) ---


def _cut(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _sharded(model: Path, **shards: str) -> None:
    from safetensors import safe_open

    with safe_open(model / "model.safetensors", "pt") as file:
        names = list(file.keys())
    (model / "model.safetensors").rename(model / "model-00001-of-00001.safetensors")
    index = dict.fromkeys(names, "model-00001-of-00001.safetensors") | {names[0]: shards["first"]}
    content = {"metadata": {"total_size": 1}, "weight_map": index}
    (model / "model.safetensors.index.json").write_text(json.dumps(content))


BROKEN: dict[str, Callable[[Path], None]] = {
    "cut": _cut,
    "header": lambda model: (model / "model.safetensors").write_bytes(b"\xff" * 100),
    "shard missing": lambda model: _sharded(model, first="model-00002-of-00002.safetensors"),
    "outside": lambda model: _sharded(model, first="../x.safetensors"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_base(
    how: str, data: Path, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit 2, the file named, nothing written."""
    model = tmp_path / "model"
    shutil.copytree(tiny_base, model)
    BROKEN[how](model)
    assert run(words(data, model, tmp_path / "out")) == 2
    assert "safetensors" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# --- secrets ---


def test_no_secret_is_written(
    data: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Canaries of the environment stand in no file and on no screen; pickles are not written either."""
    canaries = {name: f"canary-{name}" for name in ("HF_TOKEN", "SWANLAB_API_KEY", "WANDB_API_KEY", "AWS_SECRET")}
    for name, value in canaries.items():
        monkeypatch.setenv(name, value)
    out = tmp_path / "out"
    assert run(words(data, tiny_base, out, report_to="tensorboard")) == 0
    assert run(words(data, tiny_base, out, "--resume")) == 0
    said = capsys.readouterr()
    files = [path for path in out.rglob("*") if path.is_file()]
    assert len(files) > 20
    for value in canaries.values():
        assert value not in said.out + said.err
        assert [path for path in files if value.encode() in path.read_bytes()] == []
    assert {path.suffix for path in files} & {".bin", ".pt", ".pth", ".pkl"} == set()


@pytest.mark.parametrize("key", ["swanlab_api_key", "hf_token", "wandb_password"])
def test_secrets_in_a_configuration_are_refused(
    key: str, data: Path, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(f"{key}: hunter2\n")
    assert run(words(data, tiny_base, tmp_path / "out", "--config", str(path))) == 2
    said = capsys.readouterr().err
    assert text("fix.config_secret") in said
    assert "hunter2" not in said


def test_lock_of_this_process_is_given_back(data: Path, tiny_base: Path, tmp_path: Path) -> None:
    """Also where a run fails: the Python API goes on after it."""
    out = tmp_path / "out"
    with RunLock(out):
        assert run(words(data, tiny_base, out)) == 3
    assert run(words(data, tiny_base, out, max_steps=1)) == 0
    assert NUM_STEPS > 1
