"""A tokenizer as GGUF holds it: words, their kinds, merges or scores, and the name of the split before merging."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from truetune.errors import UserError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {
    _QWEN2: "qwen2",
    _QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|"): "llama-bpe",
    (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ): "tekken",
}
"""Regex of a byte-level tokenizer's split: llama.cpp's name of it."""

BYTE_WORD = re.compile(r"<0x[0-9A-F]{2}>")


@dataclass(frozen=True)
class Vocabulary:
    """`model`: "gpt2" (byte-level BPE, with `merges`) or "llama" (SentencePiece, with `scores`).

    `pre`: the split's name. `words`, `kinds`: one for each row of the embedding.
    """

    model: str
    pre: str
    words: Sequence[str]
    kinds: Sequence[int]
    merges: Sequence[str]
    scores: Sequence[float]
    adds_space: bool


def vocabulary(tokenizer: Any, num_rows: int) -> Vocabulary:
    """Return a tokenizer as GGUF holds it, filled up to the embedding's rows.

    Raises: UserError if llama.cpp has no tokenizer of its kind.
    """
    name = str(tokenizer.name_or_path)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError("gguf_tokenizer", where=name, fix="gguf_tokenizer", kind=type(tokenizer).__name__)
    told = json.loads(backend.to_str())
    bpe, normalizers = told["model"], _parts(told["normalizer"], "normalizers")
    is_sentencepiece = bool(bpe.get("byte_fallback"))
    if bpe["type"] != "BPE":
        raise UserError("gguf_tokenizer", where=name, fix="gguf_tokenizer", kind=bpe["type"])
    splits = _parts(told["pre_tokenizer"], "pretokenizers")
    pre = "default" if is_sentencepiece else _split_name(splits, name)
    adds_space = any(part["type"] == "Prepend" for part in normalizers) or any(
        part["type"] == "Metaspace" and part.get("prepend_scheme") != "never" for part in splits
    )
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in bpe["merges"]]
    words, kinds = _words(tokenizer, num_rows, is_sentencepiece=is_sentencepiece)
    return Vocabulary(
        model="llama" if is_sentencepiece else "gpt2",
        pre=pre,
        words=words,
        kinds=kinds,
        merges=[] if is_sentencepiece else merges,
        scores=_scores(words, kinds, bpe["merges"]) if is_sentencepiece else [],
        adds_space=adds_space,
    )


def _parts(value: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    """Return the parts of a sequence, or the one part, or nothing."""
    if value is None:
        return []
    return value[name] if value["type"] == "Sequence" else [value]


def _split_name(splits: list[dict[str, Any]], name: str) -> str:
    kinds = [part["type"] for part in splits]
    if kinds == ["ByteLevel"] and splits[0]["use_regex"]:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and splits[0]["individual_digits"] and splits[1]["use_regex"]:
        return "smollm"
    regex = splits[0].get("pattern", {}).get("Regex") if kinds == ["Split", "ByteLevel"] else None
    if regex not in SPLITS:
        raise UserError("gguf_tokenizer", where=name, fix="gguf_tokenizer", kind=regex or "+".join(kinds))
    return SPLITS[regex]


def _words(tokenizer: Any, num_rows: int, *, is_sentencepiece: bool) -> tuple[list[str], list[int]]:
    """Return the word and the kind of each row; rows without a word are unused."""
    words, kinds = [f"[PAD{number}]" for number in range(num_rows)], [UNUSED] * num_rows
    for word, number in tokenizer.get_vocab().items():
        words[number] = word
        kinds[number] = BYTE if is_sentencepiece and BYTE_WORD.fullmatch(word) else NORMAL
    for number, token in tokenizer.added_tokens_decoder.items():
        words[number] = token.content
        kinds[number] = CONTROL if token.special else USER_DEFINED
    if is_sentencepiece and tokenizer.unk_token_id is not None:
        kinds[tokenizer.unk_token_id] = UNKNOWN
    return words, kinds


def _scores(words: Sequence[str], kinds: Sequence[int], merges: Sequence[Any]) -> list[float]:
    """Return scores by which llama.cpp merges in the order of the tokenizer: the earlier a word is made, the higher."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault("".join(merge.split(" ", 1) if isinstance(merge, str) else merge), rank)
    return [
        -float(ranks[word]) if kind == NORMAL and word in ranks else 0.0 if kind != UNUSED else -1e6
        for word, kind in zip(words, kinds, strict=True)
    ]
