"""The keeper of a command: how it ended is written down, whatever ended it."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SLEEP = "import time; print('on', flush=True); time.sleep(60)"
SAVES = """
import signal, sys, time
signal.signal(signal.SIGINT, lambda *_: sys.exit(7))
print('on', flush=True)
time.sleep(60)
"""


def keep(exit_file: Path, code: str) -> subprocess.Popen[str]:
    """Start a keeper as the studio does."""
    words = [sys.executable, "-P", "-m", "truetune.studio.keeper", str(exit_file), sys.executable, "-c", code]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True, start_new_session=True)


@pytest.mark.parametrize(("code", "expected"), [("pass", 0), ("raise SystemExit(3)", 3), ("1/0", 1)])
def test_the_exit_code(code: str, expected: int, tmp_path: Path) -> None:
    kept = keep(tmp_path / "exit", code)
    assert (kept.wait(20), (tmp_path / "exit").read_text()) == (expected, f"{expected}\n")
    assert kept.stdout is not None
    kept.stdout.close()


@pytest.mark.parametrize(
    ("code", "number", "expected"),
    [(SLEEP, signal.SIGTERM, 143), (SAVES, signal.SIGINT, 7), (SLEEP, signal.SIGINT, 130)],
)
def test_a_signal_is_the_commands_to_decide(code: str, number: int, expected: int, tmp_path: Path) -> None:
    import os

    kept = keep(tmp_path / "exit", code)
    assert kept.stdout is not None
    assert kept.stdout.readline() == "on\n"
    time.sleep(0.1)
    os.killpg(kept.pid, number)
    # Python itself ends with 1 or -2 after Ctrl-C, as the version has it.
    assert kept.wait(20) in (expected, 1 if expected == 130 else expected)
    assert int((tmp_path / "exit").read_text()) == kept.returncode
    kept.stdout.close()
