"""What the ranks other than 0 do: the same steps in silence, and write nothing. Rank 0 tells them what they need.

rank 0 (training.py)    settings, folder ─┐   checks, prepares data ─┐        ─┐ where the run stands, weights   steps
the others                                └→                         └→ open  └→                                steps
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from truetune import checkpoint
from truetune.assembly import Assembly, assemble
from truetune.card import Card, Subject, make_card
from truetune.config import Config, Settings
from truetune.console import Console
from truetune.errors import UserError
from truetune.preflight import Preflight, preflight
from truetune.ranks import Ranks
from truetune.records import Row
from truetune.rundir import Run, RunDir, outcome
from truetune.signals import StopFlag
from truetune.watch import Watch


def with_devices(settings: Settings, ranks: Ranks) -> Settings:
    """Return the settings with the number of ranks that there are.

    Raises: UserError if another number was asked for, or if sharding was and this process is alone.
    """
    config = settings.config
    asked = settings.origins["devices"] != "default" and config.devices != ranks.size
    if asked and ranks.size == 1:
        raise UserError("devices_not_started", where="devices", fix="devices_not_started", n=config.devices)
    if asked and settings.origins["devices"].startswith("--"):
        values = {"asked": config.devices, "n": ranks.size}
        raise UserError("devices_twice", where="--devices", fix="devices_twice", **values)
    if config.strategy == "shard" and ranks.size == 1:
        raise UserError("shard_alone", where="strategy", fix="shard_alone")
    found = settings.with_chosen(devices=ranks.size)
    return Settings(found.config, {**found.origins, "devices": "torchrun"}) if config.devices != ranks.size else found


def tell_start(ranks: Ranks, settings: Settings, *, path: Path, date: str | None, is_begun: bool) -> None:
    """Tell the others what run this is."""
    config = settings.config.model_dump(mode="json")
    ranks.tell({"config": config, "path": str(path), "date": date, "is_begun": is_begun})


def tell_state(assembly: Assembly, events: Iterable[dict[str, Any]], *, start: int) -> None:
    """Tell the others where the run stands, and give them its weights."""
    ranks = assembly.loop.ranks
    told = [event for event in events if event["kind"] in ("eval", "skipped")] if ranks.size > 1 else []
    ranks.tell({"events": told})
    checkpoint.share(assembly.state, ranks, step=start)


def card_of(
    assembly: Assembly, flight: Preflight, *, subject: Subject | None = None, trained: Sequence[Row] = ()
) -> Card:
    """Return the report card of rank 0's weights; with a sharded base, all ranks compute it. `subject`: rank 0's.

    `trained`: the rows that were; without them, all there are.
    """
    loop = assembly.loop
    if loop.engine.is_sharded:
        told = loop.ranks.tell(vars(subject) if subject is not None else None)
        subject = Subject(**told)
        loop.ranks.give(part for part in loop.engine.model.parameters() if part.requires_grad)
    if subject is None:
        raise ValueError("rank 0 has a subject")
    prepared = flight.prepared
    rows = trained or prepared.train
    return make_card(loop.engine, flight.renderer, subject=subject, trained=rows, held_out=prepared.held_out)


def follow(ranks: Ranks, *, lang: str, skip_bad: int) -> Run:
    """Take part in the run that rank 0 leads, and return what its folder says so far."""
    told = ranks.tell()
    if told is None:
        return Run(Path(), 0, None, None, None)
    config, path, console = Config(**told["config"]), Path(told["path"]), Console(lang, quiet=True)
    settings = Settings(config, dict.fromkeys(Config.model_fields, "rank 0"))
    # One of each machine prepares the data, the others find them prepared.
    flight = preflight(config, console, date=told["date"]) if ranks.place.local_rank == 0 else None
    ranks.wait()
    flight = flight or preflight(config, console, date=told["date"])
    assembly = assemble(settings, flight, folder=path, console=console, is_begun=told["is_begun"], ranks=ranks)
    loop = assembly.loop
    loop.plan = replace(loop.plan, max_skipped=skip_bad)
    watch = Watch(patience=config.early_stopping_patience)
    events = ranks.tell()["events"]
    watch.replay(events)
    loop.num_skipped = sum(event["kind"] == "skipped" for event in events)
    start = checkpoint.share(assembly.state, ranks, step=0)
    step = _take_steps(assembly, flight, start=start, watch=watch)
    is_stopped = loop.signal is not None and step < loop.plan.num_steps
    if loop.engine.is_sharded and not is_stopped:
        card_of(assembly, flight)
    return outcome(RunDir(path))


def _take_steps(assembly: Assembly, flight: Preflight, *, start: int, watch: Watch) -> int:
    """Run the loop and return the last step: nothing is shown, saved or written."""
    loop, step = assembly.loop, start
    with StopFlag() as stop:
        loop.raised = lambda: loop.ranks.asked(stop.signal)
        told = loop.run(
            flight.prepared.to_train,
            start=start,
            evaluate=assembly.evaluate,
            should_stop=lambda: loop.signal is not None or watch.is_over,
        )
        for event in chain(assembly.sampler.begin() if start == 0 else (), told):
            step = event["step"] if event["kind"] in ("step", "skipped", "eval") else step
            for _ in chain(watch.see(event), assembly.sampler.see(event)):
                continue
    return step
