"""The comparison before step 1: what it compares, what it finds, what it leaves behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from truetune.engine import compare, objective, step
from truetune.engine.attention import _Core
from truetune.engine.compare import choose_engine, comparison_pairs
from truetune.engine.step import Engine
from truetune.model import Base, add_lora, load_base, train_all
from truetune.records import Pair

PREFIX = tuple(range(50, 62))
PAIRS = [Pair((*PREFIX, n), (n + 1, n + 2, n + 3, 2)) for n in range(8)] + [Pair((7, 8), (9, 2))]


@pytest.fixture
def engine(tiny_qwen: Path) -> Engine:
    """The tiny model with fresh LoRA, whose B is 0, and dropout."""
    base = load_base(Base(str(tiny_qwen), tiny_qwen, ""), "float32")
    model = add_lora(base, r=4, alpha=8, dropout=0.2, targets=["all-linear"], seed=0)
    return Engine(model.train(), "plain", 0, 1 << 40)


def test_two_pairs_that_share_a_prefix_are_compared() -> None:
    """The longest shared prefix among neighbours; a data set of one pair gives one."""
    two = comparison_pairs(PAIRS)
    assert len(two) == 2
    assert all(pair.prompt_ids[:12] == PREFIX for pair in two)
    assert comparison_pairs(PAIRS[:1] * 3) == PAIRS[:1]


def test_pairs_that_continue_each_other_do_not_compare_a_trie() -> None:
    """The second turn of a conversation shares most, but makes no branch."""
    turn = PAIRS[0]
    following = Pair(turn.prompt_ids + turn.answer_ids, (5, 6, 2))
    two = comparison_pairs([turn, following, PAIRS[1]])
    assert turn not in two
    assert following in two
    assert PAIRS[1] in two


def test_trie_is_chosen_and_nothing_is_left_behind(engine: Engine) -> None:
    """Weights, gradients, modes and random numbers are as before."""
    before = {name: p.detach().clone() for name, p in engine.model.named_parameters()}
    modes = [layer.training for layer in engine.model.modules()]
    choice = choose_engine(engine, PAIRS)
    assert choice.engine.kind == "trie"
    (result,) = choice.comparisons
    assert result.is_same
    assert result.loss < 1e-6
    assert 0 < result.gradient < 1e-5
    assert all(torch.equal(p, before[name]) for name, p in engine.model.named_parameters())
    assert all(p.grad is None for p in engine.model.parameters())
    assert [layer.training for layer in engine.model.modules()] == modes


def skip_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plant: branches see each other's keys."""
    monkeypatch.setattr(step, "build_trie", lambda pairs: _without_branches(step_build(pairs)))


step_build = step.build_trie


def _without_branches(trie: Any) -> Any:
    from dataclasses import replace

    import numpy as np

    return replace(trie, paths=((np.arange(len(trie)), 0),))


