"""What the events say: the best step, when it is enough, and what goes wrong; the same for a run that was resumed."""

from __future__ import annotations

from typing import Any

import pytest

from truetune.watch import NUM_FLAT, Watch


def _step(step: int, loss: float) -> dict[str, Any]:
    return {"kind": "step", "step": step, "loss": loss}


def _eval(step: int, loss: float) -> dict[str, Any]:
    return {"kind": "eval", "step": step, "eval_loss": loss}


def _see(watch: Watch, events: list[dict[str, Any]]) -> list[tuple[int, str]]:
    return [(found["step"], found["name"]) for event in events for found in watch.see(event)]


RISING = [_eval(0, 0.1), _eval(2, 3.0), _eval(4, 2.0), _eval(6, 2.5), _eval(8, 2.4), _eval(10, 2.6)]


def test_the_best_step_is_the_lowest_after_the_base() -> None:
    watch = Watch(keeps_best=True)
    wanted = [False, True, True, False, True, False]  # 8: the finding
    for event, wants_save in zip(RISING, wanted, strict=True):
        _see(watch, [event])
        assert watch.wants_save == wants_save, event
        watch.saved()
    assert (watch.best_step, watch.best_loss, watch.is_over) == (4, 2.0, False)


def test_rising_is_said_once() -> None:
    assert _see(Watch(), RISING) == [(8, "eval_rising")]
    assert not Watch(keeps_best=False).wants_save


@pytest.mark.parametrize(("patience", "over_at"), [(1, 6), (2, 8), (3, 10), (4, None)])
def test_patience(patience: int, over_at: int | None) -> None:
    watch = Watch(patience=patience)
    over = []
    for event in RISING:
        _see(watch, [event])
        over += [event["step"]] if watch.is_over else []
    assert (over or [None])[0] == over_at


def test_equal_is_not_better() -> None:
    watch = Watch(patience=2)
    _see(watch, [_eval(1, 2.0), _eval(2, 2.0), _eval(3, 2.0)])
    assert (watch.best_step, watch.is_over) == (1, True)


def test_zero_three_times_in_a_row() -> None:
    losses = [1.0, 0.0, 0.0, 0.5, 0.0, 0.0, 0.0, 0.0]
    assert _see(Watch(), [_step(n, loss) for n, loss in enumerate(losses, 1)]) == [(7, "loss_zero")]


@pytest.mark.parametrize(("last", "is_flat"), [(2.0, True), (1.99, True), (1.97, False), (5.0, True), (0.5, False)])
def test_a_loss_that_does_not_fall(last: float, is_flat: bool) -> None:
    losses = [2.0] * (NUM_FLAT - 10) + [last] * 10 + [1.0] * 50
    found = _see(Watch(), [_step(n, loss) for n, loss in enumerate(losses, 1)])
    assert found == ([(NUM_FLAT, "loss_flat")] if is_flat else [])


@pytest.mark.parametrize("at", range(12))
def test_a_resumed_run_sees_the_same(at: int) -> None:
    events = [event for n in range(6) for event in (_step(n, 0.0 if n > 1 else 1.0), RISING[n])]
    whole, resumed = Watch(patience=2, keeps_best=True), Watch(patience=2, keeps_best=True)
    found = [_see(whole, [event]) for event in events]
    resumed.replay(events[:at])
    assert not resumed.wants_save
    assert [_see(resumed, [event]) for event in events[at:]] == found[at:]
    assert (resumed.best_step, resumed.best_loss, resumed.is_over) == (whole.best_step, whole.best_loss, whole.is_over)


def test_other_events_say_nothing() -> None:
    watch = Watch()
    for kind in ("memory", "comparison", "state", "skipped", "finding"):
        assert list(watch.see({"kind": kind, "step": 3})) == []
