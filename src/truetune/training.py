"""THE STORY: check everything, load the model, take the steps, write the result."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from typing import Any

from truetune import checkpoint, disk, report, trackers
from truetune.assembly import Assembly, assemble
from truetune.card import Subject
from truetune.config import Settings, load_yaml
from truetune.console import Console
from truetune.diagnosis import diagnose
from truetune.errors import MachineError, NumericsError, Stopped, TruetuneError, UserError
from truetune.follow import card_of, follow, tell_start, tell_state, with_devices
from truetune.lock import RunLock, refuse_locked
from truetune.output import Saver, keep_refused, record, recorded_state, write_start
from truetune.preflight import Preflight, preflight, require_usable, show_refused, show_report
from truetune.ranks import Ranks, connected
from truetune.records import Row
from truetune.rundir import Run, RunDir, next_run_path, open_output, outcome
from truetune.signals import StopFlag
from truetune.teller import Teller
from truetune.watch import Watch

TAKEN = ("step", "skipped", "eval")
"""Events after which the weights are those of their step."""


def train(
    settings: Settings, console: Console, *, resume: bool = False, allow_changed: bool = False, skip_bad: int = 0
) -> Run:
    """Train as `settings` say and return the run; of several ranks, all call this, and rank 0 tells the story.

    `allow_changed`: resume although data or keys are others. `skip_bad`: steps that may be skipped because their loss
    or gradient is not finite.

    Raises: UserError, before anything is written, if the configuration, the data or the model cannot be used.
    """
    with connected() as ranks:
        settings = with_devices(settings, ranks)
        if not ranks.is_main:
            return follow(ranks, lang=console.lang, skip_bad=skip_bad)
        return _lead(settings, console, ranks, resume=resume, allow_changed=allow_changed, skip_bad=skip_bad)


def _lead(
    settings: Settings, console: Console, ranks: Ranks, *, resume: bool, allow_changed: bool, skip_bad: int
) -> Run:
    config = settings.config
    if resume and not config.output_dir:
        raise UserError("output_no_run", where="--resume", fix="resume_which")
    if resume and ranks.place.may_restart and not RunDir(Path(str(config.output_dir)).expanduser()).is_run:
        resume = False  # torchrun gives the same words at its first start
    path = Path(config.output_dir or next_run_path((config.data or ["data"])[0], config.model or "model")).expanduser()
    refuse_locked(path)
    disk.require_writable(path)
    run = open_output(path, resume=resume)
    if run.is_run and run.read_info()["state"] == "done" and not allow_changed:
        console.say("train.already_done", path=path)
        ranks.tell(None)
        return outcome(run)
    if run.config.is_file():
        settings = _as_chosen_then(settings, run)
        config = settings.config
    trackers.check_installed(config.report_to)
    date = run.read_info()["date"] if run.is_run else None
    tell_start(ranks, settings, path=path, date=date, is_begun=run.is_run)
    flight = preflight(config, console, date=date)
    ranks.wait()
    show_report(flight.prepared.report, console)
    show_refused(flight.prepared.report, console)
    require_usable(flight.prepared.report, skip_invalid=config.invalid == "skip")
    _show_first(flight, console, is_compared=config.loss != "sft")
    assembly = assemble(settings, flight, folder=path, console=console, is_begun=run.is_run, ranks=ranks)
    assembly.loop.plan = replace(assembly.loop.plan, max_skipped=skip_bad)
    with RunLock(path):
        open_output(path, resume=resume)  # another one may have begun meanwhile
        disk.sweep(path)
        disk.sweep(run.checkpoints)
        start = _resume(run, assembly, console, allow_changed=allow_changed)
        write_start(run, assembly.settings, flight=flight, result=assembly.state.trained.place)
        with recorded_state(run):
            _train(run, assembly, flight, console, start=start)
        result = outcome(run)
    return result


def _show_first(flight: Preflight, console: Console, *, is_compared: bool) -> None:
    """Show the first pair as it is trained; of a preference loss, the rejected answer, too."""
    row = flight.prepared.train[0]
    console.say("train.first_example")
    console.pair_view(flight.renderer.tokenizer, row.pairs[0])
    if is_compared:
        console.say("train.first_rejected")
        console.pair_view(flight.renderer.tokenizer, row.rejected[0])


def _as_chosen_then(settings: Settings, run: RunDir) -> Settings:
    """Return the settings with each "auto" as it was chosen when the run began: another choice rounds otherwise."""
    saved, _ = load_yaml(run.config)
    values = settings.config.model_dump()
    return settings.with_chosen(
        **{key: saved[key] for key, value in values.items() if value == "auto" and key in saved}
    )


def _resume(run: RunDir, assembly: Assembly, console: Console, *, allow_changed: bool) -> int:
    """Load the newest good checkpoint, if there is one, and return its step."""
    if not run.is_run:
        return 0
    path, skipped = checkpoint.find(run.checkpoints)
    for name, file in skipped.items():
        console.say("train.skipped_checkpoint", name=name, file=file)
    if skipped and path is None:
        raise MachineError("all_damaged", where=str(run.checkpoints), fix="all_damaged")
    step = -1
    if path is not None:
        _check_same(path, assembly, console, allow_changed=allow_changed)
        step = checkpoint.load(path, assembly.state)
    checkpoint.set_aside(run.checkpoints, skipped)
    run.cut_back(step)
    console.say("train.resumed", step=max(step, 0))
    return max(step, 0)


def _check_same(path: Path, assembly: Assembly, console: Console, *, allow_changed: bool) -> None:
    """Say what is not as it was when a checkpoint was written.

    Raises: UserError if the run is another one now, or would be computed by another major version of a library.
    """
    changed = checkpoint.check_identity(path, assembly.state.identity, allow_changed=allow_changed)
    for name, values in changed.items():
        console.say("train.changed", name=name, values=values)
    others = checkpoint.other_versions(path)
    names = ", ".join(f"{name} ({then} → {now})" for name, (then, now) in others.items())
    libraries = [others[name] for name in checkpoint.PACKAGES if name in others]
    is_major = any(then.split(".")[0] != now.split(".")[0] for then, now in libraries)
    if is_major and not allow_changed:
        raise UserError("resume_versions", where=str(path), fix="resume_versions", names=names)
    if others:
        console.say("train.other_versions", names=names)


def _train(run: RunDir, assembly: Assembly, flight: Preflight, console: Console, *, start: int) -> None:
    """Take the steps and write the result, however the run ends: stopped by a signal, early, or at the last step."""
    config = assembly.settings.config
    watch = Watch(patience=config.early_stopping_patience, keeps_best=config.result == "best")
    events = list(run.read_events())
    watch.replay(events)
    assembly.loop.num_skipped = sum(event["kind"] == "skipped" for event in events)
    tell_state(assembly, events, start=start)
    if flight.prepared.feed is not None:
        keep_refused(
            run,
            flight.prepared.feed,
            lang=console.lang,
            tell=lambda count: console.say("train.stream_refused", count=count, path=run.refused),
        )
    saver = Saver(run, assembly.state, flight, config.save_total_limit, config.loss)
    if start < assembly.loop.plan.num_steps:
        _require_disk(saver, console, most=max(config.save_total_limit, checkpoint.MIN_KEPT) + 2)
        saver.rehearse()
    for event in assembly.events:
        record(run, event)
    step, stopped_by = _take_steps(assembly, console, start=start, watch=watch, saver=saver)
    chosen = saver.write_result(best=watch.best_step if config.result == "best" else None)
    if chosen is not None and checkpoint.step_of(chosen) != step:
        console.say("train.best", step=checkpoint.step_of(chosen), loss=watch.best_loss)
    if stopped_by is not None and step < assembly.loop.plan.num_steps:
        raise Stopped(stopped_by, where=str(run.path))
    if chosen is not None:
        with console.status("status.report"):
            _write_report(run, assembly, flight, lang=console.lang)


def _require_disk(saver: Saver, console: Console, *, most: int) -> None:
    """Say before step 1 what the checkpoints of full fine-tuning take, each three times the weights in fp32.

    `most`: of them at a time: those that are kept, the best one, the one being written; the result comes on top.

    Raises: MachineError if they do not all fit.
    """
    if saver.state.trained.place != "model":
        return
    each = saver.state.num_bytes
    total = most * each + each // 3
    console.say("train.full_disk", each=each / 1e9, count=most, total=total / 1e9)
    disk.require_room(saver.run.path, total)


def _write_report(run: RunDir, assembly: Assembly, flight: Preflight, *, lang: str) -> None:
    """Compare what the result holds, read from there, with the base, and write the report card."""
    events = list(run.read_events())
    if not any(event["kind"] == "step" for event in events):
        return
    assembly.state.trained.show(run.result)
    config = assembly.settings.config
    trained, num_rows = _trained(flight, [event for event in events if event["kind"] == "step"])
    subject = Subject(
        run.path.name,
        flight.base.title,
        config.data,
        events,
        step=run.result_step or 0,
        seed=config.seed,
        finetuning=config.finetuning,
        is_compared=config.loss != "sft",
        num_rows=num_rows,
    )
    card = card_of(assembly, flight, subject=subject, trained=trained)
    findings = [asdict(finding) for finding in diagnose(card)]
    report.write(run.path, card.to_dict() | {"findings": findings}, lang=lang)


def _trained(flight: Preflight, steps: Sequence[dict[str, Any]]) -> tuple[Sequence[Row], int | None]:
    """Return rows that were trained, and how many there were; None if these are all."""
    feed = flight.prepared.feed
    if feed is None:
        return flight.prepared.train, None
    num_trained = sum(step["rows"] for step in steps)
    rows = feed.first(num_trained, batch_size=steps[0]["rows"])
    return rows, round(num_trained / max(steps[-1]["epoch"], 1))


def _take_steps(
    assembly: Assembly, console: Console, *, start: int, watch: Watch, saver: Saver
) -> tuple[int, int | None]:
    """Run the loop; return the last step and the signal that ended it, if one did."""
    config, loop, run = assembly.settings.config, assembly.loop, saver.run
    step = saved = start

    def save(step: int) -> None:
        nonlocal saved
        saver.save(step, best=watch.best_step)
        watch.saved()
        saved = step

    told = trackers.start(assembly.accelerator, config, folder=run.path)
    with StopFlag() as stop, console.progress(loop.plan.num_steps, start) as screen:
        loop.raised = lambda: loop.ranks.asked(stop.signal)
        teller = Teller(run, told, console, screen, config.logging_steps)
        try:
            for event in assembly.sampler.begin() if start == 0 else ():
                teller.tell(event)
            for event in loop.run(
                saver.flight.prepared.to_train,
                start=start,
                evaluate=assembly.evaluate,
                save=save,
                should_save=lambda: watch.wants_save,
                should_stop=lambda: loop.signal is not None or watch.is_over,
            ):
                step = event["step"] if event["kind"] in TAKEN else step
                for one in chain((event,), watch.see(event), assembly.sampler.see(event)):
                    teller.tell(one)
        except (NumericsError, MachineError, UserError):
            # The weights are still those of the last step: nothing of it need be lost.
            if step > saved:
                with suppress(TruetuneError, OSError):
                    save(step)
            raise
        finally:
            teller.end()
    if watch.is_over:
        console.say("train.stopped_early", step=step, best_step=watch.best_step)
    return step, loop.signal
