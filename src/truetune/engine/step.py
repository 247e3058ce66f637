"""Forward and backward of one optimizer step: pairs → forwards → loss → gradient.

A forward is a trie (no token twice) or padded rows of the same pairs; both end in the same loss over edges: the hidden
state at `parent` predicts `target`, which `weight` pairs learn there.

    trie     one row of nodes, each attending to its ancestors (attention.py)

    padded   p0 p1 p2 a0 a1            Causal attention never looks right, so padding needs no mask. Edges (flat):
             p0 p1 a0 a1 a2            2→a0 3→a1 4→stop, 6→a0 7→a1 8→a2 9→stop

The loss is the sum over edges divided by the learned tokens of the whole step, so it does not depend on how the step is
split (transformers#34191 is the bug of dividing per forward).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch.nn import functional as F

from truetune.engine.attention import FLEX, SEGMENTS, Layout, attending_by
from truetune.engine.loss import edge_loss, edge_scores, find_head
from truetune.engine.trie import build_trie, split_pairs
from truetune.records import Pair

Kind = Literal["trie", "flex", "padded", "plain"]
"""How pairs run: tries (by segments or FlexAttention), padded rows, or padded rows through the model's own code."""

ATTENTIONS = {"trie": SEGMENTS, "flex": FLEX}


@dataclass(frozen=True)
class Engine:
    """A model and how pairs run through it.

    `max_tokens`: of one forward, padding included. `scaled_from`: longer pairs share no forward (see `split_pairs`).
    `is_sharded`: the base is spread over ranks, so that a forward runs on all of them or on none.
    """

    model: Any
    kind: Kind
    pad_id: int
    max_tokens: int
    scaled_from: int | None = None
    is_sharded: bool = False

    @property
    def transformer(self) -> Any:
        """The transformers model below PEFT's wrapper."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = next(self.model.parameters()).device
        return device


@dataclass(frozen=True)
class Forward:
    """What runs through the model at once. `parents_E`: flat positions of `input_ids_BT`. `layout`: only for a trie."""

    input_ids_BT: torch.Tensor
    parents_E: torch.Tensor
    targets_E: torch.Tensor
    weights_E: torch.Tensor
    layout: Layout | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens computed, padding included."""
        return int(self.input_ids_BT.numel())

    @property
    def num_positions(self) -> int:
        """Tokens of the longest pair, without the one that is only predicted."""
        if self.layout is None:
            return int(self.input_ids_BT.shape[1])
        return int(self.layout.trie.positions_N.max()) + 1


@dataclass(frozen=True)
class Share:
    """A rank's part of a step.

    `num_learned_tokens`: of all ranks together, which the loss is divided by; None: those of the forwards. `rank` of
    `num_ranks`: every forward of the step, on whichever rank, has a dropout seed of its own.
    """

    num_learned_tokens: int | None = None
    rank: int = 0
    num_ranks: int = 1


WHOLE = Share()


@dataclass(frozen=True)
class StepResult:
    """`loss`: mean over the step's learned tokens, in nats; `num_tokens`: tokens computed, padding included.

    Of a share: what it adds to both; `num_learned_tokens` is the whole step's.
    """

    loss: float
    num_learned_tokens: int
    num_tokens: int


def make_forwards(engine: Engine, pairs: Sequence[Pair]) -> list[Forward]:
    """Return the forwards of a step. No weights are touched, so another thread may call it ahead of time."""
    return [forward for _, forward in grouped(engine, pairs)]


def grouped(engine: Engine, pairs: Sequence[Pair]) -> Iterator[tuple[list[Pair], Forward]]:
    """Yield each forward of `pairs` with the pairs that it holds; padded rows are in their order."""
    split, build = (split_pairs, _trie_forward) if engine.kind in ATTENTIONS else (split_padded, _padded_forward)
    for group in split(pairs, engine.max_tokens, scaled_from=engine.scaled_from):
        yield group, build(engine, group)


