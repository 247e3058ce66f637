"""What helpers prepare is what one process prepares; one that dies, or never lives, costs time and nothing else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from truetune.config import Config
from truetune.data import crew as crew_module
from truetune.data.batches import Done, Job, Preparer
from truetune.data.crew import Crew
from truetune.data.template import Renderer, build_renderer
from truetune.errors import RowError
from truetune.records import RawRow

BATCHES, ROWS = 12, 30


@pytest.fixture(scope="module")
def renderer(qwen_tokenizer: Any) -> Renderer:
    return build_renderer(qwen_tokenizer, [151645, 151643], template_kwargs={"enable_thinking": False})


@pytest.fixture(autouse=True)
def two_helpers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two, however many cores there are."""
    monkeypatch.setattr(crew_module, "_num_cores", lambda: 3)


def _jobs() -> list[Job]:
    jobs = []
    for batch in range(BATCHES):
        values = [{"instruction": f"{batch} {n} <|im_end|>", "output": "好" * (n % 7)} for n in range(ROWS)]
        raws: list[tuple[int, RawRow | RowError]] = [
            (0, RawRow(f"x:{batch * ROWS + n}", value)) for n, value in enumerate(values)
        ]
        raws[3] = (0, RowError("row_not_object", where=f"x:{batch * ROWS + 3}", fix="row_not_object", kind="int"))
        jobs.append(Job(batch * ROWS, raws))
    return jobs


def _told(done: list[Done]) -> list[tuple[Any, str]]:
    return [(batch.records.to_pydict(), batch.tally.to_json()) for batch in done]


def _wait_for_start(crew: Crew) -> None:
    for helper in crew._helpers:
        helper._start.result()


def test_helpers_change_nothing(renderer: Renderer, monkeypatch: pytest.MonkeyPatch) -> None:
    preparer = Preparer(Config(max_length=60), renderer)
    wanted = _told([preparer.run(job) for job in _jobs()])
    assert sum(len(records["row"]) for records, _ in wanted) > 200
    here = []
    render = Preparer.render
    monkeypatch.setattr(Preparer, "render", lambda self, job: (here.append(job), render(self, job))[1])
    with Crew(preparer, num_bytes=0) as crew:
        assert not crew._helpers
        assert _told(list(crew.prepare(_jobs()))) == wanted
    assert len(here) == BATCHES
    here.clear()
    with Crew(preparer, num_bytes=1 << 30) as crew:
        assert len(crew._helpers) == 2
        _wait_for_start(crew)
        assert _told(list(crew.prepare(_jobs()))) == wanted
    # Two helpers take two batches each before the first is done here.
    assert len(here) <= BATCHES - 4


def _killed(crew: Crew, monkeypatch: pytest.MonkeyPatch) -> None:
    _wait_for_start(crew)
    for helper in crew._helpers:
        helper._process.kill()


