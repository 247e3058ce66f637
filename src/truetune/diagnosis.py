"""What the numbers of a report card mean: did it learn, overfit, forget, does it stop, does it repeat itself.

Pure functions; each finding is a key of the catalogue ("card.NAME") with its numbers. Thresholds are ours; what they
were seen on is in docs/decisions/.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from truetune.card import Card, Preferred

NO_CHANGE_SHARE = 0.02
"""A loss that moved by less than this share of itself has not changed."""

FEW_STEPS, KNOWN_LOSS = 20, 0.1
LOW_RATES = {"lora": 5e-5, "full": 5e-7}
RISE_SHARE = 0.05
"""The last held-out loss is that much above the lowest: it is memorising."""

GAP_SHARE = 0.5
"""The loss of trained rows is below this share of the held-out rows' loss: it is memorising."""

GAINED_SHARE, LEAST_MARGIN = 0.5, 0.05
"""Rows in which the chosen answer has to gain on the rejected one, and nats in the mean: below, it is rounding."""

STOP_SHARE, REPEAT_SHARE = 0.5, 0.3
FORGOT_NATS = 1.0
"""The base's own answers lost this much a token: each is e times less likely."""


@dataclass(frozen=True)
class Finding:
    """Something to say of a run. `is_good`: nothing to do about it."""

    name: str
    values: dict[str, Any]
    is_good: bool = False


def diagnose(card: Card) -> list[Finding]:
    """Return what there is to say of a run: first of all whether it learned, then what is wrong."""
    change = _change(card) if card.preferred is None else _preference(card.preferred)
    return [change, *_overfitting(card), *_talking(card), *_forgetting(card)]


def _change(card: Card) -> Finding:
    """Return whether the loss moved, and if not, why."""
    before, after = card.base.answer_loss, card.tuned.answer_loss
    values = {"before": before, "after": after}
    if after > before * (1 + NO_CHANGE_SHARE):
        return Finding("worse", values)
    if after < before * (1 - NO_CHANGE_SHARE):
        return Finding("learned" if card.is_held_out else "learned_trained", values, is_good=True)
    if before < KNOWN_LOSS:
        return Finding("no_change_known", values)
    if card.learning_rate < LOW_RATES[card.finetuning]:
        is_full = card.finetuning == "full"
        return Finding("no_change_rate_full" if is_full else "no_change_rate", values | {"rate": card.learning_rate})
    if card.num_steps < FEW_STEPS:
        return Finding("no_change_steps", values | {"steps": card.num_steps})
    return Finding("no_change", values)


def _preference(preferred: Preferred) -> Finding:
    """Return whether chosen answers gained on rejected ones; that their own loss may rise meanwhile is no fault."""
    values = {
        "before": preferred.base_likelier,
        "after": preferred.tuned_likelier,
        "gained": preferred.gained,
        "margin": preferred.margin,
    }
    is_learned = preferred.gained > GAINED_SHARE and preferred.margin > LEAST_MARGIN
    return Finding("preferred" if is_learned else "not_preferred", values, is_good=is_learned)


def _overfitting(card: Card) -> Iterator[Finding]:
    after = [(loss, step) for step, loss in card.held_out_losses if step > 0]
    if after:
        (lowest, step), (last, _) = min(after), after[-1]
        if last > lowest * (1 + RISE_SHARE):
            yield Finding("overfit_rising", {"lowest": lowest, "step": step, "last": last})
            return
    if (
        card.preferred is None
        and card.trained is not None
        and card.trained.answer_loss < GAP_SHARE * card.tuned.answer_loss
    ):
        losses = {"trained": card.trained.answer_loss, "held_out": card.tuned.answer_loss}
        yield Finding("overfit_gap", losses)


def _talking(card: Card) -> Iterator[Finding]:
    talk = card.talk
    if talk.num_answers and talk.tuned_ended < STOP_SHARE:
        yield Finding("never_stops", {"share": talk.tuned_ended, "likely": card.tuned.stop_accuracy})
    if talk.tuned_repeated > REPEAT_SHARE:
        yield Finding("repeats", {"share": talk.tuned_repeated, "base": talk.base_repeated})


def _forgetting(card: Card) -> Iterator[Finding]:
    lost = card.forgetting.after - card.forgetting.before
    if lost > FORGOT_NATS:
        yield Finding("forgot", {"times": math.exp(min(lost, 50)), "questions": card.forgetting.num_questions})
