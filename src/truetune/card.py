"""The report card's numbers: base against tuned, on rows that were not trained, from the weights of the result.

Everything here is measured at the end of a run, in about one percent of its time; report.py shows it.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from truetune.data.template import Renderer
from truetune.engine.score import Score, score
from truetune.engine.step import Engine, evaluating
from truetune.evaluate import STEP_COST, Metrics, measure, rate, row_losses
from truetune.forgetting import Forgetting, check_forgetting, language_of
from truetune.generate import Reply, Sampling, base_only, both_replies
from truetune.records import Row, pairs_of
from truetune.samples import prompt_of

MAX_SHARE = 0.01
"""The card takes about this share of a run's time, but for the shortest ones."""

MIN_ROWS = 32
"""Rows that are compared even in the shortest run, if there are as many."""

NUM_EACH = 2
"""Answers of each kind that are shown: best, worst, random."""

ROOM_TOKENS, MIN_NEW_TOKENS, MAX_NEW_TOKENS = 16, 48, 160
"""An answer may be so much longer than the one it should be like, and is cut between these."""

REPEAT_TOKENS = 4
"""Tokens in a row that count as repeated when they come again."""


@dataclass(frozen=True)
class Answer:
    """A row's prompt, and what base and tuned model answer. Losses: of the row's own answer, nats a token.

    `kind`: why it is shown: the loss fell most, least, or it was drawn.
    """

    kind: Literal["best", "worst", "random"]
    where: str
    prompt: str
    expected: str
    base: str
    tuned: str
    base_loss: float
    tuned_loss: float
    is_ended: bool


@dataclass(frozen=True)
class Talk:
    """How answers go: shares of them that end by themselves, and of their token runs that only repeat."""

    num_answers: int
    base_ended: float
    tuned_ended: float
    base_repeated: float
    tuned_repeated: float
    num_equal: int


@dataclass(frozen=True)
class Preferred:
    """What became of the rows' chosen answers beside the rejected ones; shares of rows.

    `base_likelier`, `tuned_likelier`: the chosen answer as a whole is the likelier one. `gained`: the tuned model has
    it ahead by more than the base has; `margin`: by how much in the mean, in nats an answer.
    """

    base_likelier: float
    tuned_likelier: float
    gained: float
    margin: float


@dataclass(frozen=True)
class Card:
    """All that the report card says. `is_held_out`: False if no rows were held out, so that trained ones are shown.

    `trained`: the tuned model on trained rows. `step`: whose weights the result holds. `losses`: (step, loss) of all;
    `held_out_losses`: (step, loss) of its evaluations. `overhead_share`: of the run's time that was not training.
    `preferred`: only of a preference loss.
    """

    name: str
    model: str
    data: list[str]
    num_rows: int
    num_epochs: float
    num_learned_tokens: int
    num_steps: int
    step: int
    learning_rate: float
    is_held_out: bool
    base: Metrics
    tuned: Metrics
    trained: Metrics | None
    answers: list[Answer]
    talk: Talk
    forgetting: Forgetting
    losses: list[tuple[int, float]]
    held_out_losses: list[tuple[int, float]]
    train_seconds: float
    overhead_share: float
    finetuning: str = "lora"
    preferred: Preferred | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values, for report.json."""
        sides = {"base": self.base, "tuned": self.tuned, "trained": self.trained}
        return asdict(self) | {name: side and side.to_dict() for name, side in sides.items()}


@dataclass(frozen=True)
class Subject:
    """What a card is about: a run's name, model, data, events, and the step whose weights are its result.

    `finetuning`: lora or full. `is_compared`: its loss compares chosen with rejected answers. `num_rows`: how many
    rows there were to train on, where only some of them are kept.
    """

    name: str
    model: str
    data: list[str]
    events: Sequence[dict[str, Any]]
    step: int
    seed: int
    finetuning: str = "lora"
    is_compared: bool = False
    num_rows: int | None = None


def make_card(
    engine: Engine, renderer: Renderer, *, subject: Subject, trained: Sequence[Row], held_out: Sequence[Row]
) -> Card:
    """Measure the engine's model against its base. `held_out`: may be empty; then trained rows are shown."""
    began = time.perf_counter()
    steps = [event for event in subject.events if event["kind"] == "step"]
    num_trained_rows = sum(event["rows"] for event in steps)
    num_compared = max(int(MAX_SHARE * STEP_COST * num_trained_rows / 3), MIN_ROWS)
    rows = list((held_out if len(held_out) else trained)[:num_compared])
    with base_only(engine.model):
        base = score(engine, pairs_of(rows))
        base_rejected = _rejected(engine, rows, subject)
    tuned = score(engine, pairs_of(rows))
    preferred = _preferred([(base, base_rejected), (tuned, _rejected(engine, rows, subject))])
    losses = [row_losses(rows, scores) for scores in (base, tuned)]
    answers, talk = _answers(engine, renderer, rows=rows, losses=losses, seed=subject.seed)
    lang = language_of(row.answer for row in rows)
    trained_metrics = measure(engine, list(trained[: len(rows)])) if len(held_out) else None
    forgetting = check_forgetting(engine, renderer, lang=lang)
    train_seconds, overhead_share = _times(subject.events, card_seconds=time.perf_counter() - began)
    return Card(
        name=subject.name,
        model=subject.model,
        data=subject.data,
        num_rows=len(trained) if subject.num_rows is None else subject.num_rows,
        num_epochs=steps[-1]["epoch"] if subject.num_rows is None else num_trained_rows / subject.num_rows,
        num_learned_tokens=sum(event["learned_tokens"] for event in steps),
        num_steps=steps[-1]["step"],
        step=subject.step,
        learning_rate=max(event["learning_rate"] for event in steps),
        is_held_out=len(held_out) > 0,
        base=rate(rows, base),
        tuned=rate(rows, tuned),
        trained=trained_metrics,
        answers=answers,
        talk=talk,
        forgetting=forgetting,
        losses=[(event["step"], event["loss"]) for event in steps],
        held_out_losses=[(event["step"], event["eval_loss"]) for event in subject.events if event["kind"] == "eval"],
        train_seconds=train_seconds,
        overhead_share=overhead_share,
        finetuning=subject.finetuning,
        preferred=preferred,
    )


