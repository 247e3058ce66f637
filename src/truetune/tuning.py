"""A search over learning rate and rank: the data are prepared and the base is loaded once, each trial has fresh LoRA.

Trials are what `truetune train` does, step for step: the same rows in the same order, the same start of LoRA for the
same rank, a schedule of their own number of steps. The first one is the configuration as given.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from truetune import checkpoint, disk, tune_report
from truetune.assembly import assemble, identity_of, show_values
from truetune.config import Settings, dump
from truetune.console import Console
from truetune.engine.score import score
from truetune.engine.step import Engine
from truetune.errors import MachineError, NumericsError, Stopped, UserError
from truetune.evaluate import MIN_ROWS, STEP_COST
from truetune.loading import load_bare
from truetune.lock import RunLock, refuse_locked
from truetune.loop import is_out_of_memory
from truetune.measure import Forecast, forecast
from truetune.preflight import Preflight, preflight, require_usable, show_refused, show_report
from truetune.records import Row, pairs_of
from truetune.rundir import next_run_path
from truetune.search import COMPLETE, FAILED, PRUNED, Proposal, Space, Trial, by_loss, make_space
from truetune.signals import StopFlag
from truetune.tunedir import TuneDir, open_search

NUM_TRIALS, MAX_STEPS = 12, 50
"""Where nothing else is asked: trials, and the steps of each (fewer if the whole run has fewer)."""

NUM_EVALUATIONS = 4
"""Of a trial, besides the one before its first step."""

EVAL_SHARE = 0.25
"""Of a trial's time for evaluations. More than in training: what is held out is all that a search looks at."""

MEASURED_RATE = 1e-9
"""While time is measured: no rate that is searched may blow up there."""

TUNED_KEYS = ("learning_rate", "lora_r", "lora_alpha")
CHOSEN_KEYS = ("dtype", "attention", "gradient_checkpointing", "max_tokens_per_forward", "eval_steps", "max_steps")
"""What the search decides once, for all of its trials."""


@dataclass(frozen=True)
class Options:
    """What is asked of a search beside its configuration; None: as it began, else as usual.

    `rates`: lowest and highest learning rate. `timeout_s`: no trial begins that would end later than this.
    """

    num_trials: int | None = None
    timeout_s: float | None = None
    rates: tuple[float, float] | None = None
    ranks: tuple[int, ...] = ()


@dataclass(frozen=True)
class Search:
    """What all trials share. `settings`: with every "auto" chosen. `flight`: with the base's weights."""

    settings: Settings
    flight: Preflight
    held_out: Sequence[Row]
    space: Space
    path: Path

    @property
    def given(self) -> dict[str, Any]:
        """The values of the configuration as given."""
        return {name: getattr(self.settings.config, name) for name in TUNED_KEYS}


def tune(settings: Settings, console: Console, *, options: Options = Options(), resume: bool = False) -> TuneDir:
    """Search as `settings` and `options` say; return the folder.

    Raises: UserError, before anything is written, if the configuration, the data or the model cannot be used;
    NumericsError if no trial came to its end; Stopped if a signal came, with all trials that ended saved.
    """
    config = settings.config
    if config.streaming:
        raise UserError("tune_stream", where=settings.origins["streaming"], fix="tune_stream")
    path = _path_of(settings, resume=resume)
    refuse_locked(path)
    disk.require_writable(path)
    folder = open_search(path, resume=resume)
    then = folder.read_info() if folder.is_search else None
    options = _as_asked_then(options, then)
    space = make_space(config, rates=options.rates, ranks=options.ranks)
    flight = preflight(config, console, date=then["date"] if then else None)
    show_report(flight.prepared.report, console)
    show_refused(flight.prepared.report, console)
    require_usable(flight.prepared.report, skip_invalid=config.invalid == "skip")
    if not len(flight.prepared.held_out):
        raise UserError("tune_no_held_out", where="data", fix="tune_no_held_out")
    flight = _shortened(flight, config.max_steps or MAX_STEPS)
    search, need = _prepare(settings, flight, space=space, path=path, console=console, then=then)
    info = _info(search, settings, options, need)
    _check_same(path, then, info)
    with RunLock(path):
        folder = open_search(path, resume=resume)
        disk.sweep(path)
        folder.begin(dump(settings.config), info)
        _say_plan(console, search, options, info)
        signal_number = _take_trials(search, folder, options, console=console)
    _end(folder, console, signal_number)
    return folder


