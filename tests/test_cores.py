"""One thread has OpenMP's workers at a time; each case in a process of its own, which counts its threads."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

BEGIN = """
import os, threading
import torch
from truetune.cores import aside, give_back_workers

torch.set_num_threads(2)
large = torch.ones(1 << 20)
def threads():
    return len(os.listdir("/proc/self/task"))
def compute():
    return float(large.mul(2).sum())
compute()
"""


def run(code: str) -> str:
    """What a process prints that runs the code."""
    words = [sys.executable, "-c", BEGIN + textwrap.dedent(code)]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()


def require_libgomp() -> None:
    """Skip where torch computes with another runtime."""
    import torch  # noqa: F401

    maps = Path("/proc/self/maps")
    if not (maps.is_file() and "libgomp" in maps.read_text()):
        pytest.skip("torch does not compute with libgomp here")


@pytest.mark.parametrize(("executor", "more"), [("aside()", 0), ("ThreadPoolExecutor(1)", 1)])
def test_who_works_aside_has_no_workers(executor: str, more: int) -> None:
    """The thread itself, and no worker for it; any other thread would get one."""
    require_libgomp()
    code = f"""
    from concurrent.futures import ThreadPoolExecutor
    with {executor} as pool:
        pool.submit(int).result()
        before = threads()
        assert pool.submit(compute).result() == 2 << 20
        print(threads() - before)
    """
    assert run(code) == str(more)


def test_other_threads_keep_their_number() -> None:
    """Aside it is one core; for this thread, and for those to come, what was set."""
    code = """
    found = []
    with aside() as pool:
        found.append(pool.submit(torch.get_num_threads).result())
        found.append(torch.get_num_threads())
        thread = threading.Thread(target=lambda: (compute(), found.append(torch.get_num_threads())))
        thread.start()
        thread.join()
    print(*found)
    """
    assert run(code) == "1 2 2"


def test_workers_are_given_back_and_come_again() -> None:
    """One thread less; the next large operation has it again, with the same result."""
    require_libgomp()
    code = """
    with_workers = threads()
    give_back_workers()
    # The worker leaves by itself, a moment later.
    for _ in range(1000):
        if threads() < with_workers:
            break
        threading.Event().wait(0.01)
    print(with_workers - threads())
    assert compute() == 2 << 20
    print(with_workers - threads())
    """
    assert run(code).split() == ["1", "0"]
