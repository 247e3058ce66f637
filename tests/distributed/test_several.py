"""Two and three ranks as threads of this process: a few steps, the same signal for all, evaluation dealt as well."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from several import apart
from worker import rows_of

from truetune.engine.compare import use_kind
from truetune.engine.step import Engine
from truetune.evaluate import loss_evaluator
from truetune.loop import Loop, Plan
from truetune.model import add_lora
from truetune.place import Place
from truetune.ranks import ALONE, Ranks

STEPS, TOLERANCE = 4, 1e-5


class Hall:
    """Where threads meet; one that does not come breaks it for all."""

    def __init__(self, size: int) -> None:
        self.size, self.values = size, {}
        self._barrier = threading.Barrier(size, timeout=20)

    def gather(self, rank: int, value: Any) -> list[Any]:
        """Return what every rank brought."""
        self.values[rank] = value
        self._barrier.wait()
        found = [self.values[number] for number in range(self.size)]
        self._barrier.wait()
        return found


@dataclass(frozen=True)
class Threaded(Ranks):
    """Ranks that meet in a hall, where real ones send."""

    hall: Hall = field(default_factory=lambda: Hall(1))

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter], numbers: Sequence[float]) -> list[float]:
        parts = [part for part in parameters if part.requires_grad]
        own = [torch.zeros_like(part) if part.grad is None else part.grad for part in parts]
        told = self.hall.gather(self.rank, (own, list(numbers)))
        for number, part in enumerate(parts):
            part.grad = sum(gradients[number] for gradients, _ in told)
        return [sum(column) for column in zip(*(numbers for _, numbers in told), strict=True)]

    def sum(self, numbers: Sequence[float]) -> list[float]:
        return [sum(column) for column in zip(*self.hall.gather(self.rank, list(numbers)), strict=True)]


ROWS = rows_of([[((1, 2, 3, *range(10, 10 + n % 4)), tuple(range(50, 52 + n % 3)))] for n in range(16)])


def load(folder: Path) -> Any:
    """The tiny model with LoRA; never in two threads at a time, since loading and seeding are the process's."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    return add_lora(model, r=4, alpha=8, dropout=0.0, targets=["all-linear"], seed=1).train()


def run(model: Any, ranks: Ranks, raised: Callable[[], int | None] = lambda: None) -> Any:
    """Events and adapter of a few steps."""
    trained = [part for part in model.parameters() if part.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, eps=1e-6)
    engine = use_kind(Engine(model, "trie", 0, 64))
    plan = Plan(STEPS, 4, 7, 1.0, 2, 100)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    loop = Loop(engine, optimizer, scheduler, plan, lambda loss: loss.backward(), ranks=ranks, raised=raised)
    evaluate = loss_evaluator(engine, ROWS[:5], ranks=ranks)
    events = list(loop.run(ROWS, evaluate=evaluate, should_stop=lambda: loop.signal is not None))
    return events, {name: part.detach() for name, part in model.named_parameters() if part.requires_grad}


def together(
    folder: Path, size: int, raised: Callable[[int], Callable[[], int | None]] = lambda _: lambda: None
) -> Any:
    """The same in so many threads."""
    hall = Hall(size)
    models = [load(folder) for _ in range(size)]
    with ThreadPoolExecutor(size) as pool:
        ranks = [Threaded(Place(rank, size), hall=hall) for rank in range(size)]
        futures = [pool.submit(run, models[one.rank], one, raised(one.rank)) for one in ranks]
        return [future.result() for future in futures]


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_equal_one_process(size: int, tiny_qwen: Path) -> None:
    """All events that are figures, on every rank; fewer tokens are computed by none than together by one."""
    alone = run(load(tiny_qwen), ALONE)
    found = together(tiny_qwen, size)
    assert len(found) == size
    for events, adapter in found:
        figures = apart((events, adapter), alone)
        assert all(value <= TOLERANCE for value in figures.values()), figures
        for one, other in zip(events, alone[0], strict=True):
            same = ("kind", "step", "row_ids", "learned_tokens", "trie_tokens", "rows", "pairs", "epoch")
            assert [one.get(name) for name in same] == [other.get(name) for name in same]
            assert one.get("computed_tokens", 0) >= other.get("computed_tokens", 0)
    weights = [adapter for _, adapter in found]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize(("rank", "number"), [(0, 15), (1, 2)])
def test_all_stop_after_the_same_step(rank: int, number: int, tiny_qwen: Path) -> None:
    """One of them got a signal in step 2."""

    def raised(own: int) -> Callable[[], int | None]:
        asked = iter([None] + [number] * 99) if own == rank else iter([None] * 100)
        return lambda: next(asked)

    found = together(tiny_qwen, 2, raised)
    steps = [[event["step"] for event in events if event["kind"] == "step"] for events, _ in found]
    assert steps == [[1, 2], [1, 2]]
