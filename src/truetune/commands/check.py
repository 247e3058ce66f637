"""`truetune check DATA... --model M`: what would be learned, without loading weights; --measure: what it will need."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from truetune.cli import config_options, given
from truetune.config import resolve
from truetune.disk import file_to_write, to_json, write_atomic
from truetune.errors import UserError
from truetune.messages import text

if TYPE_CHECKING:
    from truetune.config import Settings
    from truetune.console import Console
    from truetune.preflight import Preflight
    from truetune.records import Row

# What changes the numbers shown.
KEYS = (
    *(
        "model",
        "revision",
        "hub",
        "data_weights",
        "encoding",
        "eval_data",
        "eval_split",
        "system",
        "input_join",
        "template",
    ),
    *("chat_template_kwargs", "train_on", "max_length", "overlong", "invalid", "batch_size", "num_train_epochs"),
    *("loss", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "seed"),
    # What changes time and memory.
    *("finetuning", "lora_r", "lora_alpha", "lora_dropout", "target_modules"),
    *("dtype", "attention", "gradient_checkpointing"),
    *("max_tokens_per_forward", "eval_steps"),
)


def command(lang: str) -> click.Command:
    """Return the command, described in `lang`."""

    def run(
        data: tuple[str, ...],
        config_file: str | None,
        show: str | None,
        measure: bool,
        **values: Any,
    ) -> int:
        json_file, html_file, store = (values.pop(name) for name in ("json_file", "html_file", "store"))
        # Every row is checked here, also of what will be streamed.
        settings = resolve(given(values, data), Path(config_file) if config_file else None).replaced(streaming=False)
        from truetune.console import Console
        from truetune.preflight import preflight, require_usable, show_refused, show_report

        console = Console(lang)
        flight = preflight(settings.config, console)
        report = flight.prepared.report
        show_report(report, console)
        if show:
            _show(show, flight, console)
        if show != "refused":
            show_refused(report, console)
        facts = dataclasses.asdict(report)
        if measure:
            require_usable(report, skip_invalid=settings.config.invalid == "skip")
            facts |= _measure(settings, flight, console)
        if store:
            from truetune.output import write_data

            write_data(Path(store).expanduser(), flight, max_length=settings.config.max_length)
        # After the rows: who waits for the report finds them.
        if json_file:
            write_atomic(file_to_write(json_file), to_json(facts, indent=2) + "\n")
        if html_file:
            from truetune.page import write_page

            write_page(file_to_write(html_file), flight, config=settings.config, lang=lang)
        return 2 if report.rows_refused else 0

    return click.Command(
        "check",
        callback=run,
        help=text("command.check", lang),
        params=[
            click.Argument(["data"], nargs=-1),
            click.Option(["--show"], metavar="N|longest|refused|duplicates", help=text("help.show", lang)),
            click.Option(["--measure"], is_flag=True, help=text("help.measure", lang)),
            click.Option(["--json", "json_file"], metavar="FILE", help=text("help.json", lang)),
            click.Option(["--html", "html_file"], metavar="FILE", help=text("help.html", lang)),
            click.Option(["--store"], metavar="FOLDER", help=text("help.store", lang)),
            *config_options(lang, KEYS),
        ],
    )


def _measure(settings: Settings, flight: Preflight, console: Console) -> dict[str, Any]:
    """Load the model, run a few steps and print what the whole run will need."""
    import tempfile

    from truetune.assembly import assemble
    from truetune.measure import forecast

    with tempfile.TemporaryDirectory() as folder:
        assembly = assemble(settings, flight, folder=Path(folder), console=console)
        with console.status("status.steps"):
            need = forecast(assembly, flight.prepared.train)
    minutes, seconds = divmod(round(need.seconds), 60)
    console.pairs(
        "measure.title",
        [
            ("label.time", console.text("measure.time", minutes=minutes, seconds=seconds, step=need.seconds_per_step)),
            ("label.memory", console.text("measure.memory", gigabytes=need.peak_bytes / 1e9)),
        ],
    )
    return {"measured": dataclasses.asdict(need)}


def _show(what: str, flight: Preflight, console: Console) -> None:
    """Print the rows asked for, learned tokens coloured."""
    import numpy as np

    from truetune.preflight import show_refused

    prepared = flight.prepared
    # Both sides are of one file; of all its rows only those that are shown are read.
    rows = prepared.train.chosen(np.sort(np.concatenate([prepared.train.numbers, prepared.held_out.numbers])))
    if what == "refused":
        show_refused(prepared.report, console, limit=None)
    elif what == "duplicates":
        _show_duplicates(flight, console)
    elif what == "longest":
        longest = int(rows.longest_pairs().argmax()) if len(rows) else 0
        _show_rows(rows[longest : longest + 1], flight, console)
    elif what.isdecimal() and what.isascii():
        _show_rows(rows[: int(what)], flight, console)
    else:
        raise UserError("show", where="--show", fix="show", value=what)


def _show_duplicates(flight: Preflight, console: Console) -> None:
    groups = flight.prepared.duplicates()
    for group in groups:
        hidden = group.count - len(group.others)
        more = console.text("check.more_places", count=hidden) if hidden else ""
        console.say("check.duplicate", where=group.where, count=group.count, places=", ".join(group.others), more=more)
    if not groups:
        console.say("check.no_duplicates")


def _show_rows(rows: Sequence[Row], flight: Preflight, console: Console) -> None:
    for row in rows:
        for pair in row.pairs:
            console.say(
                "check.row", style="bold", where=row.where, prompt=len(pair.prompt_ids), answer=len(pair.answer_ids)
            )
            console.pair_view(flight.renderer.tokenizer, pair)
