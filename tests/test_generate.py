"""Answers: batched as single, streamed as whole, stopped where they should."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from truetune.data.template import build_renderer
from truetune.generate import EMPTY_THINKING, Sampling, _without_empty_thinking, answers, stream
from truetune.model import Base, load_base

PROMPTS = [
    [{"role": "user", "content": text}] for text in ("Hi", "你是谁？今天天气怎么样？", "a b c d e f g h i j", "Why?")
]


@pytest.fixture(scope="module")
def tiny(tiny_qwen: Path, qwen_tokenizer: Any) -> tuple[Any, Any]:
    """The tiny model and its renderer."""
    model = load_base(Base(str(tiny_qwen), tiny_qwen, ""), "float32").eval()
    return model, build_renderer(qwen_tokenizer, [151645])


def test_batched_answers_equal_single_ones(tiny: tuple[Any, Any]) -> None:
    """Padding on the left changes no greedy answer (E11)."""
    sampling = Sampling(max_new_tokens=12)
    together = answers(*tiny, prompts=PROMPTS, sampling=sampling, batch_size=4)
    assert together == [answers(*tiny, prompts=[prompt], sampling=sampling)[0] for prompt in PROMPTS]
    assert len(set(together)) > 1


def test_stream_equals_the_whole_answer(tiny: tuple[Any, Any]) -> None:
    """The pieces joined are the text."""
    for prompt in PROMPTS:
        pieces = list(stream(*tiny, messages=prompt, sampling=Sampling(max_new_tokens=12)))
        assert "".join(pieces).strip() == answers(*tiny, prompts=[prompt], sampling=Sampling(max_new_tokens=12))[0]


def test_greedy_is_greedy_whatever_the_model_says(tiny: tuple[Any, Any]) -> None:
    """A penalty in the model's generation_config.json (Qwen2.5 has one) changes no answer."""
    import copy

    model, renderer = tiny
    plain = answers(*tiny, prompts=PROMPTS, sampling=Sampling(12))
    changed = copy.copy(model)
    changed.generation_config = copy.deepcopy(model.generation_config)
    changed.generation_config.update(repetition_penalty=5.0, no_repeat_ngram_size=1, temperature=0.1, do_sample=True)
    assert answers(changed, renderer, prompts=PROMPTS, sampling=Sampling(12)) == plain


def test_sampling_depends_on_the_temperature(tiny: tuple[Any, Any]) -> None:
    """Greedy repeats itself; at a temperature, seeds differ and a seed repeats."""
    texts = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        texts.append("".join(stream(*tiny, messages=PROMPTS[0], sampling=Sampling(12, 1.0))))
    assert texts[0] == texts[1] != texts[2]


def test_closing_a_stream_ends_it(tiny: tuple[Any, Any]) -> None:
    """A reader that goes away does not leave the model running to its limit."""
    pieces = stream(*tiny, messages=PROMPTS[0], sampling=Sampling(max_new_tokens=100_000))
    next(pieces)
    pieces.close()


def test_an_answer_without_text_ends(tiny: tuple[Any, Any]) -> None:
    """A model that stops at once gives an empty answer, and does not hang."""
    model, renderer = tiny

    class Silent:
        parameters = model.parameters

        def generate(self, **arguments: Any) -> None:
            arguments["streamer"].put(arguments["input_ids"])

    assert list(stream(Silent(), renderer, messages=PROMPTS[0], sampling=Sampling(4))) == []


def test_a_fault_in_the_model_reaches_the_reader(tiny: tuple[Any, Any]) -> None:
    """No silent end, no hang."""
    model, renderer = tiny

    class Broken:
        parameters = model.parameters

        def generate(self, **_: Any) -> None:
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        list(stream(Broken(), renderer, messages=PROMPTS[0], sampling=Sampling(4)))


@pytest.mark.parametrize("size", [1, 3, 100])
def test_empty_thinking_is_left_out_however_it_is_cut(size: int) -> None:
    """Only an empty block at the very start goes; everything else stays."""
    for text, shown in [
        (EMPTY_THINKING + "Hello", "Hello"),
        ("<think>\nhm\n</think>\n\nHi", "<think>\nhm\n</think>\n\nHi"),
        ("<thin", "<thin"),
        ("Hi " + EMPTY_THINKING, "Hi " + EMPTY_THINKING),
        ("", ""),
    ]:
        pieces = iter([text[at : at + size] for at in range(0, len(text), size)])
        assert "".join(_without_empty_thinking(pieces)) == shown
