"""Is a run what it says? Every file against its manifest, every step told once; and steps taken again, to the bit."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from truetune import checkpoint
from truetune.assembly import Assembly, assemble
from truetune.config import resolve
from truetune.console import Console
from truetune.disk import damage
from truetune.errors import TruetuneError, UserError
from truetune.preflight import preflight
from truetune.records import Row, RowStream
from truetune.rundir import RunDir

TOLD = ("step", "skipped", "eval")
COMPARED = (
    *("loss", "grad_norm", "learning_rate", "learning_rate_b", "epoch"),
    *("learned_tokens", "rows", "eval_loss", "reward_margin", "eval_reward_margin"),
)


@dataclass(frozen=True)
class Finding:
    """One thing of a run that was looked at. `problem`: what is wrong with it, None if nothing is."""

    name: str
    problem: str | None


def look(run: RunDir) -> Iterator[Finding]:
    """Yield every part of a run, looked at.

    A run that goes on, or was killed, may lack what it had not come to yet; what is there must be whole.
    """
    is_done = run.read_info()["state"] == "done"
    if is_done or run.config.exists():
        yield Finding(run.config.name, _config_problem(run.config))
    if is_done or run.data.exists():
        yield Finding("data", damage(run.data))
    for path in checkpoint.by_step(run.checkpoints):
        broken = checkpoint.broken_file(path)
        if path.exists():  # else it was just pruned
            yield Finding(f"checkpoints/{path.name}", broken)
    if is_done or run.result.exists():
        yield Finding(run.result.name, damage(run.result))
    taken = [event["step"] for event in run.read_events() if event["kind"] in ("step", "skipped")]
    listed = [line["step"] for line in run.read_step_rows()]
    yield Finding(run.events.name, _gap(taken))
    # The rows of a step are written before what became of it.
    most = len(taken) + (not is_done)
    yield Finding(run.steps.name, _gap(listed) or (None if len(taken) <= len(listed) <= most else f"{len(listed)}"))


def _config_problem(path: Path) -> str | None:
    try:
        resolve({}, path)
    except TruetuneError as error:
        return error.where
    return None


def _gap(steps: list[int]) -> str | None:
    """Return the first step that does not stand where it should."""
    for wanted, found in enumerate(steps, start=1):
        if wanted != found:
            return f"{wanted}: {found}"
    return None


@dataclass(frozen=True)
class Retaken:
    """Steps taken again from a checkpoint. `difference`: the first thing that was not the same, None if all was.

    `num_compared`: numbers compared; `has_state`: also weights and moments, with the checkpoint at the end.
    """

    start: int
    num_steps: int
    num_compared: int
    has_state: bool
    difference: str | None


def retake(run: RunDir, num_steps: int, *, lang: str = "en") -> Retaken:
    """Take `num_steps` steps of a run again and compare with what it says of them; nothing is written.

    Raises: UserError if the run has not that many steps, or its data, base or keys are others now.
    """
    told = {(event["kind"], event["step"]): event for event in _told(run)}
    start = _start(run, num_steps, last=max((step for _, step in told), default=0))
    settings, console = resolve({}, run.config), Console(lang, quiet=True)
    if settings.config.devices > 1:
        raise UserError("retake_ranks", where=str(run.path), fix="retake_ranks", n=settings.config.devices)
    flight = preflight(settings.config, console, date=run.read_info()["date"])
    assembly = assemble(settings, flight, folder=run.path, console=console, is_begun=True)
    path = checkpoint.path_of(run.checkpoints, start)
    if start:
        checkpoint.check_identity(path, assembly.state.identity)
        checkpoint.load(path, assembly.state)
    differences, num_compared, end = [], 0, start
    for event in _taken(assembly, flight.prepared.to_train, start=start, num_steps=num_steps):
        end = event["step"]
        then = told.get((event["kind"], end), {})
        num_compared += sum(name in event for name in COMPARED)
        differences += [
            f"{event['kind']} {end}: {name} {then.get(name)} → {event[name]}"
            for name in COMPARED
            if name in event and event[name] != then.get(name)
        ]
    last = checkpoint.path_of(run.checkpoints, end)
    has_state = checkpoint.broken_file(last) is None
    other = checkpoint.other_tensor(last, assembly.state) if has_state else None
    return Retaken(start, num_steps, num_compared, has_state, next(iter([*differences, *filter(None, [other])]), None))


def _taken(
    assembly: Assembly, rows: Sequence[Row] | RowStream, *, start: int, num_steps: int
) -> Iterator[dict[str, Any]]:
    """Yield what `_told` yields, of steps that are taken now."""
    loop, count = assembly.loop, itertools.count(1)
    loop.plan = replace(loop.plan, max_skipped=num_steps, save_steps=start + num_steps + 1)
    events = loop.run(rows, start=start, evaluate=assembly.evaluate, should_stop=lambda: next(count) >= num_steps)
    return (event for event in events if event["kind"] in TOLD)


def _told(run: RunDir) -> Iterator[dict[str, Any]]:
    return (event for event in run.read_events() if event["kind"] in TOLD)


def _start(run: RunDir, num_steps: int, *, last: int) -> int:
    """Return the step of the checkpoint to begin at, if possible one with another `num_steps` later; 0: at the base."""
    if not 0 < num_steps <= last:
        raise UserError("retake_steps", where=str(run.path), fix="retake_steps", asked=num_steps, last=last)
    good = [
        checkpoint.step_of(path) for path in checkpoint.by_step(run.checkpoints) if not checkpoint.broken_file(path)
    ]
    starts = [step for step in (0, *good) if step + num_steps <= last]
    return max(starts, key=lambda step: (step + num_steps in good, step))
