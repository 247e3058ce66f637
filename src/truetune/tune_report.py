"""What a search found, to read: best.yaml, tune.md, tune.html (one page that needs nothing else), and the screen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from truetune.config import Config, dump, resolve
from truetune.console import Console
from truetune.disk import write_atomic
from truetune.messages import text
from truetune.search import COMPLETE, FAILED, PRUNED, Trial, by_loss, difference
from truetune.templates import render
from truetune.tunedir import TuneDir

MARKDOWN, PAGE = "tune.md", "tune.html"

COLUMNS = ("trial", "learning_rate", "lora_r", "held_out", "behind", "state", "seconds")
STATES = {COMPLETE: "tune.complete", PRUNED: "tune.pruned", FAILED: "tune.failed"}

Values = dict[str, Any]


def write(folder: TuneDir, *, lang: str) -> None:
    """Write what the trials so far say into the search's folder; best.yaml if one of them is complete."""
    trials = folder.read_trials()
    best = next(iter(by_loss(trials)), None)
    if best is not None:
        write_atomic(folder.best, dump(best_config(folder, best)))
    values = _values(folder, trials, lang)
    write_atomic(folder.path / MARKDOWN, render(MARKDOWN, lang, **values))
    write_atomic(folder.path / PAGE, render(PAGE, lang, **values, plot=_plot(trials, best, lang)))


def best_config(folder: TuneDir, best: Trial) -> Config:
    """Return the configuration as given with the values of a trial, to train with.

    A number of steps that was a flag is that of the trials; in a file it is the run's, and stays.
    """
    changed: Values = {**best.values, "output_dir": None}
    if folder.read_info()["is_trial_length"]:
        changed["max_steps"] = None
    return resolve({}, folder.config).replaced(**changed).config


def show(folder: TuneDir, console: Console) -> None:
    """Print the trials by loss, what they say, and how to train with the best."""
    trials = folder.read_trials()
    console.table([f"column.{name}" for name in COLUMNS], table(trials, console.lang))
    console.blank()
    for sentence in sentences(folder, trials, lang=console.lang):
        console.write(sentence)
    if by_loss(trials):
        console.say("tune.path", path=folder.path / PAGE)
        console.say("tune.train", path=folder.best)


def line(trial: Trial, lang: str) -> str:
    """Return one line about a trial that ended."""
    step, loss = trial.evaluations[-1] if trial.evaluations else (0, math.nan)
    told = {"number": trial.number + 1, "step": step, "loss": loss, "seconds": trial.seconds, "problem": trial.problem}
    key = {COMPLETE: "tune.ended", PRUNED: "tune.given_up", FAILED: "tune.broke"}[trial.state]
    return text(key, lang, **told)


def table(trials: Sequence[Trial], lang: str) -> list[list[str]]:
    """Return the cells of the trials: complete ones by loss, then the others as they came."""
    ranked = by_loss(trials)
    rows = [_cells(trial, ranked[0], lang) for trial in ranked]
    return rows + [_cells(trial, None, lang) for trial in trials if trial.state != COMPLETE]


def _cells(trial: Trial, best: Trial | None, lang: str) -> list[str]:
    behind = "-"
    if best is not None and best is not trial:
        found = difference(best, trial)
        behind = f"+{found.mean:.4f} ± {found.standard_error:.4f}"
    last = trial.evaluations[-1] if trial.evaluations else None
    shown = f"{trial.loss:.4f}" if trial.loss is not None else f"({last[1]:.4f}, {last[0]})" if last else "-"
    return [
        str(trial.number + 1),
        f"{trial.values['learning_rate']:.3g}",
        str(trial.values["lora_r"]),
        shown,
        behind,
        text(STATES[trial.state], lang),
        f"{trial.seconds:.1f}",
    ]


