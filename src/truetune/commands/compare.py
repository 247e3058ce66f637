"""`truetune compare RUN [-m TEXT ...]`: the answers of base and tuned model side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from truetune.cli import answer_options
from truetune.errors import UserError
from truetune.messages import text
from truetune.rundir import RunDir

if TYPE_CHECKING:
    from truetune.records import Message


def command(lang: str) -> click.Command:
    """Return the command, described in `lang`."""

    def run(path: str | None, questions: tuple[str, ...], no_run_system: bool, max_new_tokens: int) -> None:
        from truetune.console import Console
        from truetune.use import load, newest_run

        console = Console(lang)
        chosen = Path(path).expanduser() if path else newest_run()
        prompts: list[list[Message]] = [[{"role": "user", "content": question}] for question in questions]
        prompts = prompts or _prompts_of(RunDir(chosen))
        if not prompts:
            raise UserError("compare_nothing", where=str(chosen), fix="compare_nothing")
        with console.status("status.load_use", name=chosen):
            model = load(chosen, use_run_system=not no_run_system)
        if not model.has_adapter:
            raise UserError("compare_no_adapter", where=str(chosen), fix="compare_no_adapter")
        with console.status("status.answering", count=len(prompts)):
            base = model.answers(prompts, is_base=True, max_new_tokens=max_new_tokens)
            tuned = model.answers(prompts, max_new_tokens=max_new_tokens)
        for prompt, before, after in zip(prompts, base, tuned, strict=True):
            console.side_by_side(str(prompt[-1]["content"]), {"card.base": before, "card.tuned": after})

    return click.Command(
        "compare",
        callback=run,
        help=text("command.compare", lang),
        params=[
            click.Argument(["path"], required=False, metavar="[RUN|ADAPTER]"),
            click.Option(
                ["-m", "--message", "questions"],
                multiple=True,
                metavar="TEXT",
                help=text("help.compare_message", lang),
            ),
            *answer_options(lang, max_new_tokens=256),
        ],
    )


def _prompts_of(run: RunDir) -> list[list[Message]]:
    """Return prompts of the run's own rows: held-out ones, else trained ones."""
    from truetune.data.store import StoredRows
    from truetune.samples import NUM_PROMPTS, choose_prompts

    for name in ("eval.arrow", "train.arrow"):
        path = run.data / name
        rows = StoredRows(path) if path.is_file() else []
        if prompts := choose_prompts(list(rows[: 4 * NUM_PROMPTS]), None):
            return prompts
    return []
