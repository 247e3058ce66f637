"""Samples: when they are taken, of what, and that taking them changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from truetune.data.template import build_renderer
from truetune.model import Base, add_lora, eos_ids, load_base, load_tokenizer
from truetune.records import Pair, Row
from truetune.rundir import RunDir
from truetune.samples import (
    DECODE_TOKENS,
    MAX_NEW_TOKENS,
    MAX_SHARE,
    MIN_NEW_TOKENS,
    Prompt,
    SamplePlan,
    Sampler,
    choose_prompts,
    plan_samples,
)


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 10**8))
def test_before_and_after_always_and_never_beyond_the_share(steps: int, every: int, num_tokens: int) -> None:
    plan = plan_samples(steps, eval_steps=every, num_trained_tokens=num_tokens)
    assert plan.steps[0] == 0
    assert plan.steps[-1] == steps
    assert all(step % every == 0 or step == steps for step in plan.steps)
    assert MIN_NEW_TOKENS <= plan.max_new_tokens <= MAX_NEW_TOKENS
    cost = len(plan.steps) * plan.max_new_tokens * DECODE_TOKENS
    assert cost <= MAX_SHARE * num_tokens or (len(plan.steps), plan.max_new_tokens) == (2, MIN_NEW_TOKENS)


def test_a_long_run_samples_at_every_evaluation() -> None:
    plan = plan_samples(1000, eval_steps=100, num_trained_tokens=10**7)
    assert plan.steps == tuple(range(0, 1001, 100))
    assert plan.max_new_tokens == MAX_NEW_TOKENS


def test_prompts_are_the_users_or_of_the_first_rows_that_differ(tiny_qwen: Path) -> None:
    """Of a row, the ids that were trained: its tools, and what was cut, stand in no message."""
    renderer = build_renderer(load_tokenizer(tiny_qwen), eos_ids(tiny_qwen), system="Be brief.")

    def row(number: int, text: str) -> Row:
        pair = Pair((1, 2, ord(text or "?")), (2,))
        return Row(number, "a", (Pair((9,), (2,)), pair), prompt=({"role": "user", "content": text},) if text else ())

    rows = [row(*some) for some in enumerate(("a", "", "a", "b", "c", "d", "e"))]
    chosen = choose_prompts(rows, None, renderer=renderer)
    assert [(prompt.text, prompt.ids) for prompt in chosen] == [(text, (1, 2, ord(text))) for text in "abcd"]
    (own,) = choose_prompts(rows, ["x?"], renderer=renderer)
    assert own == Prompt("x?", tuple(renderer.prompt_ids([{"role": "user", "content": "x?"}])))
    assert "Be brief." in renderer.tokenizer.decode(own.ids)
    assert choose_prompts(rows, [], renderer=renderer) == []


@pytest.fixture
def sampler(tiny_qwen: Path) -> Sampler:
    """Two prompts on the tiny model with LoRA that does nothing yet, and dropout that must not."""
    renderer = build_renderer(load_tokenizer(tiny_qwen), eos_ids(tiny_qwen))
    base = load_base(Base(str(tiny_qwen), tiny_qwen, ""), "float32")
    model = add_lora(base, r=4, alpha=8, dropout=0.5, targets=["all-linear"], seed=0).train()
    prompts = choose_prompts([], ["Hello", "你好"], renderer=renderer)
    return Sampler(model, renderer, prompts, SamplePlan((0, 2), 6), "eval")


def _move(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=1.0, generator=torch.Generator().manual_seed(1))


def test_base_and_current_model_answer(sampler: Sampler) -> None:
    """Before the first step they are one; afterwards the base still says what it said, also when asked anew."""
    first = list(sampler.see({"kind": "eval", "step": 0}))
    assert [event["prompt"] for event in first] == ["Hello", "你好"]
    assert all(event["base"] == event["answer"] for event in first)
    _move(sampler.model)
    later = list(sampler.see({"kind": "eval", "step": 2}))
    assert [event["base"] for event in later] == [event["base"] for event in first]
    assert all(event["answer"] != event["base"] for event in later)
    sampler._base = []
    assert [event["base"] for event in sampler.take(2)] == [event["base"] for event in first]


def test_nothing_is_disturbed(sampler: Sampler) -> None:
    """Mode and random numbers are as before, so that training goes on to the same bits (E10)."""
    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    list(sampler.take(2))
    assert sampler.model.training
    assert torch.equal(torch.rand(4), expected)


def test_only_when_due(sampler: Sampler) -> None:
    assert list(sampler.see({"kind": "eval", "step": 1})) == []
    assert list(sampler.see({"kind": "step", "step": 2})) == []
    assert list(sampler.begin()) == []
    sampler.waits_for = "step"
    assert [event["step"] for event in sampler.begin()] == [0, 0]


@pytest.mark.slow
def test_a_run_keeps_its_samples(small_run: Path) -> None:
    events = [event for event in RunDir(small_run).read_events() if event["kind"] == "sample"]
    assert [(event["step"], event["number"]) for event in events] == [(0, n) for n in range(4)] + [
        (4, n) for n in range(4)
    ]
    assert all("loss" not in event for event in events)
