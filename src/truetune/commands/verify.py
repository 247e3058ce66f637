"""`truetune verify RUN [--resume-exact K]`: every file against its manifest; K steps again, compared to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from truetune.errors import MachineError, NumericsError, UserError
from truetune.messages import text
from truetune.rundir import RunDir

if TYPE_CHECKING:
    from truetune.console import Console


def command(lang: str) -> click.Command:
    """Return the command, described in `lang`."""

    def run(run: str, resume_exact: int | None) -> None:
        from truetune.console import Console

        console, folder = Console(lang), RunDir(Path(run).expanduser())
        if not folder.is_run:
            raise UserError("verify_no_run", where=run, fix="verify_no_run")
        _look(folder, console)
        if resume_exact is not None:
            _retake(folder, resume_exact, console)

    return click.Command(
        "verify",
        callback=run,
        help=text("command.verify", lang),
        params=[
            click.Argument(["run"]),
            click.Option(["--resume-exact"], type=click.IntRange(min=1), metavar="K", help=text("help.exact", lang)),
        ],
    )


def _look(run: RunDir, console: Console) -> None:
    from truetune.verify import look

    damaged = 0
    for finding in look(run):
        if finding.problem is None:
            console.say("verify.good", name=finding.name)
        else:
            damaged += 1
            console.say("verify.bad", style="bold red", name=finding.name, problem=finding.problem)
    if damaged:
        raise MachineError("verify_damaged", where=str(run.path), fix="verify_damaged", count=damaged)


def _retake(run: RunDir, num_steps: int, console: Console) -> None:
    from truetune.verify import retake

    with console.status("status.retake", steps=num_steps):
        found = retake(run, num_steps, lang=console.lang)
    if found.difference is not None:
        where = f"{run.path}, step {found.start}"
        raise NumericsError("not_exact", where=where, fix="not_exact", difference=found.difference)
    key = "verify.exact_state" if found.has_state else "verify.exact"
    console.say(key, start=found.start, steps=found.num_steps, count=found.num_compared)
