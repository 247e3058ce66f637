"""Rows answered together: the same greedy ids as each alone without a cache, whenever they come and go (E11)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from truetune.model import find_base, load_base
from truetune.serve.batch import Batch, Row
from truetune.serve.sampler import Draw, Scored

NUM_NEW = 12
SHARED = list(range(100, 130))
PROMPTS = [
    *([random.Random(n).randrange(3000) for _ in range(n)] for n in (5, 40, 13, 150, 1, 7)),
    [*SHARED, 7],
    [*SHARED, 8, 9],
    SHARED,
]


@pytest.fixture(scope="module")
def tiny(tiny_qwen: Path) -> Any:
    """The tiny Qwen3, in fp32."""
    return load_base(find_base(str(tiny_qwen)), "float32").eval()


def small(family: str, **values: Any) -> Any:
    """A tiny model of another family."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": 3000, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **sizes, **heads, **values)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@torch.no_grad()
def alone(model: Any, prompt: Sequence[int], count: int = NUM_NEW) -> list[int]:
    """The greedy ids of one prompt: the whole sequence through the model for each token, no cache."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def together(batch: Batch, prompts: Sequence[Sequence[int]], *, piece: int, every: int) -> list[list[int]]:
    """The ids of all prompts; one joins every so many steps, and leaves when it has its tokens."""
    rows = [Row(list(prompt), Draw(), len(prompt) + NUM_NEW) for prompt in prompts]
    pending, steps = list(rows), 0
    while pending or batch.rows:
        if pending and steps % every == 0:
            batch.add(pending.pop(0))
        steps += 1
        for row, _ in batch.step(piece):
            if len(row.ids) == row.num_reserved:
                batch.remove(row)
    return [row.ids[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]


@pytest.fixture(scope="module")
def wanted(tiny: Any) -> list[list[int]]:
    """The greedy ids of all prompts, each alone."""
    return [alone(tiny, prompt) for prompt in PROMPTS]


@pytest.mark.parametrize(
    ("piece", "every", "is_reusing"), [(1, 1, False), (7, 2, True), (64, 3, True), (1000, 1, False)]
)
def test_together_as_alone(tiny: Any, wanted: list[list[int]], piece: int, every: int, is_reusing: bool) -> None:
    batch = Batch(tiny, is_reusing=is_reusing)
    assert together(batch, PROMPTS, piece=piece, every=every) == wanted
    # Once more, over what the first ones left behind.
    assert together(batch, PROMPTS, piece=piece, every=every) == wanted
    assert len({tuple(ids) for ids in wanted}) == len(PROMPTS)


FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 9},
    "qwen2": {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    "gemma3_text": {"sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"]},
    "gpt_oss": {"sliding_window": 9, "num_local_experts": 2, "num_experts_per_tok": 1},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_other_kinds_of_layers(family: str) -> None:
    """Sliding windows, both kinds in one model, and attention that adds its mask (gpt-oss: eager)."""
    model = small(family, **FAMILIES[family])
    wanted = [alone(model, prompt) for prompt in PROMPTS]
    assert together(Batch(model), PROMPTS, piece=16, every=2) == wanted


def test_prefixes_are_copied_not_computed(tiny: Any) -> None:
    """From a living row, from one that left, and in place; a whole known prompt needs one step."""
    batch = Batch(tiny)
    first = Row([*SHARED, 1], Draw(), 60)
    batch.add(first)
    batch.step(100)
    second = Row([*SHARED, 2], Draw(), 60)
    batch.add(second)
    assert (first.num_reused, second.num_reused) == (0, len(SHARED))
    batch.step(100)
    batch.remove(first)
    batch.remove(second)
    third = Row([*SHARED, 2], Draw(), 60)
    batch.add(third)
    assert third.num_reused == len(SHARED)
    ((row, token),) = batch.step(1)
    assert (row, token) == (third, alone(tiny, [*SHARED, 2], 1)[0])


def test_room_grows_and_is_given_back(tiny: Any) -> None:
    """One long row does not leave its room to a short one for ever."""
    batch = Batch(tiny)
    long = Row([1, 2, 3], Draw(), 5000)
    batch.add(long)
    assert batch.num_tokens >= 5000
    batch.remove(long)
    assert batch.num_tokens_with(20) == 256
    short = Row([4, 5], Draw(), 20)
    batch.add(short)
    assert batch.num_tokens == 256
    batch.step(10)
    assert short.ids[2:] == alone(tiny, [4, 5], 1)


def test_each_row_has_its_own_wishes(tiny: Any) -> None:
    """A drawn row with a seed gives the same alone and beside others; log probabilities come to who asks."""

    def drawn(beside: Sequence[Row]) -> list[int]:
        batch, row = Batch(tiny), Row([5, 6, 7], Draw(temperature=1.0, seed=3), 30)
        for other in [*beside, row]:
            batch.add(other)
        for _ in range(8):
            batch.step(64)
        return row.ids[3:]

    others = [Row([9, n], Draw(temperature=1.5, seed=n), 30) for n in range(3)]
    assert drawn([]) == drawn(others)
    batch = Batch(tiny)
    batch.add(Row([1, 2], Draw(num_logprobs=2), 30))
    batch.add(Row([1, 2], Draw(), 30))
    told = [some for _, some in batch.step(64)]
    assert isinstance(told[0], Scored)
    assert told[0].token == told[1]
    assert len(told[0].likeliest) == 2


@pytest.mark.real
def test_real_weights_together_as_generate(smol: Path, smol_tokenizer: Any) -> None:
    """SmolLM2 in fp32: six questions that come and go, and transformers' own `generate` for each alone."""
    from truetune.data.template import build_renderer

    model = load_base(find_base(str(smol)), "float32").eval()
    renderer = build_renderer(smol_tokenizer, [2])
    prompts = [renderer.prompt_ids([{"role": "user", "content": f"Name {n} rivers."}]) for n in range(2, 8)]
    wanted = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NUM_NEW, min_new_tokens=NUM_NEW, do_sample=False
        )
        wanted.append(output[0, len(prompt) :].tolist())
    # `min_new_tokens` keeps the stop token away, which these answers do not reach.
    assert together(Batch(model), prompts, piece=20, every=2) == wanted
    assert len({tuple(ids) for ids in wanted}) > 1
