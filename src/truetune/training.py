"""THE STORY: check everything, load the model, take the steps, write the adapter."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from truetune import checkpoint, trackers
from truetune.assembly import Assembly, assemble
from truetune.config import Settings, load_yaml
from truetune.console import Console
from truetune.errors import MachineError, Stopped, UserError
from truetune.output import record, recorded_state, save_checkpoint, write_adapter, write_start
from truetune.preflight import Preflight, preflight, require_usable, show_refused, show_report
from truetune.rundir import Run, RunDir, next_run_path, open_output, outcome
from truetune.signals import StopFlag


def train(settings: Settings, console: Console, *, resume: bool = False) -> Run:
    """Train as `settings` say and return the run.

    Raises: UserError, before anything is written, if the configuration, the data or the model cannot be used.
    """
    config = settings.config
    if resume and not config.output_dir:
        raise UserError("output_no_run", where="--resume", fix="resume_which")
    path = Path(config.output_dir or next_run_path((config.data or ["data"])[0], config.model or "model")).expanduser()
    run = open_output(path, resume=resume)
    if run.is_run and run.read_info()["state"] == "done":
        console.say("train.already_done", path=path)
        return outcome(run)
    if run.config.is_file():
        settings = _as_chosen_then(settings, run)
        config = settings.config
    trackers.check_installed(config.report_to)
    flight = preflight(config, console, date=run.read_info()["date"] if run.is_run else None)
    show_report(flight.prepared.report, console)
    show_refused(flight.prepared.report, console)
    require_usable(flight.prepared.report, skip_invalid=config.invalid == "skip")
    console.say("train.first_example")
    console.pair_view(flight.renderer.tokenizer, flight.prepared.train[0].pairs[0])
    assembly = assemble(settings, flight, folder=path, console=console, is_begun=run.is_run)
    start = _resume(run, assembly, console)
    write_start(run, assembly.settings, flight=flight)
    with recorded_state(run):
        for event in assembly.events:
            record(run, event)
        _take_steps(run, assembly, flight, console, start=start)
        write_adapter(run, assembly.state, flight=flight)
    result = outcome(run)
    console.say("train.done", path=run.adapter)
    console.say("train.chat", path=path)
    return result


def _as_chosen_then(settings: Settings, run: RunDir) -> Settings:
    """Return the settings with each "auto" as it was chosen when the run began: another choice rounds otherwise."""
    saved, _ = load_yaml(run.config)
    values = settings.config.model_dump()
    return settings.with_chosen(
        **{key: saved[key] for key, value in values.items() if value == "auto" and key in saved}
    )


def _resume(run: RunDir, assembly: Assembly, console: Console) -> int:
    """Load the newest good checkpoint, if there is one, and return its step."""
    if not run.is_run:
        return 0
    path, skipped = checkpoint.find(run.checkpoints)
    for name, file in skipped.items():
        console.say("train.skipped_checkpoint", name=name, file=file)
    if skipped and path is None:
        raise MachineError("all_damaged", where=str(run.checkpoints), fix="all_damaged")
    step = checkpoint.load(path, assembly.state) if path else -1
    checkpoint.set_aside(run.checkpoints, skipped)
    run.cut_back(step)
    console.say("train.resumed", step=max(step, 0))
    return max(step, 0)


def _take_steps(run: RunDir, assembly: Assembly, flight: Preflight, console: Console, *, start: int) -> None:
    """Run the loop and hand its events to the run's files, the trackers and the screen."""
    config, loop = assembly.settings.config, assembly.loop
    save = partial(
        save_checkpoint, run=run, state=assembly.state, flight=flight, save_total_limit=config.save_total_limit
    )
    trackers.start(assembly.accelerator, config, folder=run.path)
    step = start
    try:
        with StopFlag() as stop, console.progress(loop.plan.num_steps, start) as screen:
            for event in loop.run(
                flight.prepared.train,
                start=start,
                evaluate=assembly.evaluate,
                save=save,
                should_stop=lambda: stop.signal is not None,
            ):
                step = event["step"]
                record(run, event)
                trackers.log(assembly.accelerator, event, every=config.logging_steps)
                screen.show(event, is_logged=step % config.logging_steps == 0)
    finally:
        assembly.accelerator.end_training()
    if stop.signal is not None and step < loop.plan.num_steps:
        raise Stopped(stop.signal, where=str(run.path))
