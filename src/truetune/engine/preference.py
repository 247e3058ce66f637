"""Preference losses: of two answers to one prompt, the chosen one is to become likelier than the rejected one.

The two answers of a row stay in one forward (answers.py draws it), so a step's loss is a sum over its forwards, however
it is split. The reference is the same weights with the adapter off, in the same forwards: before the first step both
are equal to the bit.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from torch.nn import functional as F

from truetune.engine.answers import Answers
from truetune.engine.deal import cut
from truetune.engine.objective import WHOLE, Share, Total
from truetune.engine.score import places_of
from truetune.engine.step import (
    ATTENTIONS,
    Engine,
    Forward,
    build_forward,
    evaluating,
    forward_losses,
    grouped,
    running,
)
from truetune.engine.trie import count_trie_tokens, num_common
from truetune.records import Pair, Row


@dataclass(frozen=True)
class Scales:
    """What the whole step is measured by: how many rows, answers and chosen tokens it has.

    `kl`: KTO's reference point, from answers to prompts that they are not of, `turned`; None: not asked for yet.
    """

    beta: float
    gamma: float
    num_rows: int
    num_answers: int
    num_chosen_tokens: int
    turned: Sequence[Pair] = ()
    kl: float | None = None


@dataclass(frozen=True)
class Sides:
    """Log-probabilities of the answers of a forward: of the model, and above the reference's. All fp32, [B]."""

    log_probs_B: torch.Tensor
    ratios_B: torch.Tensor
    lengths_B: torch.Tensor
    is_liked_B: torch.Tensor

    def chosen(self, values_B: torch.Tensor) -> torch.Tensor:
        """Return the values of the chosen answers, row by row [R]."""
        return values_B[self.is_liked_B]

    def rejected(self, values_B: torch.Tensor) -> torch.Tensor:
        """Return those of the rejected ones [R]."""
        return values_B[~self.is_liked_B]

    def margins(self, values_B: torch.Tensor) -> torch.Tensor:
        """Return how far the chosen answer is above the rejected one [R]."""
        return self.chosen(values_B) - self.rejected(values_B)

    def means(self, values_B: torch.Tensor) -> torch.Tensor:
        """Return values a token."""
        return values_B / self.lengths_B


def _dpo(sides: Sides, scales: Scales) -> torch.Tensor:
    """-log sigmoid(beta (chosen ratio - rejected ratio)): Rafailov et al., arXiv:2305.18290, eq. 7."""
    return -F.logsigmoid(scales.beta * sides.margins(sides.ratios_B)).sum() / scales.num_rows


def _ipo(sides: Sides, scales: Scales) -> torch.Tensor:
    """(margin - 1 / (2 beta))², of ratios a token, as its authors told TRL: Azar et al., arXiv:2310.12036, eq. 17."""
    margins = sides.margins(sides.means(sides.ratios_B))
    return (margins - 1 / (2 * scales.beta)).square().sum() / scales.num_rows


def _simpo(sides: Sides, scales: Scales) -> torch.Tensor:
    """-log sigmoid(beta (mean chosen - mean rejected) - gamma): Meng et al., arXiv:2405.14734, eq. 6."""
    return (
        -F.logsigmoid(scales.beta * sides.margins(sides.means(sides.log_probs_B)) - scales.gamma).sum()
        / scales.num_rows
    )


def _orpo(sides: Sides, scales: Scales) -> torch.Tensor:
    """The chosen answer's loss a token, and beta times -log sigmoid(log odds ratio): Hong et al., arXiv:2403.07691.

    TRL 1.16 and the authors' code learn the prompt's tokens, too; the paper and this do not.
    """
    learned = -sides.chosen(sides.log_probs_B).sum() / scales.num_chosen_tokens
    # A model that is certain of every token has infinite odds.
    means_B = sides.means(sides.log_probs_B).clamp(max=-1e-7)
    log_odds_B = means_B - _log_of_rest(means_B)
    return learned - scales.beta * F.logsigmoid(sides.margins(log_odds_B)).sum() / scales.num_rows


