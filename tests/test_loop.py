"""The loop: order, learning rate, accumulation, the guard against numbers that are not finite."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from truetune.engine.objective import Imitation
from truetune.engine.step import Engine
from truetune.errors import MachineError, NumericsError
from truetune.loop import Loop, Plan
from truetune.model import Base, add_lora, load_base
from truetune.records import Pair, Row

ROWS = [Row(n, f"data.json:{n}", (Pair((5, 6, 7 + n), (*tuple(range(20, 22 + n % 5)), 2)),)) for n in range(10)]


def make_loop(folder: Path, *, num_steps: int = 3, dropout: float = 0.0, seed: int = 1, **engine: Any) -> Loop:
    """A loop over the tiny model, LoRA's B away from zero so that every gradient is alive from the first step."""
    model = load_base(Base(str(folder), folder, ""), "float32")
    model = add_lora(model, r=4, alpha=8, dropout=dropout, targets=["all-linear"], seed=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    plan = Plan(num_steps, 4, seed, 1.0, 2, 2)
    engine = Engine(model, **{"kind": "trie", "pad_id": 0, "max_tokens": 1000, **engine})
    return Loop(engine, optimizer, scheduler, plan, lambda loss: loss.backward())


def adapter_of(loop: Loop) -> dict[str, torch.Tensor]:
    """The trainable weights, copied."""
    return {name: p.detach().clone() for name, p in loop.engine.model.named_parameters() if p.requires_grad}


def test_events_have_the_contract_fields(tiny_base: Path) -> None:
    """One step event a step, an evaluation before step 1 and at the end, saves where they are due."""
    saved: list[int] = []
    losses = iter([3.0, 2.0, 1.0, 0.5])
    events = list(make_loop(tiny_base).run(ROWS, evaluate=lambda: next(losses), save=saved.append))
    assert [(event["kind"], event["step"]) for event in events] == [
        *[("eval", 0), ("step", 1), ("step", 2), ("eval", 2), ("step", 3), ("eval", 3)]
    ]
    assert saved == [2, 3]
    fields = "step loss learning_rate grad_norm rows pairs learned_tokens trie_tokens seconds memory_bytes"
    for event in events:
        if event["kind"] == "step":
            assert {*fields.split(), "cpu_percent", "gpu_percent", "epoch"} <= set(event)
        else:
            assert "loss" not in event
    assert events[1]["rows"] == 4
    assert events[4]["rows"] == 2


@pytest.mark.parametrize("max_tokens", [1, 12, 30])
def test_split_into_forwards_does_not_change_the_step(tiny_base: Path, max_tokens: int) -> None:
    """Loss and grad norm are those of one forward (E3): the divisor is the step's learned tokens."""
    whole, split = make_loop(tiny_base), make_loop(tiny_base, max_tokens=max_tokens)
    pairs = list(zip(whole.run(ROWS), split.run(ROWS), strict=True))
    assert len(pairs) == 3
    for one, other in pairs:
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)


def test_same_seed_same_bits(tiny_base: Path) -> None:
    """Two runs with one seed are bit-equal, dropout on; with another seed they are not (E14)."""
    runs = {}
    for name, seed in (("first", 1), ("again", 1), ("other", 2)):
        loop = make_loop(tiny_base, dropout=0.3, seed=seed)
        losses = [event["loss"] for event in loop.run(ROWS)]
        runs[name] = (losses, adapter_of(loop))
    assert runs["first"][0] == runs["again"][0] != runs["other"][0]
    assert all(torch.equal(tensor, runs["again"][1][name]) for name, tensor in runs["first"][1].items())


def test_evaluation_does_not_disturb_training(tiny_base: Path) -> None:
    """With dropout on, drawing random numbers in an evaluation changes nothing (E10)."""
    plain, disturbed = make_loop(tiny_base, dropout=0.3), make_loop(tiny_base, dropout=0.3)
    losses = [event["loss"] for event in plain.run(ROWS)]
    events = disturbed.run(ROWS, evaluate=lambda: float(torch.rand(3).sum()))
    assert [event["loss"] for event in events if event["kind"] == "step"] == losses


def test_every_adapter_weight_moves_and_no_other(tiny_base: Path) -> None:
    """After two steps each A and each B has moved, and no base weight has (E7, E9)."""
    loop = make_loop(tiny_base, num_steps=2)
    before = {name: parameter.detach().clone() for name, parameter in loop.engine.model.named_parameters()}
    list(loop.run(ROWS))
    moved = {name for name, p in loop.engine.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "lora_" in name}
    assert len(moved) == 2 * 2 * 7