def wrong_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plant: positions count nodes of the row, not depth (rows 15 of the field's list)."""
    from dataclasses import replace

    import numpy as np

    monkeypatch.setattr(
        step, "build_trie", lambda pairs: replace(step_build(pairs), positions_N=np.arange(len(step_build(pairs))))
    )


def wrong_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plant: scores scaled twice."""
    right = _Core.probabilities
    monkeypatch.setattr(_Core, "probabilities", lambda self, chunk, q, k: right(self, chunk, q * self.scale, k))


FAULTS = {"branches see each other": skip_mask, "positions": wrong_positions, "scale": wrong_scale}


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_fall_back_to_padded_rows(name: str, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each fault of the trie is found, told, and training goes on with padded rows, which agree."""
    FAULTS[name](monkeypatch)
    choice = choose_engine(engine, PAIRS)
    assert choice.engine.kind == "padded"
    assert [result.is_same for result in choice.comparisons] == [False, True]
    assert choice.comparisons[0].gradient > 1e-2


def test_unknown_head_falls_back_to_the_models_own(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head read wrongly spoils both fast kinds; the loss is then the model's own, on the same pairs."""
    right = step.find_head
    monkeypatch.setattr(step, "find_head", lambda model: compare.replace(right(model), scale=0.5))
    choice = choose_engine(engine, PAIRS)
    assert (choice.engine.kind, len(choice.comparisons)) == ("plain", 2)
    assert not any(layer.is_fused for layer in choice.engine.model.modules() if hasattr(layer, "is_fused"))
    monkeypatch.undo()
    forwards = step.make_forwards(choice.engine, PAIRS)
    loss = objective.train_step(choice.engine, forwards, seeds=(0, 0), backward=lambda loss: None).loss
    trie = choose_engine(engine, PAIRS).engine
    again = objective.train_step(trie, step.make_forwards(trie, PAIRS), seeds=(0, 0), backward=lambda loss: None).loss
    assert again == pytest.approx(loss, rel=1e-5)


def test_attention_dropout_falls_back(engine: Engine) -> None:
    """A model that drops attention probabilities in training cannot run as a trie: said by name."""
    for layer in engine.transformer.model.layers:
        layer.self_attn.attention_dropout = 0.5
    choice = choose_engine(engine, PAIRS)
    assert choice.engine.kind != "trie"
    assert "dropout" in choice.comparisons[0].problem


# --- full fine-tuning ---


@pytest.fixture
def whole(tiny_qwen: Path) -> Engine:
    """The tiny model with all weights trained."""
    return Engine(train_all(load_base(Base(str(tiny_qwen), tiny_qwen, ""), "float32")), "plain", 0, 1 << 40)


@pytest.mark.parametrize("max_whole", [0, 1 << 20, 1 << 40])
def test_all_weights_are_compared(whole: Engine, max_whole: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they are, or by random signs: both find the trie right; the whole gradient never was."""
    monkeypatch.setattr(compare, "MAX_WHOLE", max_whole)
    most, right = [], compare._told

    def told(gradient: torch.Tensor, seed: int) -> torch.Tensor:
        most.append(sum(p.grad is not None for p in whole.model.parameters()))
        return right(gradient, seed)

    monkeypatch.setattr(compare, "_told", told)
    choice = choose_engine(whole, PAIRS)
    (result,) = choice.comparisons
    assert (choice.engine.kind, result.is_same) == ("trie", True)
    assert result.gradient < 1e-5
    assert max(most) == 0
    assert len(most) >= 2 * len([*whole.model.parameters()])
    assert all(p.grad is None for p in whole.model.parameters())


def lose(name: str) -> Any:
    """Plant: the engine gives weights called so no gradient."""

    def plant(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        right = compare._loss_and_gradient

        def hurt(engine: Engine, pairs: Any) -> Any:
            hooks = []
            if engine.kind != "plain":
                for key, p in engine.model.named_parameters():
                    if name in key:
                        hooks.append(p.register_hook(torch.zeros_like))
            try:
                return right(engine, pairs)
            finally:
                for hook in hooks:
                    hook.remove()

        monkeypatch.setattr(compare, "_loss_and_gradient", hurt)

    return plant


def lose_head(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plant: of the tied embedding, only what comes in at the bottom is learned."""
    from dataclasses import replace

    right = step.find_head

    def find(model: Any) -> Any:
        head = right(model)
        return replace(head, weight_VD=head.weight_VD.detach())

    monkeypatch.setattr(step, "find_head", find)


LOST = {"tied head": lose_head, "a norm": lose("layers.1.input_layernorm"), "a bit of a layer": lose("0.mlp.up_proj")}


@pytest.mark.parametrize("name", LOST)
@pytest.mark.parametrize("max_whole", [0, 1 << 20])
def test_lost_gradients_of_weights_are_found(
    name: str, max_whole: int, whole: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where gradients are only known by random signs: nothing but the model's own code is then left."""
    monkeypatch.setattr(compare, "MAX_WHOLE", max_whole)
    LOST[name](whole, monkeypatch)
    choice = choose_engine(whole, PAIRS)
    assert choice.engine.kind == "plain"
    assert all(result.gradient > 1e-3 for result in choice.comparisons), choice.comparisons


def test_signs_keep_the_norm() -> None:
    """Of a layer's gradient to a few percent, of a single row to a half; the sum of two is the two sums'."""
    generator = torch.Generator().manual_seed(3)
    gradient = torch.randn(600, 2000, generator=generator)
    row = torch.zeros_like(gradient)
    row[77] = 1e-3 * gradient[77]
    for some, tolerance in ((gradient, 0.03), (row, 0.6)):
        assert float(compare._told(some, 5).norm()) == pytest.approx(float(some.norm()), rel=tolerance)
    both = compare._told(gradient, 5) + compare._told(row, 5)
    assert torch.allclose(both, compare._told(gradient + row, 5), rtol=1e-4, atol=1e-4)
    assert compare._told(gradient, 5).numel() == 600 * compare.NUM_SIGNS