def _kto(sides: Sides, scales: Scales) -> torch.Tensor:
    """1 - sigmoid(beta (ratio - kl)) of a liked answer, of the others with the sign turned: arXiv:2402.01306, eq. 7."""
    signs_B = torch.where(sides.is_liked_B, 1.0, -1.0)
    return torch.sigmoid(-scales.beta * signs_B * (sides.ratios_B - (scales.kl or 0.0))).sum() / scales.num_answers


def _log_of_rest(log_probs: torch.Tensor) -> torch.Tensor:
    """Return log(1 - e^x), in the way that keeps its digits on either side of -log 2."""
    is_small = log_probs < -0.6931471805599453
    # Each side gets values that it can do: what torch.where does not take still has a gradient, NaN times 0.
    small = torch.log1p(-torch.exp(torch.where(is_small, log_probs, torch.full_like(log_probs, -1.0))))
    large = torch.log(-torch.expm1(torch.where(is_small, torch.full_like(log_probs, -0.5), log_probs)))
    return torch.where(is_small, small, large)


@dataclass(frozen=True)
class Kind:
    """A loss: its share that a forward adds to a step, and what it needs beside the model's own log-probabilities."""

    share: Callable[[Sides, Scales], torch.Tensor]
    has_reference: bool
    has_kl: bool = False


KINDS: dict[str, Kind] = {
    "dpo": Kind(_dpo, has_reference=True),
    "ipo": Kind(_ipo, has_reference=True),
    "orpo": Kind(_orpo, has_reference=False),
    "simpo": Kind(_simpo, has_reference=False),
    "kto": Kind(_kto, has_reference=True, has_kl=True),
}


@dataclass(frozen=True)
class Preference:
    """What is learned of preference rows (see step.Objective). `name`: of KINDS."""

    name: str
    beta: float
    gamma: float = 0.0

    def pairs(self, rows: Sequence[Row]) -> list[Pair]:
        """Return the pairs that are computed: both answers of every row."""
        return [pair for row in rows for pair in answers_of(row)]

    def least_tokens(self, row: Row) -> int:
        """Return the tokens of its answers, one behind the other: a trie of them has fewer, padded rows may have more.

        A prompt is read by both; that padding doubles it shows only where tries cannot run.
        """
        return sum(map(len, answers_of(row)))

    def forwards(self, engine: Engine, rows: Sequence[Row], *, share: Share = WHOLE) -> list[Forward]:
        """Return the forwards of a step, or of a share of it; a row's answers are in one."""
        units = [_Unit(answers_of(row), len(row.pairs)) for row in rows]
        is_trie = engine.kind in ATTENTIONS
        own = _dealt(units, share, is_trie=is_trie)
        groups = (_split_tries if is_trie else _split_padded)(own, engine.max_tokens)
        return [_forward(engine, group) for group in groups]

    def measure(self, rows: Sequence[Row]) -> Scales:
        """Return what a step of these rows is measured by."""
        liked = [pair for row in rows for pair in row.pairs]
        others = [pair for row in rows for pair in row.rejected]
        return Scales(
            self.beta,
            self.gamma,
            num_rows=len(liked),
            num_answers=len(liked) + len(others),
            num_chosen_tokens=sum(len(pair.answer_ids) for pair in liked),
            turned=_turned([*liked, *others]) if KINDS[self.name].has_kl else (),
        )

    def settle(self, engine: Engine, share: Share, *, total: Total) -> Share:
        """Return the share with KTO's reference point in its measure; each rank asks for a part of it."""
        if not KINDS[self.name].has_kl:
            return share
        ratios = _ratios(engine, share.measure.turned[share.rank :: share.num_ranks])
        ratio, count = total([float(np.sum(ratios)), len(ratios)])
        return replace(share, measure=replace(share.measure, kl=max(ratio / count, 0.0)))

    def aim(self, engine: Engine, forwards: Sequence[Forward], *, share: Share = WHOLE) -> _Step:
        """Return what the forwards of a step together are measured by.

        Raises: ValueError if the share was not measured, or KTO's not settled.
        """
        kind, scales = KINDS[self.name], share.measure
        if not isinstance(scales, Scales) or (kind.has_kl and scales.kl is None):
            raise ValueError("a preference loss is measured by the rows of the whole step")
        return _Step(kind, engine, forwards, scales)