def _stopped_and_killed(crew: Crew, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed when they have their first batches."""
    _wait_for_start(crew)
    for helper in crew._helpers:
        os.kill(helper._process.pid, signal.SIGSTOP)
    begin = crew._begin

    def begin_and_kill(job: Job) -> Callable[[], Done]:
        waiting = begin(job)
        if job.first_index == 5 * ROWS:
            assert [len(helper._answers) for helper in crew._helpers] == [2, 2]
            for helper in crew._helpers:
                helper._process.kill()
        return waiting

    monkeypatch.setattr(crew, "_begin", begin_and_kill)


@pytest.mark.parametrize("hurt", [_killed, _stopped_and_killed])
def test_dead_helper(hurt: Callable[..., None], renderer: Renderer, monkeypatch: pytest.MonkeyPatch) -> None:
    preparer = Preparer(Config(max_length=60), renderer)
    wanted = _told([preparer.run(job) for job in _jobs()])
    with Crew(preparer, num_bytes=1 << 30) as crew:
        hurt(crew, monkeypatch)
        assert _told(list(crew.prepare(_jobs()))) == wanted
        assert all(helper._is_dead for helper in crew._helpers)


def test_helper_that_hangs(renderer: Renderer, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is waited for some time, ended, and what it had is prepared here (F16)."""
    monkeypatch.setattr(crew_module, "PATIENCE_S", 0.3)
    preparer = Preparer(Config(max_length=60), renderer)
    with Crew(preparer, num_bytes=1 << 30) as crew:
        _wait_for_start(crew)
        for helper in crew._helpers:
            os.kill(helper._process.pid, signal.SIGSTOP)
        assert _told(list(crew.prepare(_jobs()))) == _told([preparer.run(job) for job in _jobs()])
        assert all(helper._is_dead and helper._process.returncode is not None for helper in crew._helpers)


@pytest.mark.parametrize("executable", ["/bin/false", "/no/python"])
def test_no_helper_can_start(executable: str, renderer: Renderer, monkeypatch: pytest.MonkeyPatch) -> None:
    preparer = Preparer(Config(max_length=60), renderer)
    wanted = _told([preparer.run(job) for job in _jobs()])
    monkeypatch.setattr(sys, "executable", executable)
    with Crew(preparer, num_bytes=1 << 30) as crew:
        for helper in crew._helpers:
            helper._process.wait()
        assert _told(list(crew.prepare(_jobs()))) == wanted


def test_renderer_that_cannot_be_sent(qwen_tokenizer: Any) -> None:
    renderer = build_renderer(qwen_tokenizer, [151645], template_kwargs={"x": lambda: 1})
    preparer = Preparer(Config(max_length=60), renderer)
    with Crew(preparer, num_bytes=1 << 30) as crew:
        _wait_for_start(crew)
        assert all(helper._is_dead for helper in crew._helpers)
        assert _told(list(crew.prepare(_jobs()))) == _told([preparer.run(job) for job in _jobs()])


class Loud(Preparer):
    """Prints between the answers, as a tokenizer's own code may do."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Loud, super().__reduce__()[1]

    def run(self, job: Job) -> Done:
        sys.stdout.write("Loading...\n" * 100)
        sys.stdout.flush()
        os.write(1, b"more\n")
        return super().run(job)


def test_what_a_helper_prints_is_no_answer(renderer: Renderer) -> None:
    preparer = Preparer(Config(max_length=60), renderer)
    with Crew(Loud(Config(max_length=60), renderer), num_bytes=1 << 30) as crew:
        _wait_for_start(crew)
        assert _told(list(crew.prepare(_jobs()))) == _told([preparer.run(job) for job in _jobs()])
        assert not any(helper._is_dead for helper in crew._helpers)


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads /proc")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_helpers_end_with_their_process(how: signal.Signals, tmp_path: Path) -> None:
    """Killed, it leaves nobody behind; Ctrl-C goes to the whole group and ends all, without a word from a helper."""
    program = textwrap.dedent("""
        import signal, sys, time
        from truetune.data import crew
        # In the background of a script Ctrl-C is ignored, by what is started there, too.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        crew._num_cores = lambda: 3
        with crew.Crew(None, num_bytes=1 << 30) as some:
            for helper in some._helpers:
                helper._start.result()
            print(*[helper._process.pid for helper in some._helpers], flush=True)
            time.sleep(60)
    """)
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0
    )
    assert process.stdout is not None
    pids = [int(word) for word in process.stdout.readline().split()]
    assert len(pids) == 2
    assert all(map(_is_alive, pids))
    time.sleep(0.5)
    os.kill(process.pid, how) if how == signal.SIGKILL else os.killpg(process.pid, how)
    _, errors = process.communicate(timeout=20)
    end = time.monotonic() + 20
    while any(map(_is_alive, pids)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(map(_is_alive, pids))
    assert errors.count("Traceback") == (how == signal.SIGINT)
