"""The queue and the thread: bounded, fair, cancelled at once, and alive after a forward that fails."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from truetune.model import find_base, load_base
from truetune.serve import worker as worker_module
from truetune.serve.sampler import Draw
from truetune.serve.worker import Full, Job, Piece, Worker
from truetune.use import find_voices, load_voices


class Inbox:
    """Where the pieces of a job arrive."""

    def __init__(self, tokenizer: Any, prompt: list[int], *, adapter: str | None = None, **more: Any) -> None:
        self.queue: queue.Queue[Piece] = queue.Queue()
        values: dict[str, Any] = {"max_tokens": 5, "draw": Draw(), "stop_ids": frozenset(), "stops": ()}
        self.job = Job(
            adapter=adapter, prompt_ids=prompt, tokenizer=tokenizer, emit=self.queue.put, **{**values, **more}
        )

    @property
    def row(self) -> Any:
        return self._row

    def all(self) -> list[Piece]:
        """Every piece, to the last one."""
        pieces = [self.queue.get(timeout=30)]
        self._row = self.job.row
        while pieces[-1].finish is None and pieces[-1].problem is None:
            pieces.append(self.queue.get(timeout=30))
        return pieces

    def text(self) -> str:
        return "".join(piece.text for piece in self.all())


@pytest.fixture(scope="module")
def tiny(tiny_qwen: Path) -> Any:
    return load_base(find_base(str(tiny_qwen)), "float32").eval()


def make(model: Any, **limits: Any) -> Worker:
    values: dict[str, Any] = {"max_rows": 4, "max_waiting": 8, "max_cached_tokens": 100_000}
    return Worker(model, select=lambda _: None, **{**values, **limits})


@pytest.fixture
def worker(tiny: Any) -> Iterator[Worker]:
    made = make(tiny)
    made.start()
    yield made
    made.close("over")


def test_jobs_wait_for_rows_and_all_are_done(worker: Worker, qwen_tokenizer: Any) -> None:
    boxes = [Inbox(qwen_tokenizer, [n + 1, 2, 3]) for n in range(8)]
    worker.submit([box.job for box in boxes])
    texts = [box.text() for box in boxes]
    again = Inbox(qwen_tokenizer, [4, 2, 3])
    worker.submit([again.job])
    pieces = again.all()
    assert "".join(piece.text for piece in pieces) == texts[3]
    assert [piece.num_tokens for piece in pieces] == [1, 2, 3, 4, 5]
    assert pieces[-1].finish == "length"
    assert worker.counts["answer_tokens"] == 45
    assert (worker.num_running, worker.num_waiting) == (0, 0)


def test_the_queue_is_bounded_all_or_nothing(tiny: Any, qwen_tokenizer: Any) -> None:
    worker = make(tiny)  # not started
    boxes = [Inbox(qwen_tokenizer, [1, 2]) for _ in range(10)]
    worker.submit([box.job for box in boxes[:6]])
    with pytest.raises(Full):
        worker.submit([box.job for box in boxes[6:]])
    worker.submit([boxes[6].job])
    assert worker.num_waiting == 7
    worker.start()
    assert all(box.all()[-1].finish == "length" for box in boxes[:7])
    worker.close("over")
    with pytest.raises(Full):
        worker.submit([boxes[9].job])


def test_a_stop_id_ends_and_is_not_shown(worker: Worker, qwen_tokenizer: Any) -> None:
    plain = Inbox(qwen_tokenizer, [5, 6], draw=Draw(temperature=1.0, seed=1))
    worker.submit([plain.job])
    plain.all()
    assert plain.row is not None
    ids = plain.row.ids[2:]
    at = next(n for n in range(1, 5) if ids[n] not in ids[:n])
    stopped = Inbox(qwen_tokenizer, [5, 6], draw=Draw(temperature=1.0, seed=1), stop_ids=frozenset([ids[at]]))
    worker.submit([stopped.job])
    pieces = stopped.all()
    assert "".join(piece.text for piece in pieces) == qwen_tokenizer.decode(ids[:at])
    assert (pieces[-1].finish, pieces[-1].num_tokens) == ("stop", at + 1)


def test_cancelled_jobs_leave_at_once(worker: Worker, qwen_tokenizer: Any) -> None:
    boxes = [Inbox(qwen_tokenizer, [1, n + 1], max_tokens=20_000) for n in range(6)]
    worker.submit([box.job for box in boxes])
    while worker.num_running < 4:
        time.sleep(0.001)
    assert worker.num_waiting == 2
    worker.cancel([box.job for box in boxes])
    began = time.perf_counter()
    while worker.num_running or worker.num_waiting:
        assert time.perf_counter() - began < 1
        time.sleep(0.001)
    assert worker.counts["cancelled"] == 6


def test_a_forward_that_fails_ends_its_answers_and_no_others(
    worker: Worker, qwen_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(worker_module.Batch, "step", fail)
        box = Inbox(qwen_tokenizer, [1, 2])
        worker.submit([box.job])
        assert box.all()[-1].problem == "RuntimeError: no memory"
    after = Inbox(qwen_tokenizer, [1, 2])
    worker.submit([after.job])
    assert after.all()[-1].finish == "length"
    assert worker.counts["failed_turns"] == 1


def test_closing_ends_what_is_not_done(tiny: Any, qwen_tokenizer: Any) -> None:
    worker = make(tiny)
    worker.start()
    boxes = [Inbox(qwen_tokenizer, [1, n + 1], max_tokens=20_000) for n in range(6)]
    worker.submit([box.job for box in boxes])
    boxes[0].queue.get(timeout=10)
    worker.close("over")
    assert {box.all()[-1].problem for box in boxes} == {"over"}


@pytest.mark.slow
def test_room_for_keys_is_bounded(tiny: Any, qwen_tokenizer: Any) -> None:
    """Rows that do not fit beside the others wait for them; one alone always runs."""
    worker = make(tiny, max_cached_tokens=600)
    most = 0
    boxes = [Inbox(qwen_tokenizer, [1, n + 1], max_tokens=240) for n in range(4)]
    worker.submit([box.job for box in boxes])
    worker.start()
    while worker.num_running or worker.num_waiting:
        most = max(most, worker.num_running)
        time.sleep(0.001)
    assert all(box.all()[-1].finish == "length" for box in boxes)
    assert 1 <= most <= 2
    large = Inbox(qwen_tokenizer, [1, 2], max_tokens=3)
    worker._max_cached_tokens = 1
    worker.submit([large.job])
    assert large.all()[-1].finish == "length"
    worker.close("over")


def test_adapters_and_base_at_once(tiny_runs: list[Path], qwen_tokenizer: Any) -> None:
    """Each answers as if it were alone, though their steps alternate."""
    from truetune.serve.running import Selector

    base, voices = find_voices([str(path) for path in tiny_runs])
    model = load_voices(base, voices).float()
    worker = Worker(model.get_base_model(), select=Selector(model), max_rows=8, max_waiting=20, max_cached_tokens=10**6)
    worker.start()

    def ask(adapter: str | None) -> Inbox:
        box = Inbox(qwen_tokenizer, [7, 8, 9], adapter=adapter, max_tokens=10)
        worker.submit([box.job])
        return box

    names = [voice.adapter for voice in voices]
    assert names == ["adapter_0", "adapter_1", None]
    alone = [ask(name).text() for name in names]
    boxes = [ask(name) for name in [*names, *reversed(names)]]
    assert [box.text() for box in boxes] == [*alone, *reversed(alone)]
    assert len(set(alone)) == 3
    worker.close("over")
