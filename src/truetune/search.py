"""A search's numbers: what may be tried, what was tried, what comes next, and which differences are more than noise.

Nothing here is kept between trials but the list of them: what comes next is a function of that list, the trial's number
and the seed. So a search that was killed goes on as if it had not been.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from truetune.config import Config

COMPLETE, PRUNED, FAILED = "complete", "pruned", "failed"

WIDTH = 10.0
"""Learning rates from this many times less to this many times more than the configuration's, unless asked otherwise."""

RANKS = (8, 16, 32, 64)

NUM_RANDOM = 4
"""Trials whose values are drawn blindly before the sampler learns from them; as many must end before one is pruned."""

NOISE_ERRORS = 2.0
"""Differences of fewer standard errors than this count as noise."""


@dataclass(frozen=True)
class Space:
    """What may be tried: learning rates between two, LoRA ranks of a list; alpha stays in proportion to the rank."""

    lowest_rate: float
    highest_rate: float
    ranks: tuple[int, ...]
    alpha_per_rank: float

    def values(self, learning_rate: float, lora_r: int) -> dict[str, Any]:
        """Return the keys of a trial.

        >>> Space(1e-5, 1e-3, (8,), 2.0).values(2e-4, 8)
        {'learning_rate': 0.0002, 'lora_r': 8, 'lora_alpha': 16}
        """
        alpha = max(round(self.alpha_per_rank * lora_r), 1)
        return {"learning_rate": learning_rate, "lora_r": lora_r, "lora_alpha": alpha}


def make_space(config: Config, *, rates: tuple[float, float] | None = None, ranks: Sequence[int] = ()) -> Space:
    """Return what may be tried around a configuration, whose own values always may."""
    rate = config.learning_rate
    lowest, highest = rates or (rate / WIDTH, rate * WIDTH)
    known = tuple(sorted({*(ranks or RANKS), config.lora_r}))
    return Space(min(lowest, rate), max(highest, rate), known, config.lora_alpha / config.lora_r)


@dataclass(frozen=True)
class Trial:
    """One trial that ended. `values`: its keys. `evaluations`: (step, held-out loss), step 0 first.

    `loss`: the last held-out loss of a complete one. `row_losses`, `row_tokens`: of each held-out row, the summed loss
    (nats) and the learned tokens. `problem`: why it failed.
    """

    number: int
    state: str
    values: dict[str, Any]
    evaluations: tuple[tuple[int, float], ...]
    loss: float | None
    seconds: float
    row_losses: tuple[float, ...] = ()
    row_tokens: tuple[int, ...] = ()
    problem: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values, a line of trials.jsonl."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Trial:
        """Return the trial that `to_dict` wrote."""
        lists = {name: tuple(values[name]) for name in ("row_losses", "row_tokens")}
        evaluations = tuple((int(step), float(loss)) for step, loss in values["evaluations"])
        return cls(**values | lists | {"evaluations": evaluations})


class Proposal:
    """Values to try next, and a judge of how it goes. Built of the trials that ended; Optuna keeps nothing else."""

    def __init__(
        self, space: Space, trials: Sequence[Trial], *, given: dict[str, Any], num_steps: int, seed: int
    ) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        distributions = {
            "learning_rate": optuna.distributions.FloatDistribution(space.lowest_rate, space.highest_rate, log=True),
            "lora_r": optuna.distributions.CategoricalDistribution(space.ranks),
        }
        # Half of a trial is taken before it is judged: its learning rate only then begins to fall.
        pruner = optuna.pruners.MedianPruner(n_startup_trials=NUM_RANDOM, n_warmup_steps=num_steps // 2)
        sampler = optuna.samplers.TPESampler(n_startup_trials=NUM_RANDOM, seed=seed + len(trials))
        study = optuna.create_study(sampler=sampler, pruner=pruner)
        for trial in trials:
            study.add_trial(_as_frozen(trial, distributions))
        if not trials:
            study.enqueue_trial({name: given[name] for name in distributions})
        self._trial = study.ask(distributions)
        rate, rank = (self._trial.params[name] for name in distributions)
        # What is shown is what is used: three digits.
        rate = min(max(float(f"{rate:.3g}"), space.lowest_rate), space.highest_rate)
        self.values = space.values(rate, rank) if trials else given

    def is_hopeless(self, step: int, loss: float) -> bool:
        """Return whether a trial with this held-out loss after a step is worse than half of the complete ones then."""
        self._trial.report(loss, step)
        return bool(self._trial.should_prune())


def _as_frozen(trial: Trial, distributions: dict[str, Any]) -> Any:
    """Return a trial as Optuna's. One that failed counts as one that was given up at once: its place is avoided."""
    import optuna

    is_complete = trial.state == COMPLETE
    return optuna.trial.create_trial(
        state=optuna.trial.TrialState.COMPLETE if is_complete else optuna.trial.TrialState.PRUNED,
        value=trial.loss if is_complete else None,
        params={name: trial.values[name] for name in distributions},
        distributions=distributions,
        intermediate_values={} if trial.state == FAILED else dict(trial.evaluations[1:]),
    )


def by_loss(trials: Sequence[Trial]) -> list[Trial]:
    """Return the complete trials, lowest loss first; of equal ones the earlier."""
    return sorted((trial for trial in trials if trial.state == COMPLETE), key=lambda trial: (trial.loss, trial.number))


@dataclass(frozen=True)
class Difference:
    """How much lower one trial's held-out loss is than another's (nats a token), and the standard error of that."""

    mean: float
    standard_error: float

    @property
    def is_noise(self) -> bool:
        """True if other held-out rows might well say the opposite."""
        return abs(self.mean) < NOISE_ERRORS * self.standard_error or self.mean == 0


def difference(better: Trial, other: Trial) -> Difference:
    """Return how much lower the first trial's loss is, row by row on the same rows, so that hard rows cancel out.

    A ratio of sums over rows (loss over tokens), with its linearised standard error (Cochran, Sampling Techniques,
    section 6.4).
    """
    import numpy as np

    tokens_R = np.array(better.row_tokens, float)
    gains_R = np.array(other.row_losses) - np.array(better.row_losses)
    mean = float(gains_R.sum() / tokens_R.sum())
    if len(tokens_R) < 2:
        return Difference(mean, math.inf)
    spread = float(np.square(gains_R - mean * tokens_R).sum()) * len(tokens_R) / (len(tokens_R) - 1)
    return Difference(mean, math.sqrt(spread) / float(tokens_R.sum()))
