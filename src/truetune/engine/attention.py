"""Attention over a trie: every node attends to its ancestors and itself, whatever stands between them in the row.

A segment is the part of a path that no earlier path holds. Its queries are neighbours in the row; its keys are the
whole path down to it, so position j of the path is key j, and causal order is all the mask there is:

    path     0 1 2 | 7 8 9          keys     0 1 2 7 8 9
    shared   ^^^^^ |                query 7  x x x x . .        (with a window of 3:  . x x x . .)
    segment          ^^^^^          query 8  x x x x x .
                                    query 9  x x x x x x

Segments of like length run together as one batched product (a chunk), in plain torch that serves every device. Long
ones take torch's blocked kernel on a CPU (flash.py); elsewhere, and with windows or soft caps, they are cut into blocks
of queries whose probabilities are recomputed in the backward, as FlashAttention does (arXiv:2205.14135). Either way
memory stays linear in length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from typing import Any

import numpy as np
import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface

from truetune.engine.branches import Branches, cut
from truetune.engine.flash import MIN_FLASH_QUERIES, LongSegment, add_gradients, attend
from truetune.records import Trie

SEGMENTS, FLEX = "truetune_segments", "truetune_flex"
"""Names in transformers' registries."""

MIN_QUERIES = 256
# Scores (queries times keys times heads) of one chunk: on a CPU, 2 MB in fp32 stay in a core's cache. A long segment's
# block of MIN_QUERIES queries may take more.
CHUNK_SCORES = {"cpu": 1 << 19}
GPU_CHUNK_SCORES = 1 << 24
KEPT_SCORES = 1
"""Scores of a head, in sizes of its queries, up to which probabilities are kept for the backward."""


class UnsupportedError(Exception):
    """The engine cannot compute this model's layers exactly; the caller falls back to padded rows."""


