"""What the preflight says about prepared rows: counts that add up, and in plain words what is likely to disappoint."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np

from truetune.config import Config
from truetune.data.duplicates import Duplicates
from truetune.data.lengths import overlap_of
from truetune.data.store import StoredRows
from truetune.data.tally import Tally
from truetune.data.template import Renderer
from truetune.engine.order import Mix, epoch_batches
from truetune.engine.trie import count_prefixes
from truetune.errors import RowError
from truetune.messages import text
from truetune.records import Refusal, Report

Sides = tuple[StoredRows, StoredRows]
"""(rows to train on, rows held out)."""

FEW_STEPS = 30
USUAL_LEARNING_RATES = {"lora": ("learning_rate", 2e-5, 5e-3), "full": ("learning_rate_full", 5e-7, 2e-4)}
ALIKE_SHARE = 0.5
SYSTEM_SHARES = (0.02, 0.98)
TEMPLATE_SHARE = 0.25


def make_report(
    config: Config, renderer: Renderer, *, tally: Tally, sides: Sides, mix: Mix | None, lang: str
) -> Report:
    """Return the report on rows to train on and rows held out."""
    train, held_out = sides
    steps = num_steps(config, len(train) if mix is None else len(mix))
    lengths = np.concatenate([side.lengths(0, 1) for side in sides])
    rows, prompts = (np.concatenate([side.of_rows(name) for side in sides]) for name in ("row_hash", "prompt_hash"))
    is_piece = np.concatenate([side.of_rows("is_piece").astype(bool) for side in sides])
    counts: dict[str, Any] = {
        "exact_duplicates": Duplicates(*sides).num_repeats,
        "other_answers": _num_other_answers(prompts[~is_piece], rows[~is_piece]),
        "rows_overlapping": int(np.isin(held_out.of_rows("prompt_hash"), train.of_rows("prompt_hash")).sum()),
        "rows_cut": tally.num_cut,
        "pairs": len(lengths),
        "learned_tokens": sum(int(side.lengths(1).sum()) for side in sides),
        "learned_template_tokens": sum(side.total("num_template_tokens") for side in sides),
        "total_tokens": int(lengths.sum()),
        "longest": int(lengths.max(initial=0)),
        "steps": steps,
    }
    quantiles = {f"p{q}": int(np.percentile(lengths, q, method="higher")) for q in (50, 90, 99)} if len(lengths) else {}
    return Report(
        rows_read=tally.num_read,
        rows_used=len(train) + len(held_out),
        rows_refused=len(tally.refused),
        refused=[as_refusal(error, lang) for error in tally.refused],
        trie_tokens=_count_trie_tokens(config, sides, mix),
        rows_held_out=len(held_out),
        quantiles=quantiles,
        formats=dict(tally.formats),
        diagnosis=[text(f"diagnosis.{key}", lang, **values) for key, values in _diagnose(config, counts, sides)],
        notes=list(_notes(config, renderer, tally=tally, lang=lang)),
        **counts,
    )


def num_steps(config: Config, num_rows: int) -> int:
    """Return the optimizer steps of a run: the last, smaller batch of an epoch is kept."""
    if config.streaming and config.max_steps:
        return config.max_steps
    per_epoch = -(-num_rows // config.rows_per_step)
    # Rounded before it is rounded up: 100 x 1.1 is 110.00000000000001.
    total = math.ceil(round(per_epoch * config.num_train_epochs, 6))
    return min(total, config.max_steps) if config.max_steps else total


def as_refusal(error: RowError, lang: str) -> Refusal:
    """Return the error as one line of the report."""
    reason = text(f"error.{error.key}", lang, **error.values)
    return Refusal(error.where, reason, text(f"fix.{error.fix}", lang, **error.values))


def _num_other_answers(prompts: np.ndarray, rows: np.ndarray) -> int:
    """Return how many rows have a prompt that another row answers otherwise."""
    # Equal rows have equal prompts, so that one number a row is sorted, not a pair of them.
    _, firsts = np.unique(rows, return_index=True)
    distinct = prompts[firsts]
    found, counts = np.unique(distinct, return_counts=True)
    return int(np.isin(prompts, found[counts > 1]).sum())


def _count_trie_tokens(config: Config, sides: Sides, mix: Mix | None) -> int:
    """Count common prefixes once in each step of the first epoch, and in the held-out rows."""
    train, held_out = sides
    steps = epoch_batches(len(train), config.rows_per_step, seed=config.seed, epoch=0, mix=mix)
    batches = (train.chosen(train.numbers[step]) for step in steps)
    return sum(count_prefixes(batch.sequences()) for batch in chain(batches, [held_out]))


def _notes(config: Config, renderer: Renderer, *, tally: Tally, lang: str) -> Iterator[str]:
    for name, count in tally.ignored.items():
        yield text("note.ignored_key", lang, name=name, count=count)
    preferred = sum(count for name, count in tally.formats.items() if name.startswith("preference"))
    if preferred:
        key = "note.preference" if config.loss == "sft" else "note.compared"
        yield text(key, lang, count=preferred, loss=config.loss)
    if tally.formats["text"]:
        stop = renderer.tokenizer.decode([renderer.stop_ids[0]])
        yield text("note.texts", lang, count=tally.formats["text"], stop=stop)
    if tally.num_split:
        pieces, limit = tally.num_split + tally.num_added, config.max_length
        values = {"pieces": pieces, "max_length": limit, "overlap": overlap_of(limit)}
        yield text("note.pieces", lang, texts=tally.num_split, **values)
    if tally.num_cut:
        yield text("note.cut", lang, count=tally.num_cut)
    if renderer.appends_stop:
        yield text("note.appends_stop", lang)
    if renderer.opens_thinking:
        yield text("note.opens_thinking", lang, count=tally.num_empty_thinking)
    if renderer.date:
        yield text("note.reads_clock", lang, date=renderer.date)


def _diagnose(config: Config, counts: dict[str, Any], sides: Sides) -> Sequence[tuple[str, dict[str, Any]]]:
    """Return (key, values) of what is likely to disappoint."""
    train, held_out = sides
    rate, lowest, highest = USUAL_LEARNING_RATES[config.finetuning]
    _, repeats = np.unique(train.of_rows("answer_hash"), return_counts=True)
    alike = repeats.max(initial=0) / max(len(train), 1)
    system_share = float(train.of_rows("has_system").mean()) if len(train) else 0.0
    template_share = counts["learned_template_tokens"] / max(counts["learned_tokens"], 1)
    found: list[tuple[bool, str, dict[str, Any]]] = [
        (counts["steps"] < FEW_STEPS, "few_steps", {"steps": counts["steps"]}),
        (not lowest <= config.learning_rate <= highest, rate, {"rate": config.learning_rate}),
        (counts["exact_duplicates"] > 0, "duplicates", {"count": counts["exact_duplicates"]}),
        (counts["other_answers"] > 0 and config.loss == "sft", "other_answers", {"count": counts["other_answers"]}),
        (counts["rows_overlapping"] > 0, "overlap", {"count": counts["rows_overlapping"]}),
        (alike >= ALIKE_SHARE and len(train) > 1, "answers_alike", {"share": alike}),
        (
            config.system is None and SYSTEM_SHARES[0] < system_share < SYSTEM_SHARES[1],
            "system_missing",
            {"share": 1 - system_share},
        ),
        (template_share >= TEMPLATE_SHARE, "template_share", {"share": template_share}),
        (len(train) == 1, "one_row", {}),
        (len(held_out) == 0, "no_held_out", {}),
    ]
    return [(key, values) for is_found, key, values in found if is_found]
