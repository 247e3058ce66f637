"""`truetune merge RUN --output-dir DIR`: base and adapter as one folder, proven by reading it back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from truetune.messages import text

if TYPE_CHECKING:
    from truetune.console import Console
    from truetune.drift import Drift


def command(lang: str) -> click.Command:
    """Return the command, described in `lang`."""

    def run(run: str, output_dir: str, dtype: str) -> None:
        from truetune.console import Console
        from truetune.merge import merge
        from truetune.source import find

        console = Console(lang)
        source = find(run)
        with console.status("status.merge", name=run):
            merged = merge(source, output=Path(output_dir).expanduser(), dtype=dtype)
        console.say("merge.done", path=merged.folder, dtype=merged.dtype)
        say_drift(merged.drift, console)
        if merged.trained is not None:
            console.say("merge.quantised", kind=source.base.quantization, **merged.trained.facts())
        console.say("merge.lost", lost=merged.lost, dtype=merged.dtype, learned=merged.learned)
        if source.renderer.system:
            console.say("merge.system", system=source.renderer.system)

    return click.Command(
        "merge",
        callback=run,
        help=text("command.merge", lang),
        params=[
            click.Argument(["run"]),
            click.Option(["--output-dir"], required=True, metavar="DIR", help=text("help.merge_output", lang)),
            click.Option(
                ["--dtype"],
                type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
                default="auto",
                help=text("help.merge_dtype", lang),
            ),
        ],
    )


def say_drift(drift: Drift, console: Console) -> None:
    """Say how far what was read back is from base and adapter."""
    console.say("merge.drift", **drift.facts())
