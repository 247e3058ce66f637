"""A tokenizer as GGUF holds it; what llama.cpp makes of it is in test_llama.py."""

from __future__ import annotations

from typing import Any

import pytest

from tests.small import FAMILIES, _tokenizer
from truetune.errors import UserError
from truetune.export.vocabulary import BYTE, CONTROL, NORMAL, UNUSED, vocabulary

EXPECTED = {
    "llama": ("gpt2", "llama-bpe"),
    "qwen2": ("gpt2", "qwen2"),
    "qwen3": ("gpt2", "qwen2"),
    "gemma3": ("llama", "default"),
    "mistral": ("llama", "default"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_words_kinds_and_merges(family: str) -> None:
    tokenizer = _tokenizer(family)
    words = vocabulary(tokenizer, len(tokenizer) + 3)
    assert (words.model, words.pre) == EXPECTED[family]
    assert len(words.words) == len(words.kinds) == len(tokenizer) + 3
    assert words.kinds[-3:] == [UNUSED] * 3
    for word, number in tokenizer.get_vocab().items():
        assert words.words[number] == word
    assert words.kinds[tokenizer.eos_token_id] == CONTROL
    assert words.kinds.count(NORMAL) > 100
    if words.model == "llama":
        assert words.kinds.count(BYTE) == 256
        assert not words.merges
        # Made earlier, merged earlier.
        merged = [number for number, score in enumerate(words.scores) if score < 0 and words.kinds[number] == NORMAL]
        assert [words.scores[number] for number in merged] == sorted((words.scores[n] for n in merged), reverse=True)
    else:
        assert len(words.merges) > 50
        assert not words.scores


def test_the_real_tokenizers(qwen_tokenizer: Any) -> None:
    words = vocabulary(qwen_tokenizer, 151936)
    assert (words.model, words.pre, len(words.merges)) == ("gpt2", "qwen2", 151387)
    assert words.kinds[151645] == CONTROL


def test_a_split_that_llama_does_not_know_is_refused() -> None:
    from tests.small import CHATML, byte_level

    tokenizer = byte_level(CHATML, ["<|im_end|>"], split=r"\p{L}+|\d", eos_token="<|im_end|>")
    with pytest.raises(UserError) as caught:
        vocabulary(tokenizer, 500)
    assert caught.value.key == "gguf_tokenizer"
    assert caught.value.values["kind"] == r"\p{L}+|\d"
