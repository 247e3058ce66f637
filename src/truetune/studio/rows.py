"""Prepared rows, page by page, with the text of every token: read through the memory map, decoded by `tokenizers`."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from truetune.config import cache_dir
from truetune.data.store import StoredRows
from truetune.disk import read_manifest
from truetune.errors import UserError
from truetune.records import Message, Pair, Row
from truetune.rundir import RunDir

SIDES = {"train": "train.arrow", "eval": "eval.arrow"}
REFUSED, DUPLICATES = "refused.jsonl", "duplicates.jsonl"
TOKENIZER = "tokenizer.json"
NUM_BARS, MAX_COUNT = 60, 200
LEARNED_ROLES = ("assistant", "text")
HALF = "\ufffd"
"""What a decoder writes for bytes that are no character yet."""


class Stores:
    """Folders with prepared rows: RUN/data, and what `truetune check --store` wrote. The last few stay open."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open = lru_cache(maxsize=8)(_open)
        self._found = lru_cache(maxsize=32)(lambda path, stamp, search: self._open(path, stamp).matching(search))
        self._tokenizer = lru_cache(maxsize=4)(_load_tokenizer)

    def rows(self, store: Path, side: str) -> StoredRows:
        """Return the rows of a side.

        Raises: UserError if there are none.
        """
        path = store / SIDES.get(side, "")
        if not path.is_file():
            raise UserError("studio_no_rows", where=str(store), fix="studio_no_rows")
        with self._lock:
            return self._open(path, _stamp(path))

    def page(self, store: Path, side: str, *, start: int, count: int, search: str = "") -> dict[str, Any]:
        """Return some rows of a side, of those that hold the text `search` if it is given, and how many there are."""
        rows = self.rows(store, side)
        if search:
            with self._lock:
                path = store / SIDES[side]
                rows = rows.chosen(self._found(path, _stamp(path), search))
        chosen = rows[max(start, 0) : max(start, 0) + min(max(count, 0), MAX_COUNT)]
        return {"total": len(rows), "start": start, "rows": self._shown(store, list(chosen))}

    def of_step(self, store: Path, row_ids: Sequence[int]) -> list[dict[str, Any]]:
        """Return the rows that a step learned from, in its order."""
        return self._shown(store, self._numbered(store, "train", row_ids))

    def duplicates(self, store: Path, *, start: int, count: int) -> dict[str, Any]:
        """Return some of the rows that others repeat, each as a page shows it, with where it stands again."""
        groups = _lines(store / DUPLICATES, start=start, count=count)
        row_ids = [group["row"] for group in groups["rows"]]
        found = [row for side in SIDES for row in self._numbered(store, side, row_ids)] if row_ids else []
        shown = {row["index"]: row for row in self._shown(store, found)} if found else {}
        again = [{"count": group["count"], "others": group["others"]} for group in groups["rows"]]
        return groups | {"rows": [shown[row] | {"again": told} for row, told in zip(row_ids, again, strict=True)]}

    def _numbered(self, store: Path, side: str, row_ids: Sequence[int]) -> list[Row]:
        """Return the rows of those numbers that a side has, in the order of the numbers."""
        rows = self.rows(store, side)
        known = rows.of_rows("row")
        places = np.searchsorted(known, row_ids)
        return [
            rows[int(at)] for at, row_id in zip(places, row_ids, strict=True) if at < len(known) and known[at] == row_id
        ]

    def lengths(self, store: Path) -> dict[str, Any]:
        """Return a histogram of the tokens of all pairs: bars {from, to, count}, `to` not in it."""
        sides = [self.rows(store, side).lengths(0, 1) for side in SIDES if (store / SIDES[side]).is_file()]
        lengths = np.concatenate(sides) if sides else np.zeros(0, np.int64)
        most = int(lengths.max(initial=0)) + 1
        bounds = np.unique(np.linspace(0, most, NUM_BARS + 1).round().astype(np.int64))
        counts, _ = np.histogram(lengths, bins=bounds)
        bars = [
            {"from": int(low), "to": int(high), "count": int(count)}
            for low, high, count in zip(bounds[:-1], bounds[1:], counts, strict=True)
        ]
        return {"bars": bars, "longest": most - 1, "pairs": len(lengths), "max_length": _facts(store).get("max_length")}

    def tokenizer(self, store: Path) -> Tokenizer:
        """Return the tokenizer of a store's rows.

        Raises: UserError if its file is gone.
        """
        path = tokenizer_path(store)
        if path is None:
            raise UserError("studio_no_tokenizer", where=str(store), fix="studio_no_tokenizer")
        with self._lock:
            return self._tokenizer(path, _stamp(path))

    def _shown(self, store: Path, rows: Sequence[Row]) -> list[dict[str, Any]]:
        tokenizer = self.tokenizer(store)
        return [shown_row(row, tokenizer) for row in rows]


