"""What the tests of the data share: the check of a fault, and a tokenizer made in the test."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from truetune.errors import TruetuneError
from truetune.messages import text


@pytest.fixture
def assert_fault() -> Callable[..., None]:
    """Compare a fault field by field, and with what it says in both languages."""

    def check(error: TruetuneError, key: str, *, where: str, fix: str | None = None, **values: Any) -> None:
        assert (error.key, error.where, error.fix) == (key, where, fix or key)
        assert {name: str(value) for name, value in error.values.items()} == {n: str(v) for n, v in values.items()}
        english, chinese = (
            [text(f"error.{key}", lang, **values), text(f"fix.{error.fix}", lang, **values)] for lang in ("en", "zh")
        )
        assert str(error) == f"{where}: {english[0]}\n  {english[1]}"
        assert all(chinese)
        assert chinese[0] != english[0]
        assert chinese[1] != english[1]

    return check


@pytest.fixture
def small_tokenizer(small_tokenizers: Callable[..., Any]) -> Callable[..., Any]:
    """See `small_tokenizers`."""
    return small_tokenizers


@pytest.fixture(scope="session")
def small_tokenizers() -> Callable[..., Any]:
    """Make a tokenizer of 256 bytes and a few special tokens, in the process; every text decodes to itself."""

    def make(
        chat_template: str | None = None,
        *,
        specials: Sequence[str] = ("<s>", "</s>"),
        eos_token: str | None = "</s>",
        pad_token: str | None = None,
    ) -> Any:
        from tokenizers import Tokenizer, decoders, pre_tokenizers
        from tokenizers.models import BPE
        from transformers import PreTrainedTokenizerFast

        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        backend = Tokenizer(BPE(vocab={char: number for number, char in enumerate(alphabet)}, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens(list(specials))
        named = {"eos_token": eos_token, "pad_token": pad_token}
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend, **{name: token for name, token in named.items() if token is not None}
        )
        tokenizer.chat_template = chat_template
        return tokenizer

    return make
