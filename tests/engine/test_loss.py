"""The chunked loss over edges against torch's cross-entropy over full logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from truetune.engine import loss as module
from truetune.engine.loss import Head, edge_loss, edge_losses, find_head

NODES, SIZE, WORDS, EDGES = 30, 16, 50, 40


def case(
    seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Hidden states, head weight, and edges: several from one node, weights above 1."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(NODES, SIZE, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(WORDS, SIZE, generator=generator, dtype=dtype)
    edges = {
        "parents_E": torch.randint(0, NODES, (EDGES,), generator=generator),
        "targets_E": torch.randint(0, WORDS, (EDGES,), generator=generator),
        "weights_E": torch.randint(1, 4, (EDGES,), generator=generator),
    }
    return hidden, weight, edges


def plain(hidden: torch.Tensor, head: Head, edges: dict[str, torch.Tensor]) -> torch.Tensor:
    """Full logits, torch's cross-entropy."""
    logits = hidden[edges["parents_E"]] @ head.weight_VD.T
    logits = (logits if head.bias_V is None else logits + head.bias_V) * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    losses = F.cross_entropy(logits, edges["targets_E"], reduction="none")
    return (losses * edges["weights_E"]).sum()


def in_pieces(monkeypatch: pytest.MonkeyPatch, rows_a_chunk: int, rows_a_block: int) -> None:
    """Cut the logits so."""
    monkeypatch.setattr(module, "CHUNK_LOGITS", rows_a_chunk * WORDS)
    monkeypatch.setattr(module, "BLOCK_LOGITS", rows_a_block * WORDS)


def head_with(weight: torch.Tensor, keys: dict[str, Any]) -> Head:
    """A head with a scale, a cap, or (`bias`) a bias."""
    bias = torch.linspace(-1, 1, WORDS, dtype=torch.float64) if "bias" in keys else None
    return Head(weight, bias, **{key: value for key, value in keys.items() if key != "bias"})


@pytest.mark.parametrize("rows_a_chunk", [1, 7, 1000])
@pytest.mark.parametrize("rows_a_block", [1, 3, 1000])
@pytest.mark.parametrize("keys", [{}, {"scale": 0.25}, {"softcap": 3.0}, {"scale": 2.0, "softcap": 5.0}, {"bias": 1}])
def test_same_as_cross_entropy(
    rows_a_chunk: int, rows_a_block: int, keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss and gradient, however they are cut; several edges may leave one node."""
    in_pieces(monkeypatch, rows_a_chunk, rows_a_block)
    hidden, weight, edges = case()
    head = head_with(weight, keys)
    ours = edge_loss(hidden, head, **edges)
    (gradient,) = torch.autograd.grad(ours * 0.5, [hidden])
    wanted = plain(hidden, head, edges)
    (wanted_gradient,) = torch.autograd.grad(wanted * 0.5, [hidden])
    assert len(edges["parents_E"].unique()) < EDGES
    assert ours.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert float((gradient - wanted_gradient).norm()) <= 1e-5 * float(wanted_gradient.norm())


@pytest.mark.parametrize("rows_a_chunk", [1, 7, 1000])
@pytest.mark.parametrize("rows_a_block", [1, 3, 1000])
@pytest.mark.parametrize("keys", [{}, {"scale": 2.0, "softcap": 5.0}, {"bias": 1}])
def test_each_edge_has_a_loss_and_a_gradient_of_its_own(
    rows_a_chunk: int, rows_a_block: int, keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the losses are made into is no sum: each edge is weighed by what all of them are."""
    in_pieces(monkeypatch, rows_a_chunk, rows_a_block)
    hidden, weight, edges = case()
    head = head_with(weight, keys)
    parents, targets = edges["parents_E"], edges["targets_E"]
    ours = edge_losses(hidden, head, parents_E=parents, targets_E=targets)
    (gradient,) = torch.autograd.grad((ours[::2].sum() * ours[1::2].sum()).sqrt(), [hidden])
    each = [
        plain(
            hidden, head, {"parents_E": parents[n : n + 1], "targets_E": targets[n : n + 1], "weights_E": torch.ones(1)}
        )
        for n in range(EDGES)
    ]
    wanted = torch.stack(each)
    (wanted_gradient,) = torch.autograd.grad((wanted[::2].sum() * wanted[1::2].sum()).sqrt(), [hidden])
    assert ours.tolist() == pytest.approx(wanted.tolist(), rel=1e-6)
    assert float((gradient - wanted_gradient).norm()) <= 1e-5 * float(wanted_gradient.norm())


def test_without_gradient_the_loss_is_the_same() -> None:
    hidden, weight, edges = case()
    with torch.no_grad():
        alone = edge_loss(hidden, Head(weight), **edges)
    assert alone.item() == edge_loss(hidden, Head(weight), **edges).item()


def test_bf16_loss_is_summed_in_fp32() -> None:
    """The logits are bf16, as the head makes them; nothing after them is."""
    hidden, weight, edges = case(dtype=torch.bfloat16)
    logits = (hidden[edges["parents_E"]] @ weight.T).float()
    wanted = (F.cross_entropy(logits, edges["targets_E"], reduction="none") * edges["weights_E"]).sum()
    found = edge_loss(hidden, Head(weight), **edges)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(wanted.item(), rel=1e-6)


def test_head_is_read_off_the_model() -> None:
    """Soft cap and scale from the configuration, trained or not; what is no linear layer is left to the model."""
    from transformers import Gemma2Config, Gemma2ForCausalLM, GraniteConfig, GraniteForCausalLM

    small = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0}
    gemma = Gemma2ForCausalLM(Gemma2Config(**small, **heads, head_dim=4, bos_token_id=1, eos_token_id=2))
    granite = GraniteForCausalLM(GraniteConfig(**small, **heads, logits_scaling=4.0))
    granite.requires_grad_(False)
    capped, scaled = find_head(gemma), find_head(granite)
    assert capped is not None
    assert scaled is not None
    assert (capped.softcap, capped.scale) == (30.0, 1.0)
    assert (scaled.softcap, scaled.scale) == (None, 0.25)
    granite.set_output_embeddings(torch.nn.Sequential(torch.nn.Linear(8, 20)).requires_grad_(False))
    assert find_head(granite) is None


HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "biased": {"bias": True},
    "scaled and capped": {"scale": 2.0, "softcap": 5.0},
    "scaled, capped and biased": {"scale": 0.5, "softcap": 3.0, "bias": True},
}


@pytest.mark.parametrize("rows_a_chunk", [SIZE, 1000])
@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("is_tied", [False, True])
def test_a_trained_head_gets_its_gradient(
    name: str, is_tied: bool, rows_a_chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of weight, bias and hidden states, in one chunk and in several; tied: what made the hidden states is added."""
    monkeypatch.setattr(module, "CHUNK_LOGITS", rows_a_chunk * WORDS)
    keys = dict(HEADS[name])
    _, weight, edges = case()
    bias = torch.linspace(-1, 1, WORDS, dtype=torch.float64).requires_grad_() if keys.pop("bias", False) else None
    ids = torch.arange(NODES) % WORDS
    results = []
    for compute in (lambda hidden, head: edge_loss(hidden, head, **edges), lambda h, head: plain(h, head, edges)):
        weight = weight.detach().requires_grad_()
        start = (weight if is_tied else weight.detach().flip(0).requires_grad_())[ids]
        trained = [weight, *([] if bias is None else [bias]), *([] if is_tied else [start])]
        loss = compute(torch.tanh(start), Head(weight, bias, **keys)) * 0.37
        results.append((loss, torch.autograd.grad(loss, trained)))
    (ours, found), (wanted, gradients) = results
    assert ours.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert len(found) == len(gradients) >= 1
    for one, other in zip(found, gradients, strict=True):
        assert float((one - other).norm()) <= 1e-5 * float(other.norm()), name


def test_a_trained_heads_logits_are_never_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """The chunks of a trained head are as large as its gradient, and no larger."""
    sizes = []
    right = torch.mm

    def mm(a: torch.Tensor, b: torch.Tensor, **keys: Any) -> torch.Tensor:
        if b.shape[-1] == WORDS:
            sizes.append(len(a))
        return right(a, b, **keys)

    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(module, "CHUNK_LOGITS", 1)
    hidden, weight, edges = case()
    edge_loss(hidden, Head(weight.requires_grad_()), **edges).backward()
    assert (max(sizes), sum(sizes)) == (SIZE, len(edges["parents_E"].unique()))
    assert len(sizes) == 2


def test_without_gradient_a_trained_head_gets_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is one computed: an evaluation keeps its small chunks."""
    monkeypatch.setattr(module, "_chunk_rows", lambda _weight, *, is_trained: 1 // (not is_trained))
    hidden, weight, edges = case()
    with torch.no_grad():
        assert not edge_loss(hidden, Head(weight.requires_grad_()), **edges).requires_grad


def test_the_scale_of_a_bf16_gradient_is_not_rounded() -> None:
    """1/3 in bf16 is 1/2.995: all of a gradient would be 0.2 % off alike."""
    hidden, weight, edges = case(dtype=torch.bfloat16)
    weight.requires_grad_()
    for parts in ([hidden], [weight]):
        (whole,) = torch.autograd.grad(edge_loss(hidden, Head(weight), **edges), parts)
        (third,) = torch.autograd.grad(edge_loss(hidden, Head(weight), **edges) / 3, parts)
        ratio = float((third.double() * whole.double()).sum() / (whole.double() ** 2).sum())
        assert ratio == pytest.approx(1 / 3, rel=5e-4)
