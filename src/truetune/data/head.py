"""A streamed run before its first step: its first rows, looked at as all rows are looked at where they are prepared."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np

from truetune.config import Config
from truetune.data.batches import BATCH_ROWS, Job, Preparer
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
    preparer, tally, batches = Preparer(config, renderer), Tally(), []
    head = next(replace(stream, block_rows=HEAD_ROWS).blocks(Place()))
    for at in range(0, len(head.raws), BATCH_ROWS):
        done = preparer.run(Job(at, head.raws[at : at + BATCH_ROWS]))
        batches.append(done.records)
        tally += done.tally
        (on_progress or (lambda _: None))(tally.num_read)
    rows = StoredRows.of_batches(batches)
    if config.eval_data:
        train = rows
        held_files = find_files(list(config.eval_data), hub=config.hub)
        held_out, held_tally = stored_rows(
            held_files, config, renderer=renderer, on_progress=on_progress or (lambda _: None)
        )
        tally += held_tally
        kept_apart, places = frozenset[int](), frozenset[str]()
    else:
        is_held_out = split(rows.of_rows("prompt_hash"), fraction=config.eval_split, seed=config.seed)
        train, held_out = (rows.chosen(np.flatnonzero(is_held_out == side)) for side in (False, True))
        kept_apart = frozenset(held_out.of_rows("prompt_hash").tolist())
        places = frozenset(row.where for row in held_out)
    report = make_report(config, renderer, tally=tally, sides=(train, held_out), mix=None, lang=lang)
    note = text("note.streaming", lang, rows=len(head.raws), buffer=config.shuffle_rows)
    feed = Feed(stream, preparer, kept_apart, places)
    digest = hashlib.sha256(stream.fingerprint.encode())
    held_out.update_hash(digest)
    return Prepared(train, held_out, replace(report, notes=[note, *report.notes]), digest.hexdigest(), feed=feed)