def _trie_forward(engine: Engine, pairs: Sequence[Pair]) -> Forward:
    trie = build_trie(pairs)
    heads = engine.transformer.config.get_text_config().num_attention_heads
    parents_E, targets_E, weights_E = (
        torch.from_numpy(x).to(engine.device) for x in (trie.parents_E, trie.targets_E, trie.weights_E)
    )
    ids_BT = torch.from_numpy(trie.token_ids_N)[None].to(engine.device)
    return Forward(ids_BT, parents_E, targets_E, weights_E, Layout(trie, heads, engine.device))


def split_padded(pairs: Sequence[Pair], max_tokens: int, *, scaled_from: int | None = None) -> list[list[Pair]]:
    """Sort pairs by length and split them so that no forward holds more than `max_tokens` with its padding.

    A pair longer than `max_tokens`, or than `scaled_from` (see `split_pairs`), has a forward of its own.
    """
    groups: list[list[Pair]] = []
    for pair in sorted(pairs, key=len):
        is_alone = scaled_from is not None and len(pair) - 1 > scaled_from
        if groups and not is_alone and (len(groups[-1]) + 1) * (len(pair) - 1) <= max_tokens:
            groups[-1].append(pair)
        else:
            groups.append([pair])
    return groups


def _padded_forward(engine: Engine, pairs: Sequence[Pair]) -> Forward:
    num_tokens = max(map(len, pairs)) - 1
    ids_BT = torch.full((len(pairs), num_tokens), engine.pad_id, dtype=torch.long)
    parents, targets = [], []
    for row, pair in enumerate(pairs):
        ids = pair.prompt_ids + pair.answer_ids
        ids_BT[row, : len(pair) - 1] = torch.tensor(ids[:-1])
        first = len(pair.prompt_ids) - 1
        parents.append(torch.arange(first, len(pair) - 1) + row * num_tokens)
        targets.append(torch.tensor(ids[first + 1 :]))
    parents_E, targets_E = torch.cat(parents), torch.cat(targets)
    tensors = (ids_BT, parents_E, targets_E, torch.ones_like(parents_E))
    return Forward(*(tensor.to(engine.device) for tensor in tensors))


def forward_loss(engine: Engine, forward: Forward) -> torch.Tensor:
    """Return the summed cross-entropy (fp32, nats) over the edges of one forward.

    A trie runs only inside `running`.
    """
    head = None if engine.kind == "plain" else find_head(engine.transformer)
    edges = {"parents_E": forward.parents_E, "targets_E": forward.targets_E, "weights_E": forward.weights_E}
    if head is not None:
        return edge_loss(hidden_states(engine, forward), head, **edges)
    losses_E = F.cross_entropy(_logits_by_model(engine, forward).float(), forward.targets_E, reduction="none")
    return (losses_E * forward.weights_E).sum()


