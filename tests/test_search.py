"""What is tried next follows from what was tried; a difference is held against its own noise."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from truetune.config import Config
from truetune.search import COMPLETE, FAILED, PRUNED, Proposal, Space, Trial, by_loss, difference, make_space

GIVEN = {"learning_rate": 2e-4, "lora_r": 16, "lora_alpha": 32}
SPACE = make_space(Config())


def made(number: int, values: dict[str, Any], *, state: str = COMPLETE, loss: float | None = None) -> Trial:
    """A trial whose loss has its minimum at a learning rate of 1e-3."""
    loss = loss or 1 + float(np.log10(values["learning_rate"] / 1e-3) ** 2)
    evaluations = ((0, 3.0), (2, loss + 0.5), (4, loss))
    rows = (loss * 10, loss * 20) if state == COMPLETE else ()
    return Trial(
        number, state, values, evaluations, loss if state == COMPLETE else None, 1.0, rows, (10, 20)[: len(rows)]
    )


def propose(trials: list[Trial], *, seed: int = 1) -> Proposal:
    """What comes after these trials."""
    return Proposal(SPACE, trials, given=GIVEN, num_steps=4, seed=seed)


def searched(num_trials: int, *, seed: int = 1) -> list[Trial]:
    """A search in which every trial comes to its end."""
    trials: list[Trial] = []
    for number in range(num_trials):
        trials.append(made(number, propose(trials, seed=seed).values))
    return trials


def test_the_space_lies_around_the_configuration_and_holds_it() -> None:
    assert pytest.approx((2e-5, 2e-3)) == (SPACE.lowest_rate, SPACE.highest_rate)
    assert SPACE.ranks == (8, 16, 32, 64)
    asked = make_space(Config(learning_rate=1e-2, lora_r=6, lora_alpha=9), rates=(1e-5, 1e-3), ranks=(4, 64))
    assert (asked.lowest_rate, asked.highest_rate, asked.ranks) == (1e-5, 1e-2, (4, 6, 64))
    assert asked.values(1e-4, 64) == {"learning_rate": 1e-4, "lora_r": 64, "lora_alpha": 96}
    assert Space(0.1, 1, (1,), 0.1).values(1, 1)["lora_alpha"] == 1


def test_the_first_trial_is_the_configuration_as_given() -> None:
    assert propose([]).values == GIVEN
    assert [propose([], seed=seed).values for seed in range(3)] == [GIVEN] * 3


def test_what_comes_next_is_a_function_of_the_trials_so_far() -> None:
    """Built anew from any part of the list, as a resumed search does, it proposes the same."""
    trials = searched(10)
    again = [propose(trials[:number]).values for number in range(10)]
    assert again == [trial.values for trial in trials]
    assert len({trial.values["learning_rate"] for trial in trials}) == 10
    assert searched(6, seed=2)[1:] != trials[1:6]
    for trial in trials:
        assert SPACE.lowest_rate <= trial.values["learning_rate"] <= SPACE.highest_rate
        assert trial.values["lora_alpha"] == 2 * trial.values["lora_r"]


def test_it_finds_the_valley() -> None:
    """With the minimum at 1e-3, five times the rate as given, 16 trials come within a factor of two, for every seed."""
    for seed in range(5):
        best = by_loss(searched(16, seed=seed))[0]
        assert 5e-4 < best.values["learning_rate"] < 2e-3


def test_places_that_failed_are_avoided() -> None:
    """All rates above 2e-4 fail, half of the space, towards which the losses fall: most of what follows is below."""
    trials: list[Trial] = []
    for number in range(24):
        values = propose(trials).values
        state = FAILED if values["learning_rate"] > 2e-4 else COMPLETE
        trials.append(made(number, values, state=state))
    late = [trial.state for trial in trials[12:]]
    assert late.count(FAILED) <= len(late) // 2
    assert trials[0].state == COMPLETE


def test_a_trial_is_given_up_when_half_of_the_complete_ones_were_better_by_then() -> None:
    trials = searched(4)
    middle = sorted(trial.evaluations[1][1] for trial in trials)
    assert not propose(trials).is_hopeless(2, middle[0])
    assert propose(trials).is_hopeless(2, middle[-1])
    # Not before half of its steps, nor while there is little to compare with.
    assert not propose(trials).is_hopeless(1, 99.0)
    assert not propose(trials[:3]).is_hopeless(2, 99.0)


def test_only_complete_trials_are_ranked() -> None:
    trials = searched(3)
    better = made(3, GIVEN, state=PRUNED, loss=0.1)
    assert better not in by_loss([*trials, better])
    same = replace(trials[0], number=7)
    assert by_loss([same, trials[0]]) == [trials[0], same]


def test_the_standard_error_is_that_of_drawing_rows_anew() -> None:
    """Against the bootstrap: differences of the loss over rows of unlike length, drawn again 4,000 times."""
    generator = np.random.default_rng(3)
    tokens = generator.integers(2, 60, 200)
    hard = generator.gamma(2.0, 1.0, 200)
    a, b = (tokens * (hard + generator.normal(mean, 0.4, 200)) for mean in (1.0, 1.05))
    trials = [
        replace(made(number, GIVEN), row_losses=tuple(map(float, losses)), row_tokens=tuple(map(int, tokens)))
        for number, losses in enumerate((a, b))
    ]
    found = difference(*trials)
    assert found.mean == pytest.approx((b.sum() - a.sum()) / tokens.sum())
    drawn = generator.integers(0, 200, (4000, 200))
    again = (b - a)[drawn].sum(1) / tokens[drawn].sum(1)
    assert found.standard_error == pytest.approx(again.std(), rel=0.05)
    # Hard rows are hard for both: the losses alone vary far more than their difference.
    assert found.standard_error < 0.5 * float((b[drawn].sum(1) / tokens[drawn].sum(1)).std())


def test_noise_is_called_noise() -> None:
    one = replace(made(0, GIVEN), row_losses=(10.0, 10.0, 10.0, 10.0), row_tokens=(5, 5, 5, 5))
    assert not difference(one, replace(one, row_losses=(11.0, 11.1, 10.9, 11.0))).is_noise
    assert difference(one, replace(one, row_losses=(12.0, 9.0, 11.0, 9.0))).is_noise
    assert difference(one, one).is_noise
    single = replace(one, row_losses=(1.0,), row_tokens=(2,))
    assert difference(single, replace(single, row_losses=(9.0,))).is_noise


def test_a_line_holds_the_whole_trial() -> None:
    import json

    for trial in (*searched(2), made(2, GIVEN, state=FAILED)):
        assert Trial.from_dict(json.loads(json.dumps(trial.to_dict()))) == trial
