"""Many texts at once and one by one give the same ids; what a user wrote as text never becomes a control token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from truetune.data.encode import MARKERS, Encoder

TEXTS = [
    "<|im_start|>user\nHi<|im_end|>\n",
    "",
    "你好，世界 👩\u200d🚀",
    " spaces  and\ttabs\r\n",
    "e\u0301 é שלום",
    "def f(x):\n    return x\n",
]


@pytest.fixture
def encoder(qwen_tokenizer: Any) -> Encoder:
    return Encoder(qwen_tokenizer, qwen_tokenizer.chat_template)


def test_many_at_once_are_each_alone(encoder: Encoder) -> None:
    texts = [*TEXTS, *(encoder.marked(text) for text in TEXTS)]
    for with_places in (False, True):
        found = encoder.encode(texts, with_places=with_places)
        assert [some.ids for some in found] == [encoder.encode_marked(text) for text in texts]
        assert [some.num_tokens(0, 1) is not None for some in found if some.ids] == [
            with_places and not MARKERS.search(text) for text in texts if text
        ]


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_any_text(qwen_tokenizer: Any, text: str) -> None:
    encoder = Encoder(qwen_tokenizer, qwen_tokenizer.chat_template)
    marked = encoder.marked(text)
    assert encoder.encode([marked])[0].ids == encoder.encode_marked(marked)


def test_marked_control_tokens_are_text(encoder: Encoder) -> None:
    text = "<|im_end|> and <think>"
    marked = encoder.marked(text)
    assert MARKERS.search(marked)
    (found,) = encoder.encode([marked], with_places=True)
    assert not set(found.ids) & set(encoder.tokenizer.added_tokens_decoder)
    assert encoder.tokenizer.decode(found.ids) == text
    assert found.num_tokens(0, 3) is None


def test_tokens_of_a_part(encoder: Encoder) -> None:
    """The tokens that show a part of a text are those of that part alone, where control tokens bound it."""
    for answer in ("Hello.", "你好 👩\u200d🚀", "a\n\nb", "x" * 300):
        text = f"<|im_start|>{answer}<|im_end|>\n"
        (found,) = encoder.encode([text], with_places=True)
        start = text.index(answer)
        assert found.num_tokens(start, start + len(answer)) == len(encoder.encode_marked(answer))


def test_threads_do_not_disturb_each_other(encoder: Encoder) -> None:
    """Marked and plain texts at once in two threads: transformers switches the tokenizer for the marked ones."""
    from concurrent.futures import ThreadPoolExecutor

    plain = [f"<|im_start|>user\n{number} 你好<|im_end|>\n" for number in range(300)]
    marked = [encoder.marked(f"{number} <|im_end|> text") for number in range(60)]
    wanted = [encoder.encode_marked(text) for text in (*plain, *marked)]
    with ThreadPoolExecutor(max_workers=2) as pool:
        for _ in range(5):
            two = pool.submit(encoder.encode, plain), pool.submit(encoder.encode, marked)
            assert [some.ids for future in two for some in future.result()] == wanted


def test_no_second_bos(small_tokenizer: Callable[..., Any]) -> None:
    """A tokenizer that adds its BOS to every text adds none to what a template rendered."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = small_tokenizer("<s>{{ messages[0]['content'] }}")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    assert tokenizer("a")["input_ids"][0] == 256
    (found,) = Encoder(tokenizer, tokenizer.chat_template).encode(["<s>a"])
    assert found.ids.count(256) == 1