@dataclass
class _Step:
    """One step of a preference loss (see step.Aim)."""

    kind: Kind
    engine: Engine
    forwards: Sequence[Forward]
    scales: Scales
    _rewards: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def share(self, number: int) -> torch.Tensor:
        forward, answers = self.forwards[number], _answers(self.forwards[number])
        reference_B = (
            _reference(self.engine, forward) if self.kind.has_reference else torch.zeros((), device=self.engine.device)
        )
        log_probs_B = answers.log_probs(forward_losses(self.engine, forward))
        sides = Sides(log_probs_B, log_probs_B - reference_B, answers.lengths_B, answers.is_liked_B)
        likings_B = sides.ratios_B if self.kind.has_reference else sides.means(log_probs_B)
        rewards_B = self.scales.beta * likings_B.detach()
        self._rewards.append((sides.chosen(rewards_B).cpu(), sides.rejected(rewards_B).cpu()))
        return self.kind.share(sides, self.scales)

    def told(self) -> dict[str, float]:
        """Return what TRL calls rewards/chosen, /rejected, /accuracies and /margins: beta times ratio, or mean."""
        none = torch.zeros(0)
        chosen, rejected = (torch.cat([none, *(both[n] for both in self._rewards)]).double() for n in range(2))
        rows = self.scales.num_rows
        return {
            "rewards_chosen": float(chosen.sum()) / rows,
            "rewards_rejected": float(rejected.sum()) / rows,
            # Before the first step all are equal: neither answer is preferred.
            "reward_accuracy": float(((chosen > rejected).double() + (chosen >= rejected)).sum()) / 2 / rows,
            "reward_margin": float((chosen - rejected).sum()) / rows,
        }


def _answers(forward: Forward) -> Answers:
    if forward.answers is None:
        raise ValueError("the forward is none of preference rows")
    return forward.answers


def answers_of(row: Row) -> tuple[Pair, ...]:
    """Return the answers of a row, the liked one first."""
    return (*row.pairs, *row.rejected)


@dataclass(frozen=True)
class _Unit:
    """A row as it is laid into forwards: answers, and how many of them are liked."""

    pairs: tuple[Pair, ...]
    num_liked: int

    def ids(self) -> tuple[int, ...]:
        """Return the tokens of its first answer and its prompt."""
        return self.pairs[0].prompt_ids + self.pairs[0].answer_ids

    @cached_property
    def num_nodes(self) -> int:
        """The tokens of its answers as a trie; counted once, asked for wherever rows are laid together."""
        return count_trie_tokens(self.pairs)

    @property
    def num_padded(self) -> int:
        """The tokens of its answers, padded to the longest."""
        return len(self.pairs) * (max(map(len, self.pairs)) - 1)

    def num_tokens(self, *, is_trie: bool) -> int:
        """Return the tokens that are computed for it alone."""
        return self.num_nodes if is_trie else self.num_padded


def _dealt(units: Sequence[_Unit], share: Share, *, is_trie: bool) -> Sequence[_Unit]:
    """Return a rank's part of the rows: evenly by tokens; of tries, rows that share prefixes together."""
    if share.num_ranks == 1:
        return units
    ordered = sorted(units, key=_Unit.ids if is_trie else lambda unit: unit.num_padded)
    whole = [unit.num_tokens(is_trie=is_trie) for unit in ordered]
    new = list(whole)
    if is_trie:
        pairs = itertools.pairwise(unit.ids() for unit in ordered)
        new[1:] = [size - num_common(a, b) for size, (a, b) in zip(whole[1:], pairs, strict=True)]
    return ordered[cut(new, whole, num_ranks=share.num_ranks)[share.rank]]


