"""What runs through the model at once, and its loss: pairs → forwards → loss. objective.py makes steps of them.

A forward is a trie (no token twice) or padded rows of the same pairs; both end in the same loss over edges: the hidden
state at `parent` predicts `target`, which `weight` pairs learn there.

    trie     one row of nodes, each attending to its ancestors (attention.py)

    padded   p0 p1 p2 a0 a1            Causal attention never looks right, so padding needs no mask. Edges (flat):
             p0 p1 a0 a1 a2            2→a0 3→a1 4→stop, 6→a0 7→a1 8→a2 9→stop
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.nn import functional as F

from truetune.engine.answers import Answers
from truetune.engine.attention import FLEX, SEGMENTS, Layout, attending_by
from truetune.engine.loss import edge_loss, edge_losses, edge_scores, find_head
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
    """What runs through the model at once. `parents_E`: flat positions of `input_ids_BT`. `layout`: only for a trie.

    `answers`: only for preference rows.
    """

    input_ids_BT: torch.Tensor
    parents_E: torch.Tensor
    targets_E: torch.Tensor
    weights_E: torch.Tensor
    layout: Layout | None = None
    answers: Answers | None = None

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

    @property
    def least_tokens(self) -> int:
        """Tokens of its largest part that no forward can split: a pair, or a preference row."""
        return self.num_positions if self.answers is None else self.answers.num_row_tokens


def make_forwards(engine: Engine, pairs: Sequence[Pair]) -> list[Forward]:
    """Return the forwards of a step. No weights are touched, so another thread may call it ahead of time."""
    return [forward for _, forward in grouped(engine, pairs)]


def grouped(engine: Engine, pairs: Sequence[Pair]) -> Iterator[tuple[list[Pair], Forward]]:
    """Yield each forward of `pairs` with the pairs that it holds; padded rows are in their order."""
    split = split_pairs if engine.kind in ATTENTIONS else split_padded
    for group in split(pairs, engine.max_tokens, scaled_from=engine.scaled_from):
        yield group, build_forward(engine, group)


def build_forward(engine: Engine, pairs: Sequence[Pair]) -> Forward:
    """Return one forward of `pairs`, however large."""
    return (_trie_forward if engine.kind in ATTENTIONS else _padded_forward)(engine, pairs)


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


def forward_losses(engine: Engine, forward: Forward) -> torch.Tensor:
    """Return the cross-entropy [E] (fp32, nats) at each edge, with its gradient.

    A trie runs only inside `running`.
    """
    head = None if engine.kind == "plain" else find_head(engine.transformer)
    if head is not None:
        hidden_ND = hidden_states(engine, forward)
        return edge_losses(hidden_ND, head, parents_E=forward.parents_E, targets_E=forward.targets_E)
    return F.cross_entropy(_logits_by_model(engine, forward).float(), forward.targets_E, reduction="none")


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


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Switch dropout off inside the block; the mode of each of the model's layers is restored."""
    modes = [(layer, layer.training) for layer in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for layer, was_training in modes:
            layer.training = was_training