def test_tries_are_built_aside_by_one_core(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else that thread's workers put those of the steps to sleep (cores.py)."""
    loop, own, right = make_loop(tiny_base), torch.get_num_threads(), Imitation.forwards
    torch.set_num_threads(2)
    seen: list[tuple[bool, int]] = []

    def forwards(self: Imitation, *args: Any, **kwargs: Any) -> Any:
        seen.append((threading.current_thread() is threading.main_thread(), torch.get_num_threads()))
        return right(self, *args, **kwargs)

    monkeypatch.setattr(Imitation, "forwards", forwards)
    threads = [torch.get_num_threads() for _ in loop.run(ROWS)]
    torch.set_num_threads(own)
    assert seen == [(False, 1)] * 3
    assert threads == [2] * 3


def test_nan_stops_before_the_optimizer_moves(tiny_base: Path) -> None:
    """The error names step and rows; the weights are those of the step before."""
    good, bad = make_loop(tiny_base, num_steps=1), make_loop(tiny_base)
    list(good.run(ROWS))
    with pytest.raises(NumericsError) as caught:
        list(poison_steps(bad, {2}))
    assert caught.value.exit_code == 4
    assert caught.value.where == "step 2"
    assert "data.json:" in caught.value.values["rows"]
    assert all(torch.equal(tensor, adapter_of(bad)[name]) for name, tensor in adapter_of(good).items())


def test_bad_steps_may_be_skipped(tiny_base: Path) -> None:
    """Weights and moments are as before it, the learning rate goes on, and the rows are told; one more is too many."""
    loop = make_loop(tiny_base)
    loop.scheduler = torch.optim.lr_scheduler.LambdaLR(loop.optimizer, lambda step: 1 / (1 + step))
    loop.plan = replace(loop.plan, max_skipped=1)
    kinds, weights = [], []
    for event in poison_steps(loop, {2}):
        kinds.append((event["kind"], event["step"]))
        weights.append(adapter_of(loop))
        if event["kind"] == "skipped":
            assert (len(event["row_ids"]), event["grad_norm"]) == (4, "nan")
        if event["kind"] == "step":
            assert event["learning_rate"] == pytest.approx(1e-2 / event["step"], rel=1e-12)
    assert kinds == [("step", 1), ("skipped", 2), ("step", 3)]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    assert not all(torch.equal(tensor, weights[2][name]) for name, tensor in weights[0].items())
    assert all(torch.isfinite(tensor).all() for tensor in weights[2].values())
    again = make_loop(tiny_base)
    again.plan = replace(again.plan, max_skipped=1)
    with pytest.raises(NumericsError) as caught:
        list(poison_steps(again, {1, 3}))
    assert caught.value.where == "step 3"
    assert again.num_skipped == 1


def poison_steps(loop: Loop, steps: set[int]) -> Iterator[Any]:
    """Run a loop with NaN in the gradients of some steps."""
    calls = itertools.count(1)

    def backward(loss: torch.Tensor) -> None:
        loss.backward()
        if next(calls) in steps:
            next(p for p in loop.engine.model.parameters() if p.requires_grad).grad[0, 0] = float("nan")

    loop.backward = backward
    return loop.run(ROWS)


def test_held_out_loss_that_is_not_finite_stops(tiny_base: Path) -> None:
    """Not a traceback from the JSON writer: exit 4, with the step."""
    with pytest.raises(NumericsError) as caught:
        list(make_loop(tiny_base).run(ROWS, evaluate=lambda: float("nan")))
    assert (caught.value.key, caught.value.where, caught.value.exit_code) == ("held_out_not_finite", "step 0", 4)


def test_stop_comes_after_evaluation_and_save(tiny_base: Path) -> None:
    """A step that is asked to be the last is evaluated and saved as in an uninterrupted run."""
    saved: list[int] = []
    asked = iter([False, True])
    loop = make_loop(tiny_base)
    events = list(loop.run(ROWS, evaluate=lambda: 1.0, save=saved.append, should_stop=lambda: next(asked)))
    assert [(event["kind"], event["step"]) for event in events] == [("eval", 0), ("step", 1), ("step", 2), ("eval", 2)]
    assert saved == [2]


def test_a_signal_while_saving_is_heard_after_it(tiny_base: Path) -> None:
    """The save is done once, and no further step is taken (F5)."""
    saved: list[int] = []
    loop = make_loop(tiny_base)
    events = list(loop.run(ROWS, save=saved.append, should_stop=lambda: bool(saved)))
    assert [event["step"] for event in events] == [1, 2]
    assert saved == [2]


def test_saves_where_it_is_worth_it(tiny_base: Path) -> None:
    saved: list[int] = []
    list(make_loop(tiny_base).run(ROWS, save=saved.append, should_save=lambda: not saved))
    assert saved == [1, 2, 3]


OUT_OF_MEMORY = (
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"),
    MemoryError(),
)


def out_of_memory_once(loop: Loop, at: int, error: Exception) -> None:
    """Let the `at`-th backward fail as a GPU does, or a system whose memory is limited."""
    calls = itertools.count(1)

    def backward(loss: torch.Tensor) -> None:
        if next(calls) == at:
            raise error
        loss.backward()

    loop.backward = backward


@pytest.mark.parametrize(("at", "error"), [*zip([1, 2, 4], OUT_OF_MEMORY, strict=True)])
def test_out_of_memory_halves_the_forward_and_repeats_the_step(at: int, error: Exception, tiny_base: Path) -> None:
    """Whether the first forward of a step fails or a later one: the same step, with an event, and none after it."""
    whole, halved = make_loop(tiny_base, max_tokens=12), make_loop(tiny_base, max_tokens=12)
    wanted = list(whole.run(ROWS))
    out_of_memory_once(halved, at, error)
    events = list(halved.run(ROWS))
    notices = [event for event in events if event["kind"] == "memory"]
    assert len(notices) == 1
    assert notices[0]["max_tokens"] == halved.engine.max_tokens < 12
    steps = [event for event in events if event["kind"] == "step"]
    assert len(steps) == 3
    for one, other in zip(steps, wanted, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


def test_out_of_memory_for_one_pair_ends_the_run(tiny_base: Path) -> None:
    """Nothing is left to halve: exit 3, with the step."""
    loop = make_loop(tiny_base)

    def backward(loss: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    loop.backward = backward
    with pytest.raises(MachineError) as caught:
        list(loop.run(ROWS))
    assert (caught.value.where, caught.value.exit_code) == ("step 1", 3)
