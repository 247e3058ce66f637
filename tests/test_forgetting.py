"""What is forgotten: nothing by an adapter that does nothing, and else what plain transformers says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from truetune.data.template import build_renderer
from truetune.engine.step import Engine
from truetune.forgetting import QUESTIONS, check_forgetting
from truetune.generate import Sampling, replies
from truetune.model import Base, add_lora, eos_ids, load_base, load_tokenizer


@pytest.mark.parametrize("lang", list(QUESTIONS))
def test_loss_of_the_bases_own_answers(lang: str, tiny_base: Path) -> None:
    renderer = build_renderer(load_tokenizer(tiny_base), eos_ids(tiny_base), system="Be a pirate.")
    base = load_base(Base(str(tiny_base), tiny_base, ""), "float32")
    plain = build_renderer(load_tokenizer(tiny_base), eos_ids(tiny_base))
    prompts = [plain.prompt_ids([{"role": "user", "content": question}]) for question in QUESTIONS[lang]]
    own = replies(base, plain, prompts=prompts, sampling=Sampling(32))

    def loss() -> float:
        """The same by transformers, one answer at a time, with what the base said before LoRA was added."""
        losses = []
        for prompt, reply in zip(prompts, own, strict=True):
            ids = torch.tensor([[*prompt, *reply.token_ids]])
            with torch.no_grad():
                logits_AV = model.eval()(input_ids=ids).logits[0, -len(reply.token_ids) - 1 : -1]
            losses.append(F.cross_entropy(logits_AV, ids[0, -len(reply.token_ids) :], reduction="none"))
        return float(torch.cat(losses).mean())

    model = add_lora(base, r=4, alpha=8, dropout=0.5, targets=["all-linear"], seed=0).train()
    engine = Engine(model, "trie", 0, 2048)
    found = check_forgetting(engine, renderer, lang=lang)
    assert found.before == found.after == pytest.approx(loss(), rel=1e-5)
    assert (found.num_questions, found.num_tokens) == (8, sum(len(reply.token_ids) for reply in own))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=1.0)
    model.train()
    moved = check_forgetting(engine, renderer, lang=lang)
    assert model.training
    assert moved.before == pytest.approx(found.before, rel=1e-6)
    assert moved.after == pytest.approx(loss(), rel=1e-5)
    assert abs(moved.after - moved.before) > 0.1