def _rejected(engine: Engine, rows: Sequence[Row], subject: Subject) -> list[Score]:
    """Return the score of each row's rejected answer, if the run was about them."""
    return score(engine, [row.rejected[0] for row in rows]) if subject.is_compared else []


def _preferred(sides: Sequence[tuple[Sequence[Score], Sequence[Score]]]) -> Preferred | None:
    """Return what base and tuned model, each with (chosen, rejected), make of both answers; None if there are none."""
    if not sides[0][1]:
        return None
    base, tuned = (
        np.array([two.losses_A.sum() - one.losses_A.sum() for one, two in zip(chosen, rejected, strict=True)])
        for chosen, rejected in sides
    )
    gains = tuned - base
    return Preferred(_mean(base > 0), _mean(tuned > 0), _mean(gains > 0), _mean(gains))


def _times(events: Sequence[dict[str, Any]], *, card_seconds: float) -> tuple[float, float]:
    """Return the seconds of the steps, and the share of the rest (evaluations, samples, this card) in all."""
    train = sum(event["seconds"] for event in events if event["kind"] == "step")
    rest = card_seconds + sum(event["seconds"] for event in events if event["kind"] in ("eval", "sample"))
    return train, rest / (train + rest)


def _answers(
    engine: Engine, renderer: Renderer, *, rows: Sequence[Row], losses: Sequence[Sequence[float]], seed: int
) -> tuple[list[Answer], Talk]:
    """Let base and tuned model answer the prompts of some rows."""
    chosen = _choose(rows, gains=[before - after for before, after in zip(*losses, strict=True)], seed=seed)
    prompts = [prompt_of(rows[number]) for number, _ in chosen]
    longest = max((len(rows[number].pairs[-1].answer_ids) for number, _ in chosen), default=0)
    sampling = Sampling(min(max(longest + ROOM_TOKENS, MIN_NEW_TOKENS), MAX_NEW_TOKENS))
    with evaluating(engine.model):
        sides = both_replies(engine.model, renderer, prompts=[p.ids for p in prompts], sampling=sampling)
    answers = [
        Answer(
            kind,
            rows[number].where,
            prompt.text,
            rows[number].answer,
            base.text,
            tuned.text,
            losses[0][number],
            losses[1][number],
            tuned.is_ended,
        )
        for (number, kind), prompt, base, tuned in zip(chosen, prompts, *sides, strict=True)
    ]
    return answers, _talk(*sides)


def _choose(
    rows: Sequence[Row], *, gains: Sequence[float], seed: int
) -> list[tuple[int, Literal["best", "worst", "random"]]]:
    """Return (row, kind) of the rows to show: most gained, least gained, and drawn from the others."""
    order = sorted((n for n, row in enumerate(rows) if row.prompt), key=lambda number: -gains[number])
    best, rest = order[:NUM_EACH], order[NUM_EACH:]
    worst, rest = rest[max(len(rest) - NUM_EACH, 0) :][::-1], rest[:-NUM_EACH]
    drawn = random.Random(seed).sample(rest, min(NUM_EACH, len(rest)))
    return [(n, "best") for n in best] + [(n, "worst") for n in worst] + [(n, "random") for n in drawn]


def _talk(base: Sequence[Reply], tuned: Sequence[Reply]) -> Talk:
    return Talk(
        num_answers=len(base),
        base_ended=_mean(reply.is_ended for reply in base),
        tuned_ended=_mean(reply.is_ended for reply in tuned),
        base_repeated=_mean(map(_repeated, base)),
        tuned_repeated=_mean(map(_repeated, tuned)),
        num_equal=sum(one.text == other.text for one, other in zip(base, tuned, strict=True)),
    )


def _mean(values: Iterable[float]) -> float:
    return statistics.fmean(found) if (found := list(values)) else 0.0


def _repeated(reply: Reply) -> float:
    """Return the share of an answer's token runs that it holds already further up.

    >>> _repeated(Reply("", (1, 2, 3, 4, 5, 6), True)), _repeated(Reply("", (7,) * 13, False))
    (0.0, 0.9)
    """
    ids = reply.token_ids
    runs = [ids[start : start + REPEAT_TOKENS] for start in range(len(ids) - REPEAT_TOKENS + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0
