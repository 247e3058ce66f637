"""What a run will need: time and memory, from a few of its own real steps."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from truetune.assembly import Assembly
from truetune.engine.memory import peak_of
from truetune.engine.objective import Objective
from truetune.engine.order import batches
from truetune.engine.step import Engine
from truetune.evaluate import STEP_COST
from truetune.loop import Plan
from truetune.records import Row

# Steps that are run: the first one warms up, the others are timed.
NUM_STEPS = 4
NUM_SAMPLED_STEPS = 50
"""Steps whose tokens are counted; a long run's others are taken to be like them."""


@dataclass(frozen=True)
class Forecast:
    """What the whole run will take: its steps and evaluations. `peak_bytes`: of the process, or of the GPU."""

    seconds: float
    seconds_per_step: float
    peak_bytes: int
    num_steps: int


def forecast(assembly: Assembly, rows: Sequence[Row]) -> Forecast:
    """Run the first steps over `rows`, which trains the model a little, and say what the whole run will take."""
    plan, engine, objective = assembly.loop.plan, assembly.loop.engine, assembly.loop.objective
    with peak_of(engine.device) as peak:
        steps = list(islice(assembly.loop.run(rows), min(NUM_STEPS, plan.num_steps)))
    timed = [event["seconds"] / event["computed_tokens"] for event in steps if event["kind"] == "step"]
    seconds_per_token = statistics.median(timed[1:] or timed)
    step_tokens = _mean_tokens(engine, rows, plan=plan, objective=objective)
    num_evaluations = 1 + -(-plan.num_steps // plan.eval_steps)
    held_out = objective.forwards(engine, assembly.held_out) if assembly.held_out else []
    eval_tokens = sum(forward.num_tokens for forward in held_out)
    seconds = seconds_per_token * (plan.num_steps * step_tokens + num_evaluations * eval_tokens / STEP_COST)
    planned = [event["peak_bytes"] for event in assembly.events if event["kind"] == "memory"]
    return Forecast(seconds, seconds_per_token * step_tokens, max(peak(), *planned, 0), plan.num_steps)


def _mean_tokens(engine: Engine, rows: Sequence[Row], *, plan: Plan, objective: Objective) -> float:
    """Return the mean of the tokens that a step computes, over steps spread evenly over the run."""
    chosen = set(np.linspace(0, plan.num_steps - 1, min(plan.num_steps, NUM_SAMPLED_STEPS)).astype(int).tolist())
    tokens = []
    order = batches(len(rows), plan.batch_size, seed=plan.seed, mix=plan.mix)
    for number, (_, numbers) in zip(range(plan.num_steps), order, strict=False):
        if number in chosen:
            forwards = objective.forwards(engine, [rows[row] for row in numbers])
            tokens.append(sum(forward.num_tokens for forward in forwards))
    return statistics.fmean(tokens)