def refused(store: Path, *, start: int, count: int) -> dict[str, Any]:
    """Return some of the refused rows: where, reason, fix."""
    return _lines(store / REFUSED, start=start, count=count)


def _lines(path: Path, *, start: int, count: int) -> dict[str, Any]:
    """Return some lines of a file of JSON, and how many it has; one that is not there has none."""
    if not path.is_file():
        return {"total": 0, "start": start, "rows": []}
    with path.open("rb") as file:
        total = sum(1 for line in file if line.strip())
        file.seek(0)
        lines = list(islice(file, max(start, 0), max(start, 0) + min(max(count, 0), MAX_COUNT)))
    return {"total": total, "start": start, "rows": [json.loads(line) for line in lines]}


def tokenizer_path(store: Path) -> Path | None:
    """Return the tokenizer.json of a store: its own, the run's result's, or the base's that its manifest names."""
    places = [store / TOKENIZER, RunDir(store.parent).result / TOKENIZER]
    named = _facts(store).get("tokenizer")
    if named:
        places.append(Path(str(named)))
    try:
        info = json.loads((store.parent / "run.json").read_text(encoding="utf-8"))
        places += [Path(info["model"]) / TOKENIZER, cache_dir() / "gguf" / info["base_fingerprint"][:16] / TOKENIZER]
    except (OSError, ValueError, LookupError):
        # The store of a check.
        info = None
    return next((path for path in places if path.is_file()), None)


def shown_row(row: Row, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return a row for the page: where it stands, its messages with `learned` said of each, its pairs in tokens."""
    answer = [{"role": "assistant", "content": row.answer}] if row.prompt else [{"role": "text", "content": row.answer}]
    messages: list[Message] = [*row.prompt, *answer]
    learned = [at for at, one in enumerate(messages) if one["role"] in LEARNED_ROLES and one.get("is_target", True)]
    learned = learned[-len(row.pairs) :]
    return {
        "index": row.index,
        "where": row.where,
        "messages": [{**one, "learned": at in learned} for at, one in enumerate(messages)],
        "pairs": [
            *(shown_pair(pair, tokenizer) for pair in row.pairs),
            *(shown_pair(pair, tokenizer) | {"is_rejected": True} for pair in row.rejected),
        ],
    }


def shown_pair(pair: Pair, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return a pair: ids [T], the text of each [T], the first learned position, the positions of control tokens."""
    ids = [*pair.prompt_ids, *pair.answer_ids]
    special = tokenizer.get_added_tokens_decoder()
    return {
        "ids": ids,
        "texts": token_texts(ids, tokenizer),
        "learned": len(pair.prompt_ids),
        "specials": [at for at, token in enumerate(ids) if token in special],
    }


def token_texts(ids: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """Return what each token adds to the text. Of tokens that are one character together, the last one has it.

    ids      a    b    c    d         a window from the last whole place on is decoded, so that a decoder which
    texts    "A"  ""   "é"  " d"      writes the first word without its space (SentencePiece) does so once
    """
    texts: list[str] = []
    start = read = 0
    for at in range(len(ids)):
        before = tokenizer.decode(ids[start:read], skip_special_tokens=False) if read > start else ""
        now = tokenizer.decode(ids[start : at + 1], skip_special_tokens=False)
        if now.endswith(HALF) and at + 1 < len(ids) and at - read < 4:
            texts.append("")
            continue
        texts.append(now[len(before) :])
        start, read = read, at + 1
    return texts


def _facts(store: Path) -> dict[str, Any]:
    try:
        return read_manifest(store)
    except (OSError, ValueError):
        return {}


def _stamp(path: Path) -> tuple[int, int]:
    """Return what tells a file from another one that took its place."""
    told = path.stat()
    return told.st_mtime_ns, told.st_size


def _open(path: Path, _stamp: tuple[int, int]) -> StoredRows:
    return StoredRows(path)


def _load_tokenizer(path: Path, _stamp: tuple[int, int]) -> Tokenizer:
    return Tokenizer.from_file(str(path))
