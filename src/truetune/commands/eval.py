"""`truetune eval RUN_or_MODEL DATA`: loss, perplexity, token accuracy and answers on given rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from truetune.cli import answer_options, config_options, given
from truetune.config import Config, resolve
from truetune.disk import file_to_write, to_json, write_atomic
from truetune.messages import text
from truetune.rundir import RunDir

if TYPE_CHECKING:
    from truetune.console import Console
    from truetune.data.prepare import Prepared
    from truetune.evaluate import Metrics
    from truetune.records import Row
    from truetune.use import Model

KEYS = ("encoding", "input_join", "train_on", "max_length", "overlong", "invalid")
"""How rows are read; of a run, as they were read for it."""

MAX_TOKENS = 2048
"""Tokens of one forward."""

CHUNK_ROWS = 64


def command(lang: str) -> click.Command:
    """Return the command, described in `lang`."""

    def run(
        path: str,
        data: tuple[str, ...],
        answers_file: str | None,
        json_file: str | None,
        **values: Any,
    ) -> None:
        config = _config(path, given(values, data), values["config_file"])
        answers_path = file_to_write(answers_file) if answers_file else None
        json_path = file_to_write(json_file) if json_file else None
        from truetune.console import Console
        from truetune.use import load

        console = Console(lang)
        with console.status("status.load_use", name=path):
            model = load(path, use_run_system=not values["no_run_system"])
        if model.quantization:
            console.say("use.quantised", kind=model.quantization)
        rows = list(_prepared(config, model, console).train)
        with console.status("status.eval", rows=len(rows)):
            sides = measured(model, rows)
        _show(sides, model.name, console)
        if json_path:
            write_atomic(json_path, to_json(_facts(sides), indent=2) + "\n")
        if answers_path:
            with console.status("status.answering", count=len(rows)):
                lines = list(_answered(model, rows, max_new_tokens=values["max_new_tokens"]))
            write_atomic(answers_path, "".join(to_json(line) + "\n" for line in lines))
            console.say("eval.answers", path=answers_path)

    return click.Command(
        "eval",
        callback=run,
        help=text("command.eval", lang),
        params=[
            click.Argument(["path"], metavar="RUN|MODEL"),
            click.Argument(["data"], nargs=-1, required=True),
            click.Option(["--answers", "answers_file"], metavar="FILE", help=text("help.answers", lang)),
            click.Option(["--json", "json_file"], metavar="FILE", help=text("help.json", lang)),
            *answer_options(lang),
            *config_options(lang, KEYS),
        ],
    )


def _config(path: str, flags: dict[str, Any], config_file: str | None) -> Config:
    """Return how the rows are read: as for the run, but for what is asked otherwise; none is held out or weighed."""
    run = RunDir(Path(path).expanduser())
    source = Path(config_file) if config_file else run.config if run.is_run else None
    return resolve(flags | {"eval_data": [], "eval_split": 0, "data_weights": []}, source).config


def _prepared(config: Config, model: Model, console: Console) -> Prepared:
    """Read the rows as training reads them, with the model's own renderer.

    Raises: UserError if rows are refused and may not be skipped.
    """
    from truetune.data.prepare import prepare
    from truetune.preflight import require_usable, show_refused

    with console.counting("status.rows") as count:
        prepared = prepare(config, model.renderer, lang=console.lang, on_progress=count)
    show_refused(prepared.report, console)
    require_usable(prepared.report, skip_invalid=config.invalid == "skip")
    return prepared


def measured(model: Model, rows: Sequence[Row]) -> dict[str, Metrics]:
    """Return the metrics of base and tuned model on `rows`; of a model without adapter, its own as "base".

    Computed by the model's own code, row by row, so that nothing but the model has to be trusted.
    """
    from truetune.engine.score import score
    from truetune.engine.step import Engine, scaled_from
    from truetune.evaluate import rate
    from truetune.generate import base_only
    from truetune.model import pad_id
    from truetune.records import pairs_of

    filler = pad_id(model.renderer.tokenizer)
    engine = Engine(model.model, "plain", filler, MAX_TOKENS, scaled_from(model.model))
    chunks = [rows[start : start + CHUNK_ROWS] for start in range(0, len(rows), CHUNK_ROWS)]
    sides = {}
    for side in ("base", "tuned") if model.has_adapter else ("base",):
        with base_only(model.model, is_on=side == "base"):
            sides[side] = rate(rows, [one for chunk in chunks for one in score(engine, pairs_of(chunk))])
    return sides


def _facts(sides: dict[str, Metrics]) -> dict[str, Any]:
    return {name: metrics.to_dict() for name, metrics in sides.items()}


def _show(sides: dict[str, Metrics], name: str, console: Console) -> None:
    from truetune.report import METRICS, metric

    console.say("eval.title", style="bold", name=name, count=sides["base"].num_rows)
    facts = _facts(sides)
    lines = [[console.text(f"card.{key}"), *(metric(key, side) for side in facts.values())] for key in METRICS]
    titles = [f"card.{side}" for side in sides] if len(sides) > 1 else ["card.value"]
    console.table(["card.metric", *titles], lines)


def _answered(model: Model, rows: Sequence[Row], *, max_new_tokens: int) -> Iterator[dict[str, Any]]:
    """Yield each row that has a prompt with the model's answer, and its base's."""
    from truetune.generate import Sampling, base_only, replies

    asked = [row for row in rows if row.prompt]
    answers: dict[str, list[str]] = {}
    for side in ("base", "answer") if model.has_adapter else ("answer",):
        with base_only(model.model, is_on=side == "base"):
            ids = [row.pairs[-1].prompt_ids for row in asked]
            some = replies(model.model, model.renderer, prompts=ids, sampling=Sampling(max_new_tokens))
        answers[side] = [reply.text for reply in some]
    for number, row in enumerate(asked):
        line = {"where": row.where, "messages": list(row.prompt), "expected": row.answer}
        yield line | {side: texts[number] for side, texts in answers.items()}