def _split_tries(units: Sequence[_Unit], max_tokens: int) -> list[list[_Unit]]:
    """Return rows for one trie each, of at most `max_tokens` nodes; rows that share prefixes stay together.

    A row larger than that has a trie of its own.
    """
    groups: list[list[_Unit]] = []
    previous: tuple[int, ...] = ()
    room = 0
    for unit in sorted(units, key=_Unit.ids):
        # Its other answers may share more with what is there; that they fit is all that is needed.
        num_new = unit.num_nodes - num_common(previous, unit.ids())
        if not groups or num_new > room:
            groups.append([])
            room, num_new = max_tokens, unit.num_nodes
        groups[-1].append(unit)
        room -= num_new
        previous = unit.ids()
    return groups


def _split_padded(units: Sequence[_Unit], max_tokens: int) -> list[list[_Unit]]:
    """Return rows for one padded forward each, of at most `max_tokens` with their padding; alike lengths together."""
    groups: list[list[_Unit]] = []
    for unit in sorted(units, key=lambda unit: max(map(len, unit.pairs))):
        num_pairs = sum(len(some.pairs) for some in [*(groups[-1] if groups else ()), unit])
        if not groups or num_pairs * (max(map(len, unit.pairs)) - 1) > max_tokens:
            groups.append([])
        groups[-1].append(unit)
    return groups


def _forward(engine: Engine, units: Sequence[_Unit]) -> Forward:
    """Return the forward of some rows."""
    pairs = [pair for unit in units for pair in unit.pairs]
    forward = build_forward(engine, pairs)
    places = list(places_of(forward, pairs))
    is_liked = [number < unit.num_liked for unit in units for number in range(len(unit.pairs))]
    answers = Answers(
        pairs,
        torch.tensor(is_liked, device=engine.device),
        torch.tensor([len(pair.answer_ids) for pair in pairs], device=engine.device),
        torch.from_numpy(np.concatenate(places)).to(engine.device),
        torch.arange(len(pairs)).repeat_interleave(torch.tensor([len(some) for some in places])).to(engine.device),
        max(unit.num_tokens(is_trie=engine.kind in ATTENTIONS) for unit in units),
    )
    return replace(forward, answers=answers)


@torch.no_grad()  # type: ignore[untyped-decorator]
def _reference(engine: Engine, forward: Forward) -> torch.Tensor:
    """Return the log-probabilities [B] of a forward's answers with the adapter off, without dropout."""
    with evaluating(engine.model), engine.model.disable_adapter():
        return _answers(forward).log_probs(forward_losses(engine, forward))


def _turned(answers: Sequence[Pair]) -> list[Pair]:
    """Return the answers behind prompts that they are not of, for KTO's reference point.

    As TRL 1.16: every answer goes to the next prompt of the step, liked ones first, then the others:

        prompts  1 2 3 | 1 2 3        answers behind them  r3 c1 c2 | c3 r1 r2
    """
    return [replace(pair, answer_ids=answers[n - 1].answer_ids) for n, pair in enumerate(answers)]


def _ratios(engine: Engine, pairs: Sequence[Pair]) -> list[float]:
    """Return the log-probability of each answer above the reference's, without dropout."""
    now = _log_probs(engine, pairs)
    with engine.model.disable_adapter():
        then = _log_probs(engine, pairs)
    return [a - b for a, b in zip(now, then, strict=True)]


@torch.no_grad()  # type: ignore[untyped-decorator]
def _log_probs(engine: Engine, pairs: Sequence[Pair]) -> list[float]:
    """Return the log-probability of each pair's answer, without dropout."""
    found: dict[Pair, float] = {}
    with evaluating(engine.model), running(engine):
        for group, forward in grouped(engine, pairs):
            losses_E = forward_losses(engine, forward).cpu().numpy()
            found |= {
                pair: -float(losses_E[at].sum()) for pair, at in zip(group, places_of(forward, group), strict=True)
            }
    return [found[pair] for pair in pairs]
