"""Long segments by torch's blocked kernel against a softmax over all keys; whole tries are in test_attention.py."""

from __future__ import annotations

import pytest
import torch

from truetune.engine.flash import LongSegment, add_gradients, attend

HEADS, GROUPS, SIZE, NODES = 4, 2, 16, 90


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, segment: LongSegment, scale: float) -> torch.Tensor:
    """The segment's outputs [Q, H, D] with one softmax over the shared path and the segment itself."""
    own = torch.arange(segment.first, segment.stop)
    keys = torch.cat([segment.shared_nodes, own])
    k, v = (x[keys].repeat_interleave(HEADS // GROUPS, dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q[own], k) * scale
    seen = torch.arange(len(keys))[None] <= torch.arange(len(own))[:, None] + len(segment.shared_nodes)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "segment",
    [
        LongSegment(0, 90, torch.zeros(0, dtype=torch.int64)),
        LongSegment(40, 90, torch.arange(40)),
        LongSegment(60, 75, torch.tensor([0, 1, 2, 30, 31])),
        LongSegment(89, 90, torch.arange(5)),
    ],
    ids=["alone", "behind a path", "behind a broken path", "one query"],
)
def test_segment_and_its_gradients(segment: LongSegment, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    shapes = [(NODES, heads, SIZE) for heads in (HEADS, GROUPS, GROUPS)]
    qkv = tuple(torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)
    wanted_qkv = tuple(x.clone().requires_grad_() for x in qkv)
    wanted = plain(*wanted_qkv, segment=segment, scale=0.3)
    out, log_sum = attend(segment, qkv, scale=0.3)
    assert torch.allclose(out, wanted, rtol=1e-5, atol=1e-6)
    assert log_sum.shape == (1, HEADS, segment.stop - segment.first)
    grad = torch.zeros(NODES, HEADS, SIZE, dtype=dtype)
    grad[segment.first : segment.stop] = torch.randn(wanted.shape, generator=generator, dtype=dtype)
    wanted.backward(grad[segment.first : segment.stop])
    whole = torch.zeros(NODES, HEADS, SIZE, dtype=dtype)
    whole[segment.first : segment.stop] = out
    into = tuple(torch.zeros(shape, dtype=torch.float32) for shape in shapes)
    add_gradients(segment, qkv, results=(whole, grad, log_sum), scale=0.3, into=into)
    for found, leaf in zip(into, wanted_qkv, strict=True):
        assert leaf.grad is not None
        assert float((found - leaf.grad).norm()) <= 1e-5 * float(leaf.grad.norm())