def sentences(folder: TuneDir, trials: Sequence[Trial], *, lang: str) -> list[str]:
    """Return in plain words what was found, and whether it is more than noise."""
    ranked, counts = by_loss(trials), {state: sum(trial.state == state for trial in trials) for state in STATES}
    said = []
    if ranked:
        best, given = ranked[0], next((trial for trial in ranked if trial.number == 0), None)
        rows = len(best.row_losses)
        said.append(text("tune.best", lang, **best.values, loss=best.loss, trials=len(trials)))
        if given is None:
            said.append(text("tune.given_failed", lang))
        elif given is best:
            said.append(text("tune.given_best", lang))
        else:
            found = difference(best, given)
            key = "tune.gain_noise" if found.is_noise else "tune.gain"
            told = {"given": given.loss, "gain": found.mean, "error": found.standard_error, "rows": rows}
            said.append(text(key, lang, **told))
        close = sum(difference(best, trial).is_noise for trial in ranked[1:])
        if close:
            said.append(text("tune.close", lang, count=close))
        said.append(text("tune.caution", lang, steps=folder.read_info()["chosen"]["max_steps"]))
    if counts[PRUNED] or counts[FAILED]:
        said.append(text("tune.counts", lang, pruned=counts[PRUNED], failed=counts[FAILED]))
    return said


def _values(folder: TuneDir, trials: Sequence[Trial], lang: str) -> Values:
    info = folder.read_info()
    words = {
        "scatter": text("tune.scatter", lang),
        "curves": text("tune.curves", lang),
        "rank": text("tune.rank", lang),
        "legend": text("tune.legend", lang),
        "best_mark": text("tune.best_mark", lang),
    }
    return {
        "title": text("tune.title", lang, name=folder.path.name),
        "info": info,
        "sentences": sentences(folder, trials, lang=lang),
        "columns": [text(f"column.{name}", lang) for name in COLUMNS],
        "rows": table(trials, lang),
        "word": words,
        "command": f"truetune train --config {folder.best}",
    }


def _plot(trials: Sequence[Trial], best: Trial | None, lang: str) -> Values:
    """Return points and curves in squares of 100, y downwards: the lowest loss at 96, the highest shown at 4.

    What is worse than the base lies at the top, or everything else would be one line at the bottom.
    """
    shown = [trial for trial in trials if trial.evaluations]
    if not shown:
        return {"points": [], "curves": []}
    losses = [loss for trial in shown for _, loss in trial.evaluations]
    base, lowest = shown[0].evaluations[0][1], min(losses)
    ends = [min(trial.evaluations[-1][1], base) for trial in shown]
    rates = [math.log(trial.values["learning_rate"]) for trial in trials]
    ranks = sorted({trial.values["lora_r"] for trial in trials})
    steps = max(step for trial in shown for step, _ in trial.evaluations)
    colours = {
        rank: f"hsl({round(210 + 300 * at / max(len(ranks), 1)) % 360} 65% 50%)" for at, rank in enumerate(ranks)
    }

    def curve(trial: Trial) -> list[tuple[float, float]]:
        return [(round(100 * step / max(steps, 1), 2), _height(loss, lowest, base)) for step, loss in trial.evaluations]

    def look(trial: Trial) -> Values:
        return {"colour": colours[trial.values["lora_r"]], "state": trial.state, "title": line(trial, lang)}

    points = [
        {"x": _place(rate, rates), "y": _height(_last(trial, max(ends)), lowest, max(ends)), **look(trial)}
        for trial, rate in zip(trials, rates, strict=True)
    ]
    return {
        "points": points,
        "best": points[best.number] if best is not None else None,
        "curves": [{"line": curve(trial), **look(trial)} for trial in shown],
        "colours": colours,
        "rates": [f"{math.exp(rate):.1e}" for rate in (min(rates), max(rates))],
        "ends": [f"{loss:.4f}" for loss in (max(ends), min(ends))],
        "losses": [f"{loss:.4f}" for loss in (base, lowest)],
        "steps": steps,
    }


def _last(trial: Trial, otherwise: float) -> float:
    return trial.evaluations[-1][1] if trial.evaluations and trial.state != FAILED else otherwise


def _place(value: float, values: Sequence[float]) -> float:
    """Return x between 4 and 96.

    >>> _place(1.0, [0.0, 2.0]), _place(1.0, [1.0])
    (50.0, 50.0)
    """
    low, high = min(values), max(values)
    return round(4 + 92 * (value - low) / (high - low), 2) if high > low else 50.0


def _height(loss: float, lowest: float, highest: float) -> float:
    """Return y between 4 (the highest loss shown, and all above) and 96 (the lowest)."""
    span = highest - lowest
    return round(96 - 92 * min(max((loss - lowest) / span, 0.0), 1.0), 2) if span > 0 else 50.0