@torch.no_grad()  # type: ignore[untyped-decorator]
def forward_scores(engine: Engine, forward: Forward) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the cross-entropy [E] (fp32, nats) at each edge, and whether its target is the likeliest token [E].

    A trie runs only inside `running`.
    """
    head = None if engine.kind == "plain" else find_head(engine.transformer)
    if head is not None:
        return edge_scores(
            hidden_states(engine, forward), head, parents_E=forward.parents_E, targets_E=forward.targets_E
        )
    logits_EV = _logits_by_model(engine, forward).float()
    losses_E = F.cross_entropy(logits_EV, forward.targets_E, reduction="none")
    return losses_E, logits_EV.argmax(-1) == forward.targets_E


def hidden_states(engine: Engine, forward: Forward) -> torch.Tensor:
    """Return the last hidden states [BT, D] of one forward, rows one behind the other."""
    _prepare_scaling(engine, forward)
    hidden_BTD: torch.Tensor = engine.transformer.base_model(**_inputs(forward)).last_hidden_state
    return hidden_BTD.flatten(0, 1)


def _prepare_scaling(engine: Engine, forward: Forward) -> None:
    if engine.scaled_from is not None and forward.num_positions > engine.scaled_from:
        _forget_scaling(engine.transformer)


def _forget_scaling(transformer: Any) -> None:
    """Let a dynamic rotary embedding scale for the next forward alone: by itself it keeps the largest scale it had."""
    for layer in transformer.modules():
        if hasattr(layer, "max_seq_len_cached"):
            layer.max_seq_len_cached = layer.original_max_seq_len


def _inputs(forward: Forward) -> dict[str, Any]:
    inputs: dict[str, Any] = {"input_ids": forward.input_ids_BT, "use_cache": False}
    if forward.layout is not None:
        positions_BT = torch.from_numpy(forward.layout.trie.positions_N)[None].to(forward.input_ids_BT.device)
        # With a mask of ones, transformers does not take a trie for a packed row (masking_utils, position_ids).
        is_token_BT = torch.ones_like(forward.input_ids_BT)
        inputs |= {"position_ids": positions_BT, "attention_mask": is_token_BT, "trie_layout": forward.layout}
    return inputs


def _logits_by_model(engine: Engine, forward: Forward) -> torch.Tensor:
    """Return the logits [E, V] at the edges' parents by the model's own head, from the first learned position on."""
    _prepare_scaling(engine, forward)
    num_tokens = forward.input_ids_BT.shape[1]
    rows_E, columns_E = forward.parents_E // num_tokens, forward.parents_E % num_tokens
    first = int(columns_E.min())
    logits_BKV = engine.model(**_inputs(forward), logits_to_keep=num_tokens - first).logits
    logits_EV: torch.Tensor = logits_BKV[rows_E, columns_E - first]
    return logits_EV


def scaled_from(model: Any) -> int | None:
    """Return the length past which a model scales positions by the longest pair of a forward; None if it never does.

    Source: transformers 5.23, modeling_rope_utils.dynamic_rope_update ("dynamic" and "longrope").
    """
    config = getattr(model, "config", model).get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    lengths = [
        kind.get("original_max_position_embeddings") or config.max_position_embeddings
        for kind in kinds
        if kind.get("rope_type") in ("dynamic", "longrope")
    ]
    return min(lengths, default=None)


@contextmanager
def running(engine: Engine) -> Iterator[None]:
    """Let the engine's model run its kind of forwards inside the block, backward included."""
    with attending_by(engine.transformer, ATTENTIONS[engine.kind]) if engine.kind in ATTENTIONS else nullcontext():
        yield


def train_step(
    engine: Engine,
    forwards: Sequence[Forward],
    *,
    seeds: tuple[int, int],
    backward: Callable[[torch.Tensor], None],
    share: Share = WHOLE,
) -> StepResult:
    """Add the gradient of one optimizer step, or of a rank's share of it, to the parameters.

    `seeds`: (run seed, step), for dropout.

    Raises: ValueError if nothing is learned in the step; the preflight lets no such row through.
    """
    num_learned_tokens = share.num_learned_tokens
    if num_learned_tokens is None:
        num_learned_tokens = sum(int(forward.weights_E.sum()) for forward in forwards)
    if num_learned_tokens == 0:
        raise ValueError(f"step {seeds[1]} holds no learned token")
    loss_sum = 0.0
    with running(engine):
        for number, forward in enumerate(forwards):
            torch.manual_seed(dropout_seed(*seeds, forward=number * share.num_ranks + share.rank))
            loss = forward_loss(engine, forward) / num_learned_tokens
            backward(loss)
            loss_sum += loss.item()
    return StepResult(loss_sum, num_learned_tokens, sum(forward.num_tokens for forward in forwards))


@torch.no_grad()  # type: ignore[untyped-decorator]
def held_out_sum(engine: Engine, forwards: Iterable[Forward]) -> float:
    """Return the summed loss (nats) of `forwards` without dropout; the model's mode is restored."""
    with evaluating(engine.model), running(engine):
        total: float = sum(forward_loss(engine, forward).item() for forward in forwards)
    return total


def held_out_loss(engine: Engine, pairs: Sequence[Pair]) -> float:
    """Return the mean loss (nats a learned token) of `pairs` without dropout."""
    return float(held_out_sum(engine, make_forwards(engine, pairs))) / sum(len(pair.answer_ids) for pair in pairs)


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Switch dropout off inside the block; the model's mode is restored."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def dropout_seed(seed: int, step: int, *, forward: int) -> int:
    """Return the seed of one forward: a function of its place in the run, so that no RNG state is ever saved."""
    return int(np.random.SeedSequence([seed, step, forward]).generate_state(1, np.uint64)[0] >> 1)
