"""Composes the stages of the data: files → rows → batches of them → a file of prepared rows, and its two sides."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from truetune.config import Config, cache_dir
from truetune.data.batches import BATCH_ROWS, Job, OneShape, Preparer
from truetune.data.crew import Crew
from truetune.data.duplicates import Duplicates
from truetune.data.feed import Feed
from truetune.data.report import make_report
from truetune.data.sources import Source, find_files, read_rows, state_of
from truetune.data.store import RowWriter, StoredRows, shifted
from truetune.data.tally import Tally
from truetune.data.template import Renderer
from truetune.engine.order import Mix
from truetune.errors import UserError
from truetune.records import Report, Row

MIN_HELD_OUT, MAX_HELD_OUT = 8, 500
# Fewer rows than this and a held-out part would cost more than it tells.
MIN_ROWS_TO_HOLD_OUT = 32

MAX_CACHED = 8
"""Prepared files that are kept in the cache; the oldest goes first."""

UNFINISHED_S = 24 * 3600
"""After this, a file that was not finished belongs to a process that was killed."""

STORE_VERSION = 2
"""Of how rows become prepared rows: another number, and nothing prepared before is used."""

DATA_KEYS = ("encoding", "input_join", "train_on", "max_length", "overlong", "loss")

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Prepared:
    """Rows to train on, rows held out, and the report about both. `mix`: how often which rows come, if not once.

    `feed`: where the rows to train on come from, if they are streamed; `train` then holds the first ones.
    """

    train: StoredRows
    held_out: StoredRows
    report: Report
    data_hash: str
    mix: Mix | None = None
    feed: Feed | None = None

    @property
    def to_train(self) -> Sequence[Row] | Feed:
        """What the loop takes its rows from."""
        return self.train if self.feed is None else self.feed

    def duplicates(self) -> Duplicates:
        """Return which rows, of both, are the same."""
        return Duplicates(self.train, self.held_out)


def prepare(config: Config, renderer: Renderer, *, lang: str = "en", on_progress: Progress | None = None) -> Prepared:
    """Read, render, check and split the data of a run. `on_progress`: told how many rows were read so far.

    Raises: UserError if a file as a whole cannot be read. Refused rows are in the report, none is dropped silently.
    """
    if config.data_weights and len(config.data_weights) != len(config.data):
        counts = {"weights": len(config.data_weights), "names": len(config.data)}
        raise UserError("data_weights", where="data_weights", fix="data_weights", **counts)
    files = find_files([*config.data, *config.eval_data], hub=config.hub)
    rows, tally = stored_rows(files, config, renderer=renderer, on_progress=on_progress or (lambda _: None))
    is_held_out = rows.of_rows("source") >= len(config.data)
    if not config.eval_data:
        is_held_out = split(rows.of_rows("prompt_hash"), fraction=config.eval_split, seed=config.seed)
    train, held_out = (rows.chosen(np.flatnonzero(is_held_out == side)) for side in (False, True))
    mix = Mix(train.of_rows("source"), tuple(config.data_weights)) if config.data_weights else None
    if mix is not None and len(mix) == 0:
        raise UserError("no_rows", where="data_weights", fix="no_rows")
    report = make_report(config, renderer, tally=tally, sides=(train, held_out), mix=mix, lang=lang)
    digest = hashlib.sha256()
    for side in (train, held_out):
        side.update_hash(digest)
    return Prepared(train, held_out, report, digest.hexdigest(), mix)


def split(prompt_hashes: np.ndarray, *, fraction: float, seed: int) -> np.ndarray:
    """Return which rows are held out [R]; rows with the same prompt fall on the same side."""
    is_held_out = np.zeros(len(prompt_hashes), bool)
    if fraction == 0 or len(prompt_hashes) < MIN_ROWS_TO_HOLD_OUT:
        return is_held_out
    room = min(max(round(fraction * len(prompt_hashes)), MIN_HELD_OUT), MAX_HELD_OUT, len(prompt_hashes) // 2)
    _, firsts, group_of_row = np.unique(prompt_hashes, return_index=True, return_inverse=True)
    sizes = np.bincount(group_of_row)
    groups = np.argsort(firsts)  # in the order in which their first rows stand
    chosen = []
    for group in groups[np.random.default_rng([seed, 1]).permutation(len(groups))]:
        if sizes[group] <= room:
            chosen.append(group)
            room -= sizes[group]
        if room == 0:
            break
    return np.isin(group_of_row, chosen)


def stored_rows(
    files: Sequence[Source], config: Config, *, renderer: Renderer, on_progress: Progress
) -> tuple[StoredRows, Tally]:
    """Return the prepared rows of the files: those of an earlier time if nothing that matters has changed since."""
    folder = cache_dir() / "prepared"
    folder.mkdir(parents=True, exist_ok=True)
    states = [state_of(file.path) for file in files]
    name = _cache_key(files, config, renderer)
    path, tally_path = folder / f"{name}.arrow", folder / f"{name}.json"
    if not (path.is_file() and tally_path.is_file()):
        unfinished = folder / f"{name}.{os.getpid()}.unfinished"
        try:
            with RowWriter(unfinished) as writer:
                tally = _prepare_rows(files, config, renderer, writer=writer, on_progress=on_progress)
            if [state_of(file.path) for file in files] != states:
                raise UserError("data_changed", where=str(files[0].path), fix="data_changed")
            # The tally first: rows without it are prepared again.
            unfinished_tally = unfinished.with_suffix(".tally")
            unfinished_tally.write_text(tally.to_json(), encoding="utf-8")
            unfinished_tally.replace(tally_path)
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)
        _prune(folder, keep=path)
    return StoredRows(path, is_compared=config.loss != "sft"), Tally.from_json(tally_path.read_text(encoding="utf-8"))


def _prune(folder: Path, *, keep: Path) -> None:
    """Remove the oldest prepared files but a few, and what was left unfinished a day ago; a run has its own copy."""
    files = sorted(folder.glob("*.arrow"), key=lambda path: path.stat().st_mtime_ns)
    for path in [path for path in files if path != keep][: -MAX_CACHED + 1 or None]:
        path.unlink(missing_ok=True)
        path.with_suffix(".json").unlink(missing_ok=True)
    for path in folder.glob("*.unfinished"):
        if time.time() - path.stat().st_mtime > UNFINISHED_S:
            path.unlink(missing_ok=True)


def _cache_key(files: Sequence[Source], config: Config, renderer: Renderer) -> str:
    """Return the hash of all that the prepared rows depend on: data, tokenizer, template, keys."""
    keys = {name: getattr(config, name) for name in DATA_KEYS}
    told = [
        STORE_VERSION,
        [importlib.metadata.version(name) for name in ("transformers", "tokenizers")],
        [repr(file) for file in files],
        keys,
        renderer.chat_template,
        renderer.stop_ids,
        renderer.system,
        renderer.template_kwargs,
    ]
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
    digest.update(hash_files(file.path for file in files).encode())
    digest.update(renderer.tokenizer_hash.encode())
    return digest.hexdigest()[:32]


def _prepare_rows(
    files: Sequence[Source], config: Config, renderer: Renderer, *, writer: RowWriter, on_progress: Progress
) -> Tally:
    tally = Tally()

    with Crew(Preparer(config, renderer), num_bytes=sum(file.path.stat().st_size for file in files)) as crew:
        for done in crew.prepare(_jobs(files, config.encoding)):
            writer.write(shifted(done.records, tally.num_added))
            tally += done.tally
            on_progress(tally.num_read)
    return tally


def _jobs(files: Sequence[Source], encoding: str) -> Iterator[Job]:
    """Yield the rows of the files in batches."""
    shapes = ((file, OneShape()) for file in files)
    raws = ((file.entry, shape.checked(raw)) for file, shape in shapes for raw in read_rows(file, encoding=encoding))
    index = 0
    while some := list(islice(raws, BATCH_ROWS)):
        yield Job(index, some)
        index += len(some)


def hash_files(files: Iterable[Path]) -> str:
    """Return the sha256 over the contents of the files, in order."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
