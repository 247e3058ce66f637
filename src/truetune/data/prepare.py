"""Composes the stages of the data: files → rows → conversations → pairs → a file of prepared rows, and its two sides.

While rows are rendered in Python, another thread has the rows before them turned into tokens (in Rust, on every core).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from truetune.config import Config, cache_dir
from truetune.data.encode import Encoded
from truetune.data.formats import format_of, ignored_keys, to_conversation
from truetune.data.lengths import check_lengths, cut_prompts
from truetune.data.report import Tally, make_report
from truetune.data.sources import Source, find_files, read_rows, state_of
from truetune.data.store import RowFacts, RowWriter, StoredRows
from truetune.data.template import CLOSE_THINKING, Draft, Renderer
from truetune.data.turns import is_target
from truetune.engine.order import Mix
from truetune.errors import RowError, UserError
from truetune.records import Conversation, Pair, RawRow, Report, Row

MIN_HELD_OUT, MAX_HELD_OUT = 8, 500
# Fewer rows than this and a held-out part would cost more than it tells.
MIN_ROWS_TO_HOLD_OUT = 32

BATCH_ROWS = 512
"""Rows that are rendered, and then encoded, together."""

MAX_CACHED = 8
"""Prepared files that are kept in the cache; the oldest goes first."""

STORE_VERSION = 1
"""Of how rows become prepared rows: another number, and nothing prepared before is used."""

DATA_KEYS = ("encoding", "input_join", "train_on", "max_length", "overlong")

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Prepared:
    """Rows to train on, rows held out, and the report about both. `mix`: how often which rows come, if not once."""

    train: StoredRows
    held_out: StoredRows
    report: Report
    data_hash: str
    mix: Mix | None = None


def prepare(config: Config, renderer: Renderer, *, lang: str = "en", on_progress: Progress | None = None) -> Prepared:
    """Read, render, check and split the data of a run. `on_progress`: told how many rows were read so far.

    Raises: UserError if a file as a whole cannot be read. Refused rows are in the report, none is dropped silently.
    """
    if config.data_weights and len(config.data_weights) != len(config.data):
        counts = {"weights": len(config.data_weights), "names": len(config.data)}
        raise UserError("data_weights", where="data_weights", fix="data_weights", **counts)
    files = find_files([*config.data, *config.eval_data], hub=config.hub)
    rows, tally = _stored(files, config, renderer, on_progress or (lambda _: None))
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


def _stored(
    files: Sequence[Source], config: Config, renderer: Renderer, on_progress: Progress
) -> tuple[StoredRows, Tally]:
    """Return the prepared rows of the files: those of an earlier time if nothing that matters has changed since."""
    folder = cache_dir() / "prepared"
    folder.mkdir(parents=True, exist_ok=True)
    states = [state_of(file.path) for file in files]
    name = _cache_key(files, config, renderer)
    path, tally_path = folder / f"{name}.arrow", folder / f"{name}.json"
    if not (path.is_file() and tally_path.is_file()):
        unfinished = folder / f"{name}.{os.getpid()}.unfinished"
        with RowWriter(unfinished) as writer:
            tally = _prepare_rows(files, config, renderer, writer=writer, on_progress=on_progress)
        if [state_of(file.path) for file in files] != states:
            raise UserError("data_changed", where=str(files[0].path), fix="data_changed")
        # The tally first: rows without it are prepared again.
        unfinished_tally = unfinished.with_suffix(".tally")
        unfinished_tally.write_text(tally.to_json(), encoding="utf-8")
        unfinished_tally.replace(tally_path)
        unfinished.replace(path)
        _prune(folder, keep=path)
    return StoredRows(path), Tally.from_json(tally_path.read_text(encoding="utf-8"))


def _prune(folder: Path, *, keep: Path) -> None:
    """Remove the oldest prepared files but a few; a run has its own copy."""
    files = sorted(folder.glob("*.arrow"), key=lambda path: path.stat().st_mtime_ns)
    for path in [path for path in files if path != keep][: -MAX_CACHED + 1 or None]:
        path.unlink(missing_ok=True)
        path.with_suffix(".json").unlink(missing_ok=True)


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


@dataclass(frozen=True)
class _Batch:
    """Rows on their way: read and rendered, and soon encoded."""

    raws: list[tuple[int, RawRow | RowError]]
    conversations: list[Conversation | RowError]
    drafts: list[list[Draft] | RowError]
    encoded: Future[list[tuple[Encoded, Encoded]]]


def _prepare_rows(
    files: Sequence[Source], config: Config, renderer: Renderer, *, writer: RowWriter, on_progress: Progress
) -> Tally:
    tally = Tally()
    raws = ((file.entry, raw) for file in files for raw in _one_shape(file, config.encoding))
    with ThreadPoolExecutor(max_workers=1) as encoder:
        underway: deque[_Batch] = deque()
        while some := list(islice(raws, BATCH_ROWS)):
            underway.append(_rendered(some, config, renderer, encoder))
            if len(underway) > 2:
                _finish(underway.popleft(), config, renderer, writer=writer, tally=tally)
                on_progress(tally.num_read)
        while underway:
            _finish(underway.popleft(), config, renderer, writer=writer, tally=tally)
    on_progress(tally.num_read)
    return tally


def _one_shape(file: Source, encoding: str) -> Iterator[RawRow | RowError]:
    """Yield the rows of a file; a recognised row of another format than the first one is refused."""
    first = None
    for raw in read_rows(file, encoding=encoding):
        name = format_of(raw) if isinstance(raw, RawRow) else None
        first = first or name
        if name not in (None, first):
            yield RowError("row_other_shape", where=raw.where, fix="row_other_shape", found=name, first=first)
        else:
            yield raw


def _rendered(
    raws: list[tuple[int, RawRow | RowError]], config: Config, renderer: Renderer, encoder: ThreadPoolExecutor
) -> _Batch:
    conversations = [_converted(raw, config.input_join) for _, raw in raws]
    good = [some for some in conversations if isinstance(some, Conversation)]
    found = iter(renderer.render(good, last_turn_only=config.train_on == "last_turn"))
    drafts = [next(found) if isinstance(some, Conversation) else some for some in conversations]
    texts = [draft for some in drafts if isinstance(some, list) for draft in some]
    return _Batch(raws, conversations, drafts, encoder.submit(renderer.encode, texts))


def _converted(raw: RawRow | RowError, input_join: str) -> Conversation | RowError:
    if isinstance(raw, RowError):
        return raw
    try:
        return to_conversation(raw, input_join=input_join)
    except RowError as error:
        return error


def _finish(batch: _Batch, config: Config, renderer: Renderer, *, writer: RowWriter, tally: Tally) -> None:
    """Make the pairs of a batch, write its good rows and count all."""
    encoded = iter(batch.encoded.result())
    for (source, raw), conversation, drafts in zip(batch.raws, batch.conversations, batch.drafts, strict=True):
        index = tally.num_read
        tally.num_read += 1
        if isinstance(drafts, RowError) or isinstance(conversation, RowError) or isinstance(raw, RowError):
            tally.refused.append(next(some for some in (raw, conversation, drafts) if isinstance(some, RowError)))
            continue
        tokens = list(islice(encoded, len(drafts)))
        try:
            pairs = renderer.finish(drafts, tokens, where=raw.where)
            chosen, rejected = (pairs[:-1], pairs[-1:]) if conversation.rejected else (pairs, [])
            fitting = _fitting(conversation, chosen, config, renderer)
            check_lengths(raw.where, [*fitting, *rejected], max_length=config.max_length)
        except RowError as error:
            tally.refused.append(error)
            continue
        tally.formats[str(format_of(raw))] += 1
        tally.ignored.update(ignored_keys(raw))
        tally.num_cut += fitting != chosen
        tally.num_empty_thinking += sum(draft.rest.startswith(CLOSE_THINKING) for draft in drafts)
        has_system = bool(conversation.messages) and conversation.messages[0]["role"] == "system"
        prompt, answer = _last_turn(conversation)
        row = Row(index, raw.where, tuple(fitting), prompt, answer, tuple(rejected))
        writer.add(row, RowFacts(source, has_system))


def _fitting(conversation: Conversation, pairs: list[Pair], config: Config, renderer: Renderer) -> list[Pair]:
    is_text = conversation.text is not None
    if is_text or config.overlong == "refuse" or max(map(len, pairs)) <= config.max_length:
        return pairs
    is_last_only = config.train_on == "last_turn"
    return cut_prompts(
        conversation, pairs, renderer=renderer, max_length=config.max_length, last_turn_only=is_last_only
    )


def _last_turn(conversation: Conversation) -> tuple[tuple[dict[str, Any], ...], str]:
    """Return the messages before the last learned turn, and that turn's text, to show and to ask again."""
    if conversation.text is not None:
        return (), conversation.text
    last = max(number for number, message in enumerate(conversation.messages) if is_target(message))
    return conversation.messages[:last], str(conversation.messages[last]["content"])


def hash_files(files: Iterable[Path]) -> str:
    """Return the sha256 over the contents of the files, in order."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
