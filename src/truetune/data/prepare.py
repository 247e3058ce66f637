"""Composes the stages of the data: files → rows → conversations → pairs → what is trained and what is held out."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from truetune.config import Config
from truetune.data.formats import ignored_keys, is_target, to_conversation
from truetune.data.lengths import check_lengths
from truetune.data.sources import find_files, read_rows
from truetune.data.template import CLOSE_THINKING, Renderer
from truetune.engine.order import epoch_batches
from truetune.engine.trie import count_trie_tokens
from truetune.errors import RowError
from truetune.messages import text
from truetune.records import Conversation, Pair, RawRow, Refusal, Report, Row

MIN_HELD_OUT, MAX_HELD_OUT = 8, 500
# Fewer rows than this and a held-out part would cost more than it tells.
MIN_ROWS_TO_HOLD_OUT = 32

SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("where", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("answer_ids", pa.list_(pa.int32())),
        ("num_template_tokens", pa.int32()),
    ]
)


@dataclass(frozen=True)
class Prepared:
    """Rows to train on, rows held out, and the report about both."""

    train: Sequence[Row]
    held_out: Sequence[Row]
    report: Report
    data_hash: str


@dataclass
class _Tally:
    """What one pass over the files counts."""

    rows: list[Row]
    refused: list[RowError]
    num_read: int = 0
    num_duplicates: int = 0


def prepare(config: Config, renderer: Renderer, *, lang: str = "en") -> Prepared:
    """Read, render, check and split the data of a run.

    Raises: UserError if a file as a whole cannot be read. Refused rows are in the report, none is dropped silently.
    """
    files = find_files(config.data)
    held_out_files = find_files(config.eval_data)
    notes: Counter[str] = Counter()
    tally = _read(files, config, renderer, notes)
    held_out_tally = _read(held_out_files, config, renderer, notes, first_index=tally.num_read)
    train, held_out = tally.rows, held_out_tally.rows
    if not held_out_files:
        train, held_out = split(tally.rows, fraction=config.eval_split, seed=config.seed)
    refused = tally.refused + held_out_tally.refused
    steps = num_steps(config, len(train))
    report = Report(
        rows_read=tally.num_read + held_out_tally.num_read,
        rows_used=len(train) + len(held_out),
        rows_refused=len(refused),
        refused=[as_refusal(error, lang) for error in refused],
        exact_duplicates=tally.num_duplicates + held_out_tally.num_duplicates,
        rows_held_out=len(held_out),
        steps=steps,
        diagnosis=_diagnose(config, steps, lang, num_duplicates=tally.num_duplicates, sides=(train, held_out)),
        notes=_notes(notes, renderer, [*train, *held_out], lang),
        **_count_tokens(train, held_out, config),
    )
    return Prepared(train, held_out, report, hash_rows(train, held_out))


def num_steps(config: Config, num_rows: int) -> int:
    """Return the optimizer steps of a run: the last, smaller batch of an epoch is kept."""
    per_epoch = -(-num_rows // config.rows_per_step)
    # Rounded before it is rounded up: 100 x 1.1 is 110.00000000000001.
    total = math.ceil(round(per_epoch * config.num_train_epochs, 6))
    return min(total, config.max_steps) if config.max_steps else total


def split(rows: Sequence[Row], *, fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Return (train, held out); rows with the same prompt fall on the same side, both sides keep the order."""
    if fraction == 0 or len(rows) < MIN_ROWS_TO_HOLD_OUT:
        return list(rows), []
    wanted = min(max(round(fraction * len(rows)), MIN_HELD_OUT), MAX_HELD_OUT, len(rows) // 2)
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, row in enumerate(rows):
        groups.setdefault(row.pairs[0].prompt_ids, []).append(number)
    keys = list(groups)
    chosen: set[int] = set()
    for number in np.random.default_rng([seed, 1]).permutation(len(keys)):
        group = groups[keys[number]]
        if len(chosen) + len(group) <= wanted:
            chosen.update(group)
    return (
        [row for number, row in enumerate(rows) if number not in chosen],
        [row for number, row in enumerate(rows) if number in chosen],
    )


def _read(
    files: Sequence[Path], config: Config, renderer: Renderer, notes: Counter[str], *, first_index: int = 0
) -> _Tally:
    tally = _Tally([], [])
    seen: set[tuple[Pair, ...]] = set()
    for file in files:
        for raw in read_rows(file):
            tally.num_read += 1
            try:
                row = _to_row(raw, first_index + tally.num_read - 1, config, renderer)
                notes.update(ignored_keys(raw) if isinstance(raw, RawRow) else ())
            except RowError as error:
                tally.refused.append(error)
                continue
            tally.num_duplicates += row.pairs in seen
            seen.add(row.pairs)
            tally.rows.append(row)
    return tally


def _to_row(raw: RawRow | RowError, index: int, config: Config, renderer: Renderer) -> Row:
    if isinstance(raw, RowError):
        raise raw
    conversation = to_conversation(raw, input_join=config.input_join)
    pairs = renderer.pairs(conversation, last_turn_only=config.train_on == "last_turn")
    check_lengths(raw.where, pairs, max_length=config.max_length)
    prompt, answer = _last_turn(conversation)
    return Row(index, raw.where, tuple(pairs), prompt, answer)


def _last_turn(conversation: Conversation) -> tuple[tuple[dict[str, str], ...], str]:
    """Return the messages before the last learned turn, and that turn's text, to show and to ask again."""
    last = max(number for number, message in enumerate(conversation.messages) if is_target(message))
    return conversation.messages[:last], str(conversation.messages[last]["content"])


def as_refusal(error: RowError, lang: str) -> Refusal:
    """Return the error as one line of the report."""
    reason = text(f"error.{error.key}", lang, **error.values)
    return Refusal(error.where, reason, text(f"fix.{error.fix}", lang, **error.values))


def _notes(ignored: Counter[str], renderer: Renderer, rows: Sequence[Row], lang: str) -> list[str]:
    notes = [text("note.ignored_key", lang, name=name, count=count) for name, count in ignored.items()]
    if renderer.appends_stop:
        notes.append(text("note.appends_stop", lang))
    if renderer.opens_thinking:
        starts = (renderer.tokenizer.decode(pair.answer_ids[:6]) for row in rows for pair in row.pairs)
        count = sum(start.startswith(CLOSE_THINKING.rstrip()) for start in starts)
        notes.append(text("note.opens_thinking", lang, count=count))
    if renderer.date:
        notes.append(text("note.reads_clock", lang, date=renderer.date))
    return notes


FEW_STEPS = 30
USUAL_LEARNING_RATES = (2e-5, 5e-3)


def _diagnose(
    config: Config, steps: int, lang: str, *, num_duplicates: int, sides: tuple[Sequence[Row], Sequence[Row]]
) -> list[str]:
    """Return in plain words what is likely to disappoint. `sides`: rows to train on, rows held out."""
    lowest, highest = USUAL_LEARNING_RATES
    trained = {row.pairs[0].prompt_ids for row in sides[0]}
    num_overlap = sum(row.pairs[0].prompt_ids in trained for row in sides[1])
    found: list[tuple[bool, str, dict[str, Any]]] = [
        (steps < FEW_STEPS, "few_steps", {"steps": steps}),
        (not lowest <= config.learning_rate <= highest, "learning_rate", {"rate": config.learning_rate}),
        (num_duplicates > 0, "duplicates", {"count": num_duplicates}),
        (num_overlap > 0, "overlap", {"count": num_overlap}),
        (not sides[1], "no_held_out", {}),
    ]
    return [text(f"diagnosis.{key}", lang, **values) for is_found, key, values in found if is_found]


def _count_tokens(train: Sequence[Row], held_out: Sequence[Row], config: Config) -> dict[str, Any]:
    """Count tokens over all rows; common prefixes once in each step of the first epoch, and in the held-out rows."""
    pairs = [pair for row in [*train, *held_out] for pair in row.pairs]
    lengths = np.array([len(pair) for pair in pairs] or [0])
    steps = epoch_batches(len(train), config.rows_per_step, seed=config.seed, epoch=0)
    batches = [[train[number] for number in step] for step in steps] + [list(held_out)]
    return {
        "pairs": len(pairs),
        "learned_tokens": sum(len(pair.answer_ids) for pair in pairs),
        "learned_template_tokens": sum(pair.num_template_tokens for pair in pairs),
        "total_tokens": int(lengths.sum()),
        "trie_tokens": sum(count_trie_tokens(pair for row in batch for pair in row.pairs) for batch in batches),
        "longest": int(lengths.max()),
        "quantiles": {f"p{q}": int(np.percentile(lengths, q, method="higher")) for q in (50, 90, 99)},
    }


def hash_rows(*sides: Sequence[Row]) -> str:
    """Return the sha256 over the token ids of all pairs: over what is computed, side by side."""
    digest = hashlib.sha256()
    for rows in sides:
        digest.update(f"{len(rows)} rows;".encode())
        for row in rows:
            for pair in row.pairs:
                digest.update(f"{row.index},{len(pair.prompt_ids)},{len(pair.answer_ids)};".encode())
                digest.update(np.array(pair.prompt_ids + pair.answer_ids, dtype=np.int64).tobytes())
    return digest.hexdigest()


def hash_files(files: Iterable[Path]) -> str:
    """Return the sha256 over the contents of the files, in order."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write the pairs of `rows` as an Arrow file, one pair a record."""
    pairs = [(row, pair) for row in rows for pair in row.pairs]
    columns = {
        "row": [row.index for row, _ in pairs],
        "where": [row.where for row, _ in pairs],
        "prompt_ids": [pair.prompt_ids for _, pair in pairs],
        "answer_ids": [pair.answer_ids for _, pair in pairs],
        "num_template_tokens": [pair.num_template_tokens for _, pair in pairs],
    }
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
        writer.write_table(pa.table(columns, schema=SCHEMA))
