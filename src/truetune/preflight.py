"""What happens before any weights are loaded: find the base, build the renderer, prepare the data, show the report."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from truetune.config import Config
from truetune.console import Console
from truetune.data.head import prepare_stream
from truetune.data.prepare import Prepared, prepare
from truetune.data.template import Renderer, build_renderer
from truetune.errors import UserError
from truetune.messages import text
from truetune.model import Base, choose_dtype, eos_ids, find_base, load_tokenizer, prepare_base
from truetune.quantisation import require
from truetune.records import Report
from truetune.weights import FULL_BYTES, count_parameters, needed_bytes, num_embeddings

MAX_REFUSED_SHOWN = 10


@dataclass(frozen=True)
class Preflight:
    """A base, its renderer and the data, checked. `bare_model`: the base's weights, where they are loaded already."""

    base: Base
    renderer: Renderer
    prepared: Prepared
    bare_model: Any = None


def preflight(config: Config, console: Console, *, date: str | None = None) -> Preflight:
    """Check everything about a run that can be checked without its weights. `date`: what the template's clock says.

    Raises: UserError if the model or a data file cannot be used.
    """
    if not config.data:
        raise UserError("no_data", where="data", fix="no_data")
    if config.model is None:
        raise UserError("no_model", where="--model", fix="no_model")
    base = find_base(config.model, revision=config.revision, hub=config.hub, quantization=config.quantization)
    if not base.folder.exists():
        with console.status("status.convert", name=base.title):
            prepare_base(base)
    if base.quantization is not None:
        require(base.quantization, folder=base.folder, name=base.title)
    if base.is_gguf:
        _say_gguf(base, config, console)
    with console.status("status.read"):
        renderer = build_renderer(
            load_tokenizer(base.folder),
            eos_ids(base.folder),
            template=config.template,
            system=config.system,
            template_kwargs=config.chat_template_kwargs,
            date=date,
        )
    with console.counting("status.rows") as count:
        prepare_rows = prepare_stream if config.streaming else prepare
        prepared = prepare_rows(config, renderer, lang=console.lang, on_progress=count)
    _check_ids(base, prepared)
    if config.finetuning == "full":
        note = _need(base, config.dtype, console)
        prepared = replace(prepared, report=replace(prepared.report, notes=[*prepared.report.notes, note]))
    return Preflight(base, renderer, prepared)


def _need(base: Base, dtype: str, console: Console) -> str:
    """Return what is said of the memory that full fine-tuning needs at least, whatever the data are."""
    chosen, _ = choose_dtype(dtype)
    each, count = FULL_BYTES[chosen], count_parameters(base.folder)
    key = "note.full" if chosen == "float32" else "note.full_copy"
    return console.text(key, each=each, count=count, gigabytes=each * count / 1e9)


def _say_gguf(base: Base, config: Config, console: Console) -> None:
    """Say what the weights of a GGUF file take in memory: not what they take in the file."""
    dtype, _ = choose_dtype(config.dtype)
    gigabytes = needed_bytes(base.folder, dtype=dtype, quantization=base.quantization) / 1e9
    file = Path(base.name).expanduser().stat().st_size / 1e9
    console.say("preflight.gguf", file=file, memory=gigabytes, kind=base.quantization or dtype)


def _check_ids(base: Base, prepared: Prepared) -> None:
    """Refuse token ids that the model has no embedding for: a tokenizer that was extended, and a model that was not.

    Raises: UserError with both numbers.
    """
    num_rows, highest = num_embeddings(base.folder), prepared.train.highest_id()
    if num_rows is not None and highest >= num_rows:
        raise UserError("tokenizer_too_large", where=base.title, fix="tokenizer_too_large", id=highest, rows=num_rows)
    if prepared.feed is not None:
        prepared.feed.num_ids = num_rows


def report_lines(report: Report, lang: str) -> list[tuple[str, str]]:
    """Return the report as (label, value): the label a catalogue key, the value in `lang`."""
    learned = text(
        "report.learned",
        lang,
        learned=report.learned_tokens,
        share=report.learned_tokens / max(report.total_tokens, 1),
        template_share=report.learned_template_tokens / max(report.learned_tokens, 1),
    )
    quantiles = report.quantiles or {"p50": 0, "p90": 0, "p99": 0}
    saved = 1 - report.trie_tokens / max(report.total_tokens, 1)
    return [
        ("label.rows_read", f"{report.rows_read:,}"),
        ("label.rows_used", text("report.used", lang, used=report.rows_used, held_out=report.rows_held_out)),
        ("label.rows_refused", f"{report.rows_refused:,}"),
        ("label.formats", ", ".join(f"{name} {count:,}" for name, count in report.formats.items()) or "-"),
        ("label.exact_duplicates", f"{report.exact_duplicates:,}"),
        ("label.pairs", f"{report.pairs:,}"),
        ("label.tokens", text("report.tokens", lang, total=report.total_tokens, trie=report.trie_tokens, saved=saved)),
        ("label.learned_tokens", learned),
        ("label.length", text("report.length", lang, longest=report.longest, **quantiles)),
        ("label.steps", f"{report.steps:,}"),
    ]


def show_report(report: Report, console: Console) -> None:
    """Print the report of a preflight."""
    console.pairs("report.title", report_lines(report, console.lang))
    for line in [*report.notes, *report.diagnosis]:
        console.write(f"  {line}")


def show_refused(report: Report, console: Console, *, limit: int | None = MAX_REFUSED_SHOWN) -> None:
    """Print refused rows, each with where, reason and fix; past `limit` they are counted."""
    for refusal in report.refused[:limit]:
        console.write(f"{refusal.where}: {refusal.reason}\n  → {refusal.fix}")
    hidden = report.refused[limit:] if limit is not None else []
    if hidden:
        reasons = Counter(refusal.reason for refusal in hidden)
        console.say("report.more_refused", count=len(hidden), reasons=len(reasons))


def require_usable(report: Report, *, skip_invalid: bool) -> None:
    """Raise UserError if rows were refused (unless they may be skipped) or none is left."""
    if report.rows_refused and not skip_invalid:
        raise UserError("rows_refused", where=report.refused[0].where, fix="rows_refused", count=report.rows_refused)
    if report.rows_used - report.rows_held_out == 0:
        raise UserError("no_rows", where="data", fix="no_rows")