def _path_of(settings: Settings, *, resume: bool) -> Path:
    config = settings.config
    if resume and not config.output_dir:
        raise UserError("output_no_run", where="--resume", fix="resume_which")
    name = f"{Path(config.model or 'model').name.removesuffix('.gguf')}-tune"
    return Path(config.output_dir or next_run_path((config.data or ["data"])[0], name)).expanduser()


def _as_asked_then(options: Options, then: dict[str, Any] | None) -> Options:
    """Return the options with what is not given now as it was when the search began."""
    before = then["options"] if then else {}
    rates, ranks = before.get("rates"), before.get("ranks", ())
    return Options(
        options.num_trials or before.get("num_trials", NUM_TRIALS),
        options.timeout_s or before.get("timeout_s"),
        options.rates or (tuple(rates) if rates else None),
        options.ranks or tuple(ranks),
    )


def _shortened(flight: Preflight, num_steps: int) -> Preflight:
    """Return a preflight whose run is as long as a trial."""
    report = flight.prepared.report
    shorter = replace(report, steps=min(report.steps, num_steps))
    return replace(flight, prepared=replace(flight.prepared, report=shorter))


def _prepare(
    settings: Settings, flight: Preflight, *, space: Space, path: Path, console: Console, then: dict[str, Any] | None
) -> tuple[Search, dict[str, float]]:
    """Load the base, choose for all trials what "auto" leaves open, and measure what one takes.

    Measured with the highest rank, which needs the most memory. A search that goes on was measured when it began.
    """
    steps, eval_steps = flight.prepared.report.steps, settings.config.eval_steps
    chosen = {"max_steps": steps, "eval_steps": -(-steps // NUM_EVALUATIONS) if eval_steps == "auto" else eval_steps}
    trial_settings = settings.replaced(**(then["chosen"] if then else chosen), report_to=[])
    trial_settings, bare_model = load_bare(trial_settings, flight, console=console)
    held_out = _evaluated(trial_settings, flight)
    flight = replace(flight, bare_model=bare_model)
    search = Search(trial_settings, flight, held_out, space, path)
    if then:
        return search, then["need"]
    widest = trial_settings.replaced(**space.values(MEASURED_RATE, max(space.ranks)))
    with console.status("status.steps"):
        assembly = assemble(widest, flight, folder=path, console=Console(quiet=True))
        base_loss = _Judge(assembly.loop.engine, held_out).loss()
        need = forecast(replace(assembly, held_out=held_out), flight.prepared.train)
    found = {name: getattr(assembly.settings.config, name) for name in CHOSEN_KEYS}
    flight = replace(flight, bare_model=assembly.loop.engine.model.unload())
    return replace(search, settings=trial_settings.replaced(**found), flight=flight), _need(need, base_loss)


def _need(need: Forecast, base_loss: float) -> dict[str, float]:
    return {"trial_seconds": need.seconds, "step_seconds": need.seconds_per_step, "base_loss": base_loss}


def _evaluated(settings: Settings, flight: Preflight) -> Sequence[Row]:
    """Return as many held-out rows as EVAL_SHARE of a trial pays for."""
    config, held_out = settings.config, flight.prepared.held_out
    num_trained = min(int(config.max_steps or 1) * config.rows_per_step, 1 << 40)
    num_evaluations = 1 + -(-int(config.max_steps or 1) // int(config.eval_steps))
    affordable = int(EVAL_SHARE * STEP_COST * num_trained / num_evaluations)
    return list(held_out[: max(affordable, MIN_ROWS)])


def _info(search: Search, settings: Settings, options: Options, need: dict[str, float]) -> dict[str, Any]:
    """Return what tune.json says. `is_trial_length`: max_steps was given for the trials alone, by a flag."""
    config = search.settings.config
    return {
        "model": config.model,
        "data": config.data,
        "date": search.flight.renderer.date,
        "seed": config.seed,
        "versions": checkpoint.versions(),
        "machine": checkpoint.machine(),
        "options": asdict(options),
        "space": asdict(search.space),
        "given": search.given,
        "chosen": {name: getattr(config, name) for name in CHOSEN_KEYS},
        "is_trial_length": not settings.origins["max_steps"].rpartition(":")[2].isdecimal(),
        "num_held_out": len(search.held_out),
        "need": need,
        "identity": identity_of(config, search.flight),
    }


def _check_same(path: Path, then: dict[str, Any] | None, now: dict[str, Any]) -> None:
    """Raise UserError if the search that goes on is another one: its trials would not be comparable."""
    if then is None:
        return
    now["is_trial_length"] = then["is_trial_length"]
    pairs = {name: (then[name], now[name]) for name in ("space", "versions", "machine")}
    changed = [name for name, (before, after) in pairs.items() if _plain(before) != _plain(after)]
    changed += [
        name.removeprefix("config.")
        for name in sorted({*then["identity"], *now["identity"]})
        if then["identity"].get(name) != now["identity"].get(name)
    ]
    if changed:
        raise UserError("tune_changed", where=str(path), fix="tune_changed", names=", ".join(changed))


def _plain(value: dict[str, Any]) -> dict[str, Any]:
    """Return values as JSON gives them back."""
    return {name: list(item) if isinstance(item, tuple) else item for name, item in value.items()}


def _say_plan(console: Console, search: Search, options: Options, info: dict[str, Any]) -> None:
    """Say before it begins how long it will take, and what it compares."""
    seconds, num_trials = info["need"]["trial_seconds"], int(options.num_trials or 0)
    space, config = search.space, search.settings.config
    show_values(search.settings, console)
    console.say("tune.space", low=space.lowest_rate, high=space.highest_rate, ranks=", ".join(map(str, space.ranks)))
    console.say("tune.first", **search.given)
    console.say(
        "tune.plan",
        trials=num_trials,
        steps=config.max_steps,
        step_seconds=info["need"]["step_seconds"],
        minutes=num_trials * seconds / 60,
    )
    console.say("tune.rows", rows=len(search.held_out), total=len(search.flight.prepared.held_out))
    if options.timeout_s and num_trials * seconds > options.timeout_s:
        console.say("tune.budget", seconds=options.timeout_s, trials=max(int(options.timeout_s // seconds), 1))


def _take_trials(search: Search, folder: TuneDir, options: Options, *, console: Console) -> int | None:
    """Take the trials that are left; return the signal that ended the search, if one did."""
    trials = folder.read_trials()
    if trials:
        console.say("tune.resumed", trials=len(trials))
        # A kill may have come between the last line and these.
        tune_report.write(folder, lang=console.lang)
    with StopFlag() as stop:
        while len(trials) < int(options.num_trials or 0) and stop.signal is None:
            if not _fits(trials, options.timeout_s):
                console.say("tune.budget_used", seconds=options.timeout_s, trials=len(trials))
                break
            proposal = Proposal(
                search.space,
                trials,
                given=search.given,
                num_steps=int(search.settings.config.max_steps or 1),
                seed=search.settings.config.seed,
            )
            told = {"number": len(trials) + 1, "trials": options.num_trials, **proposal.values}
            with console.status("tune.trial", **told):
                trial = take_trial(search, proposal, number=len(trials), stop=stop)
            if trial is None:
                break
            _check_start(trial, folder.read_info()["need"]["base_loss"])
            trials.append(trial)
            folder.append(trial)
            tune_report.write(folder, lang=console.lang)
            console.write(tune_report.line(trial, console.lang))
    return stop.signal


def _fits(trials: Sequence[Trial], timeout_s: float | None) -> bool:
    """Return whether another trial, as long as the longest so far, ends in time; the first always begins."""
    if timeout_s is None or not trials:
        return True
    return sum(trial.seconds for trial in trials) + max(trial.seconds for trial in trials) <= timeout_s


def take_trial(search: Search, proposal: Proposal, *, number: int, stop: StopFlag) -> Trial | None:
    """Train with the values of a proposal, from fresh LoRA; return what came of it, or None if a signal came."""
    began = time.perf_counter()
    settings = search.settings.replaced(**proposal.values)
    quiet = Console(quiet=True)
    assembly = assemble(settings, search.flight, folder=search.path, console=quiet, is_begun=True)
    judge = _Judge(assembly.loop.engine, search.held_out)
    evaluations: list[tuple[int, float]] = []
    state, problem = COMPLETE, ""
    try:
        for event in assembly.loop.run(
            search.flight.prepared.train, evaluate=judge.loss, should_stop=lambda: stop.signal is not None
        ):
            if event["kind"] != "eval":
                continue
            evaluations.append((event["step"], event["eval_loss"]))
            is_last = event["step"] == assembly.loop.plan.num_steps
            if not is_last and event["step"] and proposal.is_hopeless(event["step"], event["eval_loss"]):
                state = PRUNED
                break
    except (NumericsError, MachineError) as error:
        # Not finite, or more memory than there is: of this trial, not of the search.
        state, problem = FAILED, str(error).partition("\n")[0]
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        state, problem = FAILED, str(error).partition("\n")[0]
    finally:
        assembly.loop.engine.model.unload()
    is_whole = bool(evaluations) and evaluations[-1][0] == assembly.loop.plan.num_steps
    if state == COMPLETE and not is_whole:
        return None
    return Trial(
        number=number,
        state=state,
        values=proposal.values,
        evaluations=tuple(evaluations),
        loss=evaluations[-1][1] if state == COMPLETE else None,
        seconds=time.perf_counter() - began,
        row_losses=tuple(judge.row_losses) if state == COMPLETE else (),
        row_tokens=tuple(judge.row_tokens) if state == COMPLETE else (),
        problem=problem,
    )


class _Judge:
    """Measures the held-out loss and remembers each row's part of it."""

    def __init__(self, engine: Engine, rows: Sequence[Row]) -> None:
        self._engine, self._rows = engine, rows
        self.row_losses: list[float] = []
        self.row_tokens: list[int] = []

    def loss(self) -> float:
        """Return the mean loss (nats a learned token) of the model as it is."""
        found = iter(score(self._engine, pairs_of(self._rows)))
        by_row = [[next(found).losses_A for _ in row.pairs] for row in self._rows]
        self.row_losses = [float(sum(part.sum() for part in parts)) for parts in by_row]
        self.row_tokens = [sum(len(part) for part in parts) for parts in by_row]
        return sum(self.row_losses) / sum(self.row_tokens)


def _check_start(trial: Trial, base_loss: float) -> None:
    """Raise NumericsError if a trial did not begin at the base's own loss: fresh LoRA adds exactly nothing.

    A trial that began elsewhere would have gone on with what another one learned.
    """
    start = trial.evaluations[0][1] if trial.evaluations else base_loss
    if start != base_loss:
        where = f"trial {trial.number + 1}"
        raise NumericsError("tune_not_fresh", where=where, fix="tune_not_fresh", base=base_loss, start=start)


def _end(folder: TuneDir, console: Console, signal_number: int | None) -> None:
    """Show what was found, and end as the search ended."""
    trials = folder.read_trials()
    if trials:
        console.blank()
        tune_report.show(folder, console)
    if signal_number is not None:
        raise Stopped(signal_number, where=str(folder.path))
    if not by_loss(trials):
        raise NumericsError("tune_all_failed", where=str(folder.path), fix="tune_all_failed", count=len(trials))
