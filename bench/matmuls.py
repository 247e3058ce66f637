"""A step's own matrix products, timed alone: what is left of a step if everything else took no time.

    python -m bench.matmuls RUN/events.jsonl [0.6b]

For every layer, with weights of its own so that they come from memory as in a step: x W^T and g W of the seven frozen
projections, the six skinny products of each LoRA pair; then the head's two at the learned positions. Attention's own
products are an estimate: one segment a row, all of one length. Results go into buffers that exist already.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from bench.recipe import LORA, SHAPES, Shape
from truetune.engine.attention import CHUNK_SCORES
from truetune.engine.loss import CHUNK_LOGITS

REPEATS = 3
PEAK_SIZE = 4096


@dataclass(frozen=True)
class Work:
    """Sizes of one step: tokens that run through the layers, in how many forwards; learned tokens; rows and prefix."""

    tokens: int
    learned: int
    rows: int
    forwards: int = 1
    prefix: int = 20

    @classmethod
    def of_event(cls, event: dict[str, Any], run: Path) -> Work:
        """Return the sizes of a step of a run: the event has the tokens, config.yaml the size of a forward."""
        most = int(yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["max_tokens_per_forward"])
        tokens = event["computed_tokens"]
        return cls(tokens, event["learned_tokens"], event["rows"], forwards=-(-tokens // most))


def useful_operations(shape: Shape, event: dict[str, Any]) -> int:
    """Return the operations that no exact program is spared: two an entry of the weights, in forward and backward.

    The layers for every unique token that is read (the last of a pair is only predicted), the head for every learned
    one; LoRA and attention are left out, which makes the share of the peak a little low.
    """
    nodes = event["trie_tokens"] - event["pairs"]
    return 4 * (shape.layer_weights * nodes + shape.head_weights * event["learned_tokens"])


class Products:
    """Weights and LoRA pairs of all layers, and the head, ready to be multiplied."""

    def __init__(self, shape: Shape, dtype: str) -> None:
        self.shape, self.dtype = shape, getattr(torch, dtype)
        sizes, rank = shape.linears(), LORA["r"]
        self.layers = [
            [(self._new(out, width), self._new(rank, width), self._new(out, rank)) for out, width in sizes]
            for _ in range(shape.num_hidden_layers)
        ]
        self.head_VD = self._new(shape.vocab_size, shape.hidden_size)

    def _new(self, *sizes: int) -> torch.Tensor:
        # Any numbers will do but zeros and denormals: one is as fast to multiply as the other.
        return torch.full(sizes, 0.02, dtype=self.dtype)

    def seconds(self, work: Work) -> float:
        """Return the least time of all products of one step: a disturbance here would flatter the step."""
        tokens = -(-work.tokens // work.forwards)
        widths = {width for size in self.shape.linears() for width in size}
        inputs, outputs = ({width: self._new(tokens, width) for width in widths} for _ in range(2))

        def once() -> None:
            for _ in range(work.forwards):
                for layer in self.layers:
                    self._forward(layer, inputs, outputs)
                for layer in reversed(self.layers):
                    self._backward(layer, inputs, outputs)

        parts = [once, self._head(work.learned), self._attention(work)]
        return min(sum(_time(part) for part in parts) for _ in range(REPEATS))

    def _forward(self, layer: Any, inputs: dict[int, torch.Tensor], outputs: dict[int, torch.Tensor]) -> None:
        for weight, a, b in layer:
            x, out = inputs[weight.shape[1]], outputs[weight.shape[0]]
            torch.mm(x, weight.T, out=out)
            out.addmm_(x @ a.T, b.T)

    def _backward(self, layer: Any, inputs: dict[int, torch.Tensor], outputs: dict[int, torch.Tensor]) -> None:
        for weight, a, b in reversed(layer):
            x, grad, grad_x = inputs[weight.shape[1]], inputs[weight.shape[0]], outputs[weight.shape[1]]
            inner = self._new(len(x), a.shape[0])
            grad_inner = grad @ b
            _ = inner.T @ grad
            _ = grad_inner.T @ x
            torch.mm(grad, weight, out=grad_x)
            grad_x.addmm_(grad_inner, a)

    def _head(self, learned: int) -> Callable[[], None]:
        """Return the head's products, in the chunks in which the engine makes logits."""
        most = max(CHUNK_LOGITS // self.shape.vocab_size, 1)
        chunks = [min(most, learned - start) for start in range(0, learned, most)]
        hidden, logits = self._new(most, self.shape.hidden_size), self._new(most, self.shape.vocab_size)
        grad = torch.empty_like(hidden)

        def once() -> None:
            for rows in chunks:
                torch.mm(hidden[:rows], self.head_VD.T, out=logits[:rows])
                torch.mm(logits[:rows], self.head_VD, out=grad[:rows])

        return once

    def _attention(self, work: Work) -> Callable[[], None]:
        """Return the seven batched products of every layer's attention, forward, recomputation and backward."""
        heads, groups, size = self.shape.num_attention_heads, self.shape.num_key_value_heads, self.shape.head_dim
        queries = max(work.tokens // work.rows, 1)
        keys = queries + work.prefix
        segments = max(CHUNK_SCORES["cpu"] // heads // (queries * keys), 1)
        chunks = -(-work.rows // segments) * self.shape.num_hidden_layers
        q = self._new(segments * groups, heads // groups * queries, size)
        k = self._new(segments * groups, keys, size)
        p = self._new(segments * groups, heads // groups * queries, keys)

        def once() -> None:
            for _ in range(chunks):
                for _ in range(3):
                    torch.bmm(q, k.transpose(1, 2))  # scores; scores again; gradient of the probabilities
                for _ in range(2):
                    torch.bmm(p, k)  # output; gradient of the queries
                    torch.bmm(p.transpose(1, 2), q)  # gradients of values and of keys

        return once


def _time(part: Callable[[], None]) -> float:
    began = time.perf_counter()
    part()
    return time.perf_counter() - began


def peak_rate(dtype: str) -> float:
    """Return the operations a second of the machine's best product: square, 4,096 wide, the best of ten."""
    a = torch.full((PEAK_SIZE, PEAK_SIZE), 0.02, dtype=getattr(torch, dtype))
    b, out = a.clone(), torch.empty_like(a)
    return 2 * PEAK_SIZE**3 / min(_time(lambda: torch.mm(a, b, out=out)) for _ in range(10))


def main() -> None:
    """Print one line for each step of a run."""
    path, name = Path(sys.argv[1]), (sys.argv[2:] or ["0.6b"])[0]
    dtype = yaml.safe_load((path.parent / "config.yaml").read_text(encoding="utf-8"))["dtype"]
    products, peak = Products(SHAPES[name], dtype), peak_rate(dtype)
    for event in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        if event["kind"] != "step":
            continue
        alone, whole = products.seconds(Work.of_event(event, path.parent)), event["seconds"]
        share = useful_operations(SHAPES[name], event) / whole / peak
        sys.stdout.write(
            f"step {event['step']}: {whole:.2f} s, products alone {alone:.2f} s, ratio {whole / alone:.2f}; "
            f"{share:.0%} of {peak / 1e12:.2f} TFLOP/s\n"
        )


if __name__ == "__main__":
    with torch.no_grad():
        main()
