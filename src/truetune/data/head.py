"""A streamed run before its first step: its first rows, looked at as all rows are looked at where they are prepared."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np

from truetune.config import Config
from truetune.data.batches import BATCH_ROWS, Done, Job, Preparer, numbered
from truetune.data.feed import Feed
from truetune.data.prepare import Prepared, Progress, split, stored_rows
from truetune.data.report import make_report
from truetune.data.sources import find_files
from truetune.data.store import StoredRows
from truetune.data.stream import Place, open_stream
from truetune.data.tally import Tally
from truetune.data.template import Renderer
from truetune.messages import text

HEAD_ROWS = 2048
"""Rows that are looked at before step 1, however many there are."""


def prepare_stream(
    config: Config, renderer: Renderer, *, lang: str = "en", on_progress: Progress | None = None
) -> Prepared:
    """Look at the first rows of a stream, hold some of them out, and return where the rows to train on come from.

    Without `eval_data`, rows are held out from the first ones; rows with the same prompts are left out of the stream,
    wherever they stand.

    Raises: UserError if a file cannot be opened, or has no usable first rows.
    """
    files = find_files(list(config.data), hub=config.hub)
    stream = open_stream(files, encoding=config.encoding, seed=config.seed, block_rows=config.shuffle_rows)
    preparer, tally, batches = Preparer(config, renderer), Tally(), list[Done]()
    head = next(replace(stream, block_rows=HEAD_ROWS).blocks(Place()))
    for at in range(0, len(head.raws), BATCH_ROWS):
        batches.append(preparer.run(Job(at, head.raws[at : at + BATCH_ROWS])))
        tally += batches[-1].tally
        (on_progress or (lambda _: None))(tally.num_read)
    rows = StoredRows.of_batches(numbered(batches), is_compared=config.loss != "sft")
    if config.eval_data:
        held_files = find_files(list(config.eval_data), hub=config.hub)
        held_rows, held_tally = stored_rows(
            held_files, config, renderer=renderer, on_progress=on_progress or (lambda _: None)
        )
        is_held_out = np.arange(len(rows) + len(held_rows)) >= len(rows)
        rows = rows.followed_by(held_rows)
        tally += held_tally
    else:
        is_held_out = split(rows.of_rows("prompt_hash"), fraction=config.eval_split, seed=config.seed)
    train, held_out = (rows.chosen(np.flatnonzero(is_held_out == side)) for side in (False, True))
    # Rows that are given to evaluate on are not looked for in the stream.
    from_stream = held_out.chosen(held_out.numbers[:0]) if config.eval_data else held_out
    kept_apart, places = frozenset(from_stream.of_rows("prompt_hash").tolist()), frozenset(from_stream.places())
    report = make_report(config, renderer, tally=tally, sides=(train, held_out), mix=None, lang=lang)
    note = text("note.streaming", lang, rows=len(head.raws), buffer=config.shuffle_rows)
    feed = Feed(stream, preparer, kept_apart, places)
    digest = hashlib.sha256(stream.fingerprint.encode())
    held_out.update_hash(digest)
    return Prepared(train, held_out, replace(report, notes=[note, *report.notes]), digest.hexdigest(), feed=feed)
