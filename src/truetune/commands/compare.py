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
    from truetune.records import Row


def command(lang: str) -> click.Command:
    """Return the command, described in `lang`."""

    def run(path: str | None, questions: tuple[str, ...], no_run_system: bool, max_new_tokens: int) -> None:
        from truetune.console import Console
        from truetune.generate import Sampling, both_replies
        from truetune.samples import choose_prompts
        from truetune.use import load, newest_run

        console = Console(lang)
        chosen = Path(path).expanduser() if path else newest_run()
        rows = [] if questions else _rows_of(RunDir(chosen))
        if not questions and not rows:
            raise UserError("compare_nothing", where=str(chosen), fix="compare_nothing")
        with console.status("status.load_use", name=chosen):
            model = load(chosen, use_run_system=not no_run_system)
        if not model.has_adapter:
            raise UserError("compare_no_adapter", where=str(chosen), fix="compare_no_adapter")
        if no_run_system:
            # As a question: what was trained has the run's system prompt in it.
            questions = questions or tuple(
                prompt.text for prompt in choose_prompts(rows, None, renderer=model.renderer)
            )
        prompts = choose_prompts(rows, questions or None, renderer=model.renderer)
        if model.quantization:
            console.say("use.quantised", kind=model.quantization)
        with console.status("status.answering", count=len(prompts)):
            ids, sampling = [prompt.ids for prompt in prompts], Sampling(max_new_tokens)
            sides = both_replies(model.model, model.renderer, prompts=ids, sampling=sampling)
        for prompt, base, tuned in zip(prompts, *sides, strict=True):
            console.side_by_side(prompt.text, {"card.base": base.text, "card.tuned": tuned.text})

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


def _rows_of(run: RunDir) -> list[Row]:
    """Return the first rows of the run that can be asked: held-out ones, else trained ones."""
    from truetune.data.store import StoredRows
    from truetune.samples import NUM_PROMPTS

    for name in ("eval.arrow", "train.arrow"):
        path = run.data / name
        rows = [row for row in StoredRows(path)[: 4 * NUM_PROMPTS] if row.prompt] if path.is_file() else []
        if rows:
            return rows
    return []
