"""`truetune runs [FOLDER]`: data, model, steps, losses and state of every run."""

from __future__ import annotations

from pathlib import Path

import click

from truetune.errors import UserError
from truetune.lock import owner_of
from truetune.messages import text
from truetune.rundir import RunDir, list_runs, outcome


def command(lang: str) -> click.Command:
    """Return the command, described in `lang`."""

    def run(folder: str) -> None:
        from truetune.console import Console

        console = Console(lang)
        if folder != "runs" and not Path(folder).is_dir():
            raise UserError("no_folder", where=folder, fix="no_folder", folder=folder)
        runs = list_runs(Path(folder))
        if not runs:
            console.say("runs.none", folder=folder)
            return
        columns = ("run", "data", "model", "steps", "loss", "held_out", "state")
        console.table([f"column.{name}" for name in columns], [_row(run, lang) for run in runs])

    return click.Command(
        "runs",
        callback=run,
        help=text("command.runs", lang),
        params=[click.Argument(["folder"], default="runs")],
    )


def _row(run: RunDir, lang: str) -> list[str]:
    info, result = run.read_info(), outcome(run)
    losses = [loss for loss in (result.eval_loss_before, result.eval_loss_after) if loss is not None]
    return [
        str(run.path),
        ", ".join(Path(name).name for name in info["data"]),
        Path(str(info["model"])).name,
        f"{result.steps}/{info['steps']}",
        f"{result.loss:.3f}" if result.loss is not None else "-",
        " → ".join(f"{loss:.3f}" for loss in losses) or "-",
        _state(run, lang),
    ]


def _state(run: RunDir, lang: str) -> str:
    """A run that says it is running, and that nobody writes into, was killed."""
    state = str(run.read_info()["state"])
    return text("runs.killed", lang) if state == "running" and owner_of(run.path) is None else state
