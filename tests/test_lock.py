"""One writer: another process is refused by name, a dead one is not in the way."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from truetune import lock
from truetune.errors import MachineError
from truetune.lock import RunLock, owner_of, refuse_locked

HOLD = "import sys, time; from pathlib import Path; from truetune.lock import RunLock\n"
HOLD += "with RunLock(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock of `tmp_path`."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_the_owner_is_named(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    owner = owner_of(tmp_path)
    assert owner is not None
    assert (owner["pid"], owner["host"]) == (holder.pid, socket.gethostname())
    for take in (lambda: refuse_locked(tmp_path), RunLock(tmp_path).__enter__):
        with pytest.raises(MachineError) as caught:
            take()
        assert (caught.value.key, caught.value.exit_code) == ("locked", 3)
        assert caught.value.values == owner
    assert owner_of(tmp_path) == owner


def test_a_dead_owner_is_not_in_the_way(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    """Killed, it leaves the file; nobody holds it, even if another process has its number by now."""
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    left = json.loads((tmp_path / ".lock").read_text())
    (tmp_path / ".lock").write_text(json.dumps(left | {"pid": os.getppid()}))
    assert owner_of(tmp_path) is None
    refuse_locked(tmp_path)
    with RunLock(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


def test_given_back(tmp_path: Path) -> None:
    for _ in range(3):
        with RunLock(tmp_path / "run"):
            assert (tmp_path / "run" / ".lock").is_file()
        assert list((tmp_path / "run").iterdir()) == []
    assert owner_of(tmp_path / "run") is None


def test_a_file_removed_while_it_was_opened_is_not_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its owner removed it between our opening and our locking it: it is opened again."""
    tried: list[int] = []
    take = lock._try

    def remove_first(descriptor: int) -> bool:
        if not tried:
            (tmp_path / ".lock").unlink()
        tried.append(descriptor)
        return take(descriptor)

    monkeypatch.setattr(lock, "_try", remove_first)
    with RunLock(tmp_path):
        assert len(tried) == 2
        assert owner_of(tmp_path) is not None


def test_two_at_once(tmp_path: Path) -> None:
    """Of ten processes that start together, exactly one gets it."""
    program = "import sys, time; from pathlib import Path; from truetune.errors import MachineError\n"
    program += (
        "from truetune.lock import RunLock\ntry:\n with RunLock(Path(sys.argv[1])): time.sleep(4); print('got')\n"
    )
    program += "except MachineError: print('refused')"
    started = time.monotonic()
    processes = [
        subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(10)
    ]
    answers = sorted(process.communicate(timeout=60)[0].strip() for process in processes)
    if time.monotonic() - started < 7.5:  # all of them started while the first one held it
        assert answers == ["got", *["refused"] * 9]
    assert "got" in answers
