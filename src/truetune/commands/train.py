"""`truetune train DATA... --model M`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from truetune import report
from truetune.cli import config_options, given
from truetune.config import resolve
from truetune.messages import text
from truetune.place import read_place
from truetune.rundir import RunDir


def command(lang: str) -> click.Command:
    """Return the command, described in `lang`."""

    def run(
        data: tuple[str, ...],
        config_file: str | None,
        resume: bool,
        allow_changed: bool,
        skip_bad: int,
        **values: Any,
    ) -> int:
        flags = given(values, data)
        path = Path(config_file) if config_file else None
        if resume and path is None and flags.get("output_dir"):
            # The values in force then, what "auto" chose included.
            saved = RunDir(Path(flags["output_dir"]).expanduser()).config
            path = saved if saved.is_file() else None
        settings = resolve(flags, path)
        place = read_place()
        if place.size == 1 and settings.config.devices > 1:
            from truetune.launch import launch

            return launch(click.get_current_context().obj, settings.config.devices)
        from truetune.console import Console
        from truetune.training import train

        console = Console(lang)
        result = train(settings, console, resume=resume, allow_changed=allow_changed, skip_bad=skip_bad)
        if place.rank == 0:
            console.blank()
            report.show(result.path, console)
            console.say("train.chat", path=result.path)
        return 0

    return click.Command(
        "train",
        callback=run,
        help=text("command.train", lang),
        params=[
            click.Argument(["data"], nargs=-1),
            click.Option(["--resume"], is_flag=True, help=text("help.resume", lang)),
            click.Option(["--allow-changed"], is_flag=True, help=text("help.allow_changed", lang)),
            click.Option(
                ["--skip-bad"], type=click.IntRange(min=0), default=0, metavar="N", help=text("help.skip_bad", lang)
            ),
            *config_options(lang),
        ],
    )
