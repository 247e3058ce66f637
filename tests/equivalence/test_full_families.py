"""Full fine-tuning by family: trie, padded rows and one pair at a time give every weight the same gradient, in fp32.

And documents, which are pairs without a prompt: none sees another one, which packed rows cannot say of theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from test_families import CASES, SMALL, choice_of, loss_and_gradients, random_pairs
from transformers import AutoModelForCausalLM

from truetune.engine.compare import choose_engine
from truetune.engine.families import FAMILIES
from truetune.engine.step import Engine, hidden_states, make_forwards, running, scaled_from
from truetune.model import train_all
from truetune.records import Pair

TRAINED = {
    "qwen3, tied": ("qwen3", {"tie_word_embeddings": True}),
    "qwen3, untied": ("qwen3", {"tie_word_embeddings": False}),
    "qwen2, biased": ("qwen2", {"tie_word_embeddings": True}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "gemma2": ("gemma2", {}),
    "gemma3_text": ("gemma3_text", {}),
    "phi3": ("phi3", {}),
    "granite": ("granite", {}),
    "qwen3_moe": ("qwen3_moe", {}),
}


def make(name: str, **keys: Any) -> Any:
    """A tiny random model of a family, fp32, all weights trained; norms and biases are not what they begin as."""
    kind, more = CASES[name]
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**{**SMALL, **more, **keys})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += (0.1 if parameter.ndim == 1 else 0.02) * torch.randn_like(parameter)
    return train_all(model)


@pytest.mark.parametrize("name", TRAINED)
def test_every_weight_gets_one_gradient(name: str) -> None:
    """Loss within 1e-5 and each gradient tensor within 1e-5 of one pair at a time through the model's own code."""
    family, keys = TRAINED[name]
    model = make(family, **keys)
    is_tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert is_tied == keys.get("tie_word_embeddings", is_tied)
    pairs = random_pairs()
    plain = Engine(model, "plain", 0, 1, scaled_from=scaled_from(model))
    choice = choose_engine(replace(plain, max_tokens=1 << 40), pairs)
    assert choice.engine.kind == FAMILIES[family], choice.comparisons
    wanted_loss, wanted = loss_and_gradients(choice_of("plain", plain, max_tokens=1), pairs)
    # What is never read or predicted, such as a position table's end, has no gradient in either.
    alive = {key for key, gradient in wanted.items() if gradient is not None and float(gradient.norm()) > 0}
    assert len(alive) >= 0.95 * len(wanted) > 19
    for kind, max_tokens in [("padded", 1 << 40), ("trie", 1 << 40), ("trie", 40)]:
        loss, found = loss_and_gradients(choice_of(kind, plain, max_tokens=max_tokens), pairs)
        assert loss == pytest.approx(wanted_loss, rel=1e-5), (kind, max_tokens)
        for key in alive:
            apart, norm = float((found[key] - wanted[key]).norm()), float(wanted[key].norm())
            # A bias of keys shifts all scores alike, which no softmax sees: its gradient is rounding.
            assert apart <= 1e-5 * norm or key.endswith("k_proj.bias"), (kind, max_tokens, key, apart / norm)


def test_checkpointing_changes_no_gradient() -> None:
    """Recomputed activations give the same gradient of every weight."""
    results = []
    for is_on in (False, True):
        engine = Engine(make("qwen3"), "trie", 0, 1 << 40)
        if is_on:
            engine.transformer.activation_checkpointing_enable()
        results.append(loss_and_gradients(engine, random_pairs()))
    (loss, gradients), (again, recomputed) = results
    assert again == pytest.approx(loss, rel=1e-6)
    assert len(gradients) > 20
    for key, gradient in gradients.items():
        assert float((recomputed[key] - gradient).norm()) <= 1e-6 * float(gradient.norm()), key


# --- documents ---

BOS, EOS = 1, 2
TEXTS = [(11, 12, 13, 14, 15, 16), (21, 22, 23, 24, 25), (31, 32, 33, 34, 35, 36, 37)]


def as_pairs(texts: Sequence[tuple[int, ...]], begin: tuple[int, ...]) -> list[Pair]:
    """What template.py makes of plain text: the first token is read, the others and the end are learned."""
    whole = [(*begin, *some, EOS) for some in texts]
    return [Pair(ids[:1], ids[1:]) for ids in whole]


@pytest.mark.parametrize("name", ["qwen3", "llama", "gemma3_text"])
@pytest.mark.parametrize("begin", [(), (BOS,)])
def test_documents_do_not_see_each_other(name: str, begin: tuple[int, ...]) -> None:
    """Another last document, of the same length, leaves the others' states bit-equal; packed in one row it does not.

    Without bos documents are roots of their own, with it they share that token alone, which reads nothing of them.
    """
    engine = choice_of("trie", Engine(make(name), "trie", 0, 1 << 40), max_tokens=1 << 40)
    changed = [(9, *TEXTS[0][1:]), *TEXTS[1:]]
    states, packed = [], []
    with running(engine), torch.no_grad():
        for texts in (TEXTS, changed):
            (forward,) = make_forwards(engine, as_pairs(texts, begin))
            order = sorted(range(3), key=lambda number: texts[number])
            assert order == [0, 1, 2]
            hidden_ND = hidden_states(engine, forward)
            states.append(hidden_ND[len(begin) + len(TEXTS[0]) :])
            assert len(hidden_ND) == len(begin) + sum(map(len, TEXTS))
            assert (forward.layout.trie.positions_N == 0).sum() == (1 if begin else 3)
    with torch.no_grad():
        for texts in (TEXTS, changed):
            row = torch.tensor([[token for some in texts for token in (*begin, *some, EOS)]])
            hidden_TD = engine.transformer.base_model(row, use_cache=False).last_hidden_state[0]
            packed.append(hidden_TD[len(begin) + len(TEXTS[0]) + 1 :])
    assert torch.equal(*states)
    assert not torch.allclose(*packed, rtol=1e-3, atol=1e-3)


def test_documents_are_learned_as_each_one_alone() -> None:
    """The step's loss and gradient are those of the documents one by one."""
    engine = Engine(make("llama"), "trie", 0, 1 << 40)
    pairs = as_pairs(TEXTS, (BOS,))
    loss, found = loss_and_gradients(choice_of("trie", engine, max_tokens=1 << 40), pairs)
    wanted_loss, wanted = loss_and_gradients(choice_of("plain", engine, max_tokens=1), pairs)
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    assert len(wanted) > 20
    for key, gradient in wanted.items():
        assert float((found[key] - gradient).norm()) <= 1e-5 * float(gradient.norm()), key