@dataclass(frozen=True)
class Chunk:
    """Segments that run together, padded to Q queries and L keys. Indices are nodes.

    `query_nodes` (S*Q): where to read queries; padding repeats a segment's last. `written_nodes` (S*Q): where to write
    them; padding goes to a row past the last node. `padding`: its places among the S*Q. `key_nodes` (S*L): padding
    repeats the last key, which lies past every query but it. `last_seen_S1Q1`: the place, among the L, of the last key
    that a query sees: its own.
    """

    num_segments: int
    query_nodes: torch.Tensor
    written_nodes: torch.Tensor
    key_nodes: torch.Tensor
    padding: torch.Tensor
    last_seen_S1Q1: torch.Tensor

    @property
    def num_scores(self) -> int:
        """Scores of one head, padding included."""
        return len(self.query_nodes) * (len(self.key_nodes) // self.num_segments)

    def hidden(self, window: int | None) -> torch.Tensor:
        """Return True [S, 1, Q, L] where a query may not see a key; not kept, since it grows with length squared."""
        key_L = torch.arange(len(self.key_nodes) // self.num_segments, device=self.key_nodes.device)
        is_hidden = key_L > self.last_seen_S1Q1
        return is_hidden if window is None else is_hidden | (key_L <= self.last_seen_S1Q1 - window)


Parts = tuple[list[Chunk], list[LongSegment]]
Path = tuple[np.ndarray, int]


@dataclass(frozen=True)
class Layout:
    """The parts of a trie on a device, for models of `num_heads` heads; made once a forward, used by every layer."""

    trie: Trie
    num_heads: int
    device: torch.device
    _parts: dict[tuple[int | None, bool], Parts] = field(default_factory=dict)
    _block_masks: dict[int | None, BlockMask] = field(default_factory=dict)

    def parts(self, window: int | None, *, has_kernel: bool) -> Parts:
        """Return chunks and long segments for layers of this window (None: the whole path is seen).

        `has_kernel`: whether torch's kernel computes what the layers do.
        """
        if (window, has_kernel) not in self._parts:
            most = CHUNK_SCORES.get(self.device.type, GPU_CHUNK_SCORES) // self.num_heads
            short: list[Path] = []
            long: list[Path] = []
            for path in self.trie.paths:
                (long if has_kernel and _is_long(path, window) else short).append(path)
            chunks = [self._chunk(group) for group in _groups(short, most, window)]
            segments = [
                LongSegment(int(nodes[shared]), int(nodes[-1]) + 1, torch.from_numpy(nodes[:shared]))
                for nodes, shared in long
            ]
            self._parts[window, has_kernel] = chunks, segments
        return self._parts[window, has_kernel]

    def block_mask(self, window: int | None) -> BlockMask:
        """Return the same for FlexAttention: a key is seen if it is an ancestor, and within the window."""
        if window not in self._block_masks:
            arrays = (self.trie.ends_N, self.trie.positions_N)
            ends_N, positions_N = (torch.from_numpy(array).to(self.device) for array in arrays)

            def is_seen(_b: torch.Tensor, _h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
                is_ancestor = (k <= q) & (q < ends_N[k])
                return is_ancestor if window is None else is_ancestor & (positions_N[q] - positions_N[k] < window)

            size = len(self.trie)
            self._block_masks[window] = create_block_mask(is_seen, None, None, size, size, device=str(self.device))
        return self._block_masks[window]

    @cached_property
    def branches(self) -> Branches:
        """The same for layers that carry a state along (hybrid.py)."""
        return cut(self.trie, self.device)

    def _chunk(self, group: list[_Block]) -> Chunk:
        num_queries_S1 = np.array([[block.num_queries] for block in group])
        num_keys_S1 = np.array([[len(block.keys)] for block in group])
        first_S1 = np.array([[block.first_query] for block in group])
        place_SQ = np.arange(num_queries_S1.max())[None].repeat(len(group), 0)
        query_SQ = np.minimum(place_SQ, num_queries_S1 - 1)
        keys_SL = np.stack(
            [np.pad(block.keys, (0, num_keys_S1.max() - len(block.keys)), mode="edge") for block in group]
        )
        # A segment's last query is its last key, so what a query sees goes by its distance from there.
        last_seen_SQ = num_keys_S1 - num_queries_S1 + query_SQ
        padding = (place_SQ != query_SQ).ravel().nonzero()[0]
        query_nodes = (first_S1 + query_SQ).ravel()
        written_nodes = query_nodes.copy()
        written_nodes[padding] = len(self.trie)
        arrays = (query_nodes, written_nodes, keys_SL.ravel(), padding, last_seen_SQ[:, None, :, None])
        return Chunk(len(group), *(torch.from_numpy(array).to(self.device) for array in arrays))


@dataclass(frozen=True)
class _Block:
    """Queries of one segment that run together: the nodes from `first_query` on, and their keys: the last is theirs."""

    first_query: int
    num_queries: int
    keys: np.ndarray


def _is_long(path: Path, window: int | None) -> bool:
    """Return whether a path has so many nodes of its own, all seen, that the blocked kernel is faster."""
    nodes, num_shared = path
    return len(nodes) - num_shared >= MIN_FLASH_QUERIES and (window is None or len(nodes) <= window)


def _groups(paths: Sequence[Path], most_scores: int, window: int | None) -> Iterator[list[_Block]]:
    """Yield blocks of like length together: at most `most_scores` of one head, padding included."""
    group: list[_Block] = []
    longest_keys = 0
    for block in sorted(_blocks(paths, most_scores, window), key=lambda block: (len(block.keys), block.num_queries)):
        longest_keys = len(block.keys)
        num_queries = max([block.num_queries, *(other.num_queries for other in group)])
        if group and (len(group) + 1) * num_queries * longest_keys > most_scores:
            yield group
            group = []
        group.append(block)
    if group:
        yield group


def _blocks(paths: Sequence[Path], most_scores: int, window: int | None) -> Iterator[_Block]:
    """Yield the segments of paths, long ones cut into blocks of queries."""
    for nodes, num_shared in paths:
        start = num_shared
        while start < len(nodes):
            # The largest q with q * (start + q) <= most_scores.
            most = max(int(math.sqrt(start**2 / 4 + most_scores) - start / 2), MIN_QUERIES)
            stop = min(start + most, len(nodes))
            first_key = 0 if window is None else max(start - window + 1, 0)
            yield _Block(int(nodes[start]), stop - start, nodes[first_key:stop])
            start = stop


class _SegmentAttention(torch.autograd.Function):
    """softmax(q k^T * scale) v along the paths. q_NHD; k_NGD and v_NGD, where G divides H; returns out_NHD."""

    @staticmethod
    def forward(ctx: Any, q_NHD: torch.Tensor, k_NGD: torch.Tensor, v_NGD: torch.Tensor, core: _Core) -> torch.Tensor:
        ctx.core = core
        out_NHD = q_NHD.new_empty(len(q_NHD) + 1, q_NHD.shape[1], v_NGD.shape[-1])
        chunks, long_segments = core.parts(q_NHD, v_NGD)
        # Kept only where they take no more than the queries do: on paths of up to some hundred tokens, without a cap.
        num_scores = sum(chunk.num_scores for chunk in chunks)
        is_short = core.softcap is None and num_scores <= q_NHD.shape[-1] * KEPT_SCORES * len(q_NHD)
        ctx.probabilities = []
        for chunk in chunks:
            q, k, v = core.queries(chunk, q_NHD), core.keys(chunk, k_NGD), core.keys(chunk, v_NGD)
            p, _ = core.probabilities(chunk, q, k)
            core.put_queries(chunk, torch.bmm(p, v), into=out_NHD)
            if is_short:
                ctx.probabilities.append(p)
        ctx.log_sums = []
        for segment in long_segments:
            out, log_sum = attend(segment, (q_NHD, k_NGD, v_NGD), scale=core.scale)
            out_NHD[segment.first : segment.stop] = out
            ctx.log_sums.append(log_sum)
        ctx.save_for_backward(q_NHD, k_NGD, v_NGD, out_NHD[:-1] if long_segments else None)
        return out_NHD[:-1]

    @staticmethod
    def backward(ctx: Any, grad_NHD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q_NHD, k_NGD, v_NGD, out_NHD = ctx.saved_tensors
        core = ctx.core
        chunks, long_segments = core.parts(q_NHD, v_NGD)
        grad_q_NHD = q_NHD.new_empty(len(q_NHD) + 1, *q_NHD.shape[1:])
        # A shared key gathers the gradients of all its branches: in fp32, so that none is rounded away.
        grad_k_NGD = torch.zeros(k_NGD.shape, dtype=torch.float32, device=k_NGD.device)
        grad_v_NGD = torch.zeros(v_NGD.shape, dtype=torch.float32, device=v_NGD.device)
        is_kept = bool(ctx.probabilities)
        for number, chunk in enumerate(chunks):
            q, k, v = core.queries(chunk, q_NHD), core.keys(chunk, k_NGD), core.keys(chunk, v_NGD)
            p, slope = (ctx.probabilities[number], None) if is_kept else core.probabilities(chunk, q, k)
            grad_out = core.queries(chunk, grad_NHD, zero_padding=True)
            core.add_keys(chunk, torch.bmm(p.transpose(1, 2), grad_out), into=grad_v_NGD)
            grad_s = torch._softmax_backward_data(torch.bmm(grad_out, v.transpose(1, 2)), p, -1, p.dtype)
            grad_s = grad_s if slope is None else grad_s.mul_(slope)
            core.put_queries(chunk, core.scaled(grad_s, k), into=grad_q_NHD)
            core.add_keys(chunk, core.scaled(grad_s.transpose(1, 2), q), into=grad_k_NGD)
        into = (grad_q_NHD, grad_k_NGD, grad_v_NGD)
        for segment, log_sum in zip(long_segments, ctx.log_sums, strict=True):
            results = (out_NHD, grad_NHD, log_sum)
            add_gradients(segment, (q_NHD, k_NGD, v_NGD), results=results, scale=core.scale, into=into)
        return grad_q_NHD[:-1], grad_k_NGD.to(k_NGD.dtype), grad_v_NGD.to(v_NGD.dtype), None


@dataclass(frozen=True)
class _Core:
    """What one layer's attention needs besides q, k and v. In a chunk the heads that share keys stand together:

    queries [S*G, (H/G)*Q, D]   keys [S*G, L, D]   scores [S*G, (H/G)*Q, L]
    """

    layout: Layout
    window: int | None
    scale: float
    softcap: float | None
    num_groups: int

    def parts(self, q_NHD: torch.Tensor, v_NGD: torch.Tensor) -> Parts:
        """Return what the layer computes: chunks of segments, and long segments."""
        has_kernel = q_NHD.device.type == "cpu" and self.softcap is None and q_NHD.shape[-1] == v_NGD.shape[-1]
        return self.layout.parts(self.window, has_kernel=has_kernel)

    def queries(self, chunk: Chunk, x_NHD: torch.Tensor, *, zero_padding: bool = False) -> torch.Tensor:
        """Return the rows of a chunk's queries."""
        rows = x_NHD.flatten(1).index_select(0, chunk.query_nodes)
        if zero_padding:
            rows.index_fill_(0, chunk.padding, 0)
        split = rows.view(chunk.num_segments, -1, self.num_groups, x_NHD.shape[1] // self.num_groups, x_NHD.shape[-1])
        return split.permute(0, 2, 3, 1, 4).reshape(chunk.num_segments * self.num_groups, -1, x_NHD.shape[-1])

    def put_queries(self, chunk: Chunk, x: torch.Tensor, *, into: torch.Tensor) -> None:
        """Write a chunk's rows to the nodes of its queries; `into` has a row more, for padding."""
        num_queries = len(chunk.query_nodes) // chunk.num_segments
        split = x.view(chunk.num_segments, self.num_groups, -1, num_queries, x.shape[-1]).permute(0, 3, 1, 2, 4)
        rows = split.reshape(chunk.num_segments * num_queries, -1)
        into.flatten(1).index_copy_(0, chunk.written_nodes, rows)

    def keys(self, chunk: Chunk, x_NGD: torch.Tensor) -> torch.Tensor:
        """Return the rows of a chunk's keys (or values)."""
        rows = x_NGD.flatten(1).index_select(0, chunk.key_nodes)
        split = rows.view(chunk.num_segments, -1, self.num_groups, x_NGD.shape[-1])
        return split.transpose(1, 2).reshape(chunk.num_segments * self.num_groups, -1, x_NGD.shape[-1])

    def add_keys(self, chunk: Chunk, x: torch.Tensor, *, into: torch.Tensor) -> None:
        """Add a chunk's rows to the nodes of its keys."""
        split = x.view(chunk.num_segments, self.num_groups, -1, x.shape[-1]).transpose(1, 2)
        into.flatten(1).index_add_(0, chunk.key_nodes, split.reshape(len(chunk.key_nodes), -1).float())

    def scaled(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return x y * scale, without a pass over memory for the scale."""
        return torch.baddbmm(x.new_empty(()), x, y, beta=0, alpha=self.scale)

    def probabilities(self, chunk: Chunk, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the attention probabilities, and d(capped score)/d(score) where scores are capped."""
        scores = self.scaled(q, k.transpose(1, 2))
        slope = None
        if self.softcap is not None:
            capped = torch.tanh(scores / self.softcap)
            slope = 1 - capped * capped
            scores = capped * self.softcap
        num_queries = len(chunk.query_nodes) // chunk.num_segments
        split = scores.view(chunk.num_segments, -1, num_queries, scores.shape[-1])
        split.masked_fill_(chunk.hidden(self.window), -torch.inf)
        return torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype), slope


# Arguments by which a layer asks for something that the engine does not compute.
UNKNOWN_ARGUMENTS = ("s_aux", "sinks", "position_bias", "head_mask", "cache")


def _attend(
    compute: Callable[..., torch.Tensor],
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **arguments: Any,
) -> tuple[torch.Tensor, None]:
    """Attention function for transformers: query [1, H, N, D], key and value [1, G, N, D]; returns [1, N, H, D].

    `attention_mask` is what `trie_mask` made: the layer's window as a tensor of one number, 0 for none.

    Raises: UnsupportedError if the layer asks for more than causal attention, windows, scales and soft caps.
    """
    layout = arguments.get("trie_layout")
    unknown = [name for name in UNKNOWN_ARGUMENTS if arguments.get(name) is not None]
    unknown += ["dropout"] if arguments.get("dropout") else []
    if unknown or layout is None or attention_mask is None or not getattr(module, "is_causal", True):
        raise UnsupportedError(", ".join(unknown) or type(module).__name__)
    scaling = arguments.get("scaling")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    core = _Core(layout, int(attention_mask) or None, scale, arguments.get("softcap"), key.shape[1])
    return compute(query, key, value, core), None


def _by_segments(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, core: _Core) -> torch.Tensor:
    q_NHD, k_NGD, v_NGD = (x[0].transpose(0, 1) for x in (query, key, value))
    out_NHD: torch.Tensor = _SegmentAttention.apply(q_NHD, k_NGD, v_NGD, core)
    return out_NHD[None]


def _by_flex(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, core: _Core) -> torch.Tensor:
    """The same by FlexAttention (torch 2.13: no backward on a CPU, where only its forward can be compared)."""

    def cap(score: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return core.softcap * torch.tanh(score / core.softcap)

    flex = _compiled_flex() if query.is_cuda else flex_attention
    out: torch.Tensor = flex(
        *(query, key, value),
        score_mod=None if core.softcap is None else cap,
        block_mask=core.layout.block_mask(core.window),
        scale=core.scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.transpose(1, 2)


_segment_attention, _flex_attention = partial(_attend, _by_segments), partial(_attend, _by_flex)


@cache
def _compiled_flex() -> Callable[..., torch.Tensor]:
    compiled: Callable[..., torch.Tensor] = torch.compile(flex_attention)
    return compiled


def trie_mask(*, q_length: int, mask_function: Callable[..., torch.Tensor], **_: Any) -> torch.Tensor:
    """Return the window of a kind of layers as a tensor of one number (0: none), read off the mask it asks for.

    The model's own mask function is evaluated at the last positions of a row of `q_length`: causal order and a sliding
    window can be told by what the last queries see; anything else (chunks, two-way blocks) is unsupported.

    Raises: UnsupportedError for such a mask.
    """
    zero, keys = torch.tensor(0), torch.arange(q_length)
    window = int(torch.as_tensor(mask_function(zero, zero, torch.tensor(q_length - 1), keys)).expand(q_length).sum())
    for position in range(max(q_length - 3, 0), q_length):
        is_seen = torch.as_tensor(mask_function(zero, zero, torch.tensor(position), keys)).expand(q_length)
        if not torch.equal(is_seen, (keys <= position) & (keys > position - window)):
            raise UnsupportedError("mask")
    return torch.tensor(window if window < q_length else 0)


for _name, _function in ((SEGMENTS, _segment_attention), (FLEX, _flex_attention)):
    AttentionInterface.register(_name, _function)
    AttentionMaskInterface.register(_name, trie_mask)


@contextmanager
def attending_by(model: Any, name: str) -> Iterator[None]:
    """Let a transformers model attend along tries inside the block. `name`: SEGMENTS or FLEX."""
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
