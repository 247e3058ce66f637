"""From one CPU to 8 x 8 GPUs on paper: memory, tokens/s and communication, from formulas and measured constants.

    python -m bench.paper            prints the tables of docs/scale.md

What is measured (on two cores with AMX, bench/results): what a step reaches of the machine's best matrix product, and
the bytes that a token leaves behind in a layer. What is not: that a GPU reaches the same share of its maker's figure.

    operations a token   4 x layer weights (2 forward, 2 backward through the frozen weights) + 4 x head where it learns
    activations          K x 2 bytes x tokens x layers x (widths in and out of the seven projections)
    replicate, a step    2 (n - 1) / n x 4 bytes x LoRA's weights                   one reduction of all gradients
    shard, a forward     2 x (n - 1) / n x 2 bytes x layer weights                  gathered forward, and backward
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from bench.recipe import SHAPES, Shape

SHARE_OF_BEST = {"0.6b": 0.24, "4b": 0.44}
"""Of the machine's best product, measured: bench/results/0.6b.md and 4b.md. Larger shapes are taken as 4b."""

LEARNED_SHARE = 0.41
"""Learned tokens among those computed: huanhuan's, as tries of 32 rows."""

BYTES_KEPT = 1.75
"""K: what a token leaves behind, over the widths of its products in two bytes each. For the measured shapes `fitted`
gives 1.72 and 1.78."""

PROGRAM_BYTES = 1.0e9
"""Python, torch and the kernels' own memory."""

LORA_RANK, BYTES_OF_TRAINED = 16, 16
"""fp32: weight, gradient and AdamW's two moments."""

ROOM = 0.9
"""Of a device's memory that may be used."""


@dataclass(frozen=True)
class Machine:
    """Devices of one kind. `peak`: bf16 operations/s of one. `link`: bytes/s from one to the next, the slowest there.

    Of a GPU both are the maker's figures: dense products without sparsity, one direction of NVLink or InfiniBand.
    """

    name: str
    devices: int
    peak: float
    memory_bytes: float
    link: float = float("inf")


MACHINES = (
    Machine("2 cores with AMX (measured)", 1, 2.61e12, 24e9),
    Machine("RTX 4090", 1, 165e12, 24e9),
    Machine("H100", 1, 989e12, 80e9),
    Machine("8 H100, NVLink", 8, 989e12, 80e9, 450e9),
    Machine("8 x 8 H100, 400 Gbit/s each", 64, 989e12, 80e9, 50e9),
)

MODELS = {
    **{name: SHAPES[name] for name in ("0.6b", "4b")},
    "8b": Shape(4096, 12288, 36, 32),
    "32b": Shape(5120, 25600, 64, 64),
    "72b": Shape(8192, 29568, 80, 64, vocab_size=152064),
}
"""Qwen3's shapes, and Qwen2.5-72B's."""


def weights(shape: Shape) -> int:
    """Return the weights of the base: its layers, and embeddings once."""
    return shape.layer_weights + shape.head_weights


def lora_weights(shape: Shape) -> int:
    """Return LoRA's weights on the seven projections of all layers."""
    return shape.num_hidden_layers * LORA_RANK * sum(outputs + inputs for outputs, inputs in shape.linears())


def operations_per_token(shape: Shape) -> float:
    """Return the operations of forward and backward for one token of a trie."""
    return 4 * (shape.layer_weights + LEARNED_SHARE * shape.head_weights)


def activation_bytes(shape: Shape, tokens: int) -> float:
    """Return the bytes that one forward of so many tokens keeps for its backward."""
    widths = sum(outputs + inputs for outputs, inputs in shape.linears())
    return BYTES_KEPT * 2 * tokens * shape.num_hidden_layers * widths


def fitted(shape: Shape, *, tokens: int, peak_bytes: float) -> float:
    """Return the K that explains a measured peak of memory with a bf16 base."""
    left = peak_bytes - 2 * weights(shape) - PROGRAM_BYTES - BYTES_OF_TRAINED * lora_weights(shape)
    return left / (activation_bytes(shape, tokens) / BYTES_KEPT)


def memory_bytes(shape: Shape, *, tokens: int, ranks: int = 1) -> float:
    """Return what one device needs: with several `ranks`, layers and what is trained are shared out among them."""
    layers = (2 * shape.layer_weights + BYTES_OF_TRAINED * lora_weights(shape)) / ranks
    # One layer stands there whole while it computes, and the next one on its way.
    gathered = 4 * shape.layer_weights / shape.num_hidden_layers if ranks > 1 else 0
    return PROGRAM_BYTES + 2 * shape.head_weights + layers + gathered + activation_bytes(shape, tokens)


def largest_forward(shape: Shape, machine: Machine, *, ranks: int) -> int:
    """Return the most tokens (a power of two) of one forward that fit; 0 if none do."""
    fitting = (
        1 << power
        for power in range(15, 7, -1)
        if memory_bytes(shape, tokens=1 << power, ranks=ranks) <= ROOM * machine.memory_bytes
    )
    return next(fitting, 0)


@dataclass(frozen=True)
class Estimate:
    """`waiting`: communication's time over computing's; where it is less than 1 under `shard`, it can be hidden."""

    strategy: str
    tokens: int
    memory_bytes: float
    tokens_per_s: float
    waiting: float


def estimate(name: str, machine: Machine) -> Estimate | None:
    """Return what a machine does with a model: whole on every device where it fits, else sharded; None if neither."""
    shape, many = MODELS[name], machine.devices
    share = SHARE_OF_BEST.get(name, SHARE_OF_BEST["4b"])
    for strategy, ranks in (("replicate", 1), ("shard", many)):
        tokens = largest_forward(shape, machine, ranks=ranks)
        if not tokens or (strategy == "shard" and many == 1):
            continue
        computing = tokens * operations_per_token(shape) / (share * machine.peak)
        part = (many - 1) / many
        sent = 8 * part * lora_weights(shape) if strategy == "replicate" else 4 * part * shape.layer_weights
        talking = sent / machine.link
        # A reduction comes after the step; layers are gathered while others compute.
        seconds = computing + talking if strategy == "replicate" else max(computing, talking)
        needed = memory_bytes(shape, tokens=tokens, ranks=ranks)
        return Estimate(strategy, tokens, needed, many * tokens / seconds, talking / computing)
    return None


def table() -> str:
    """Return the estimates as a Markdown table."""
    lines = [
        "| machine | model | strategy | tokens of a forward | memory of a device | tokens/s | waiting / computing |",
        "|---|---|---|---|---|---|---|",
    ]
    for machine in MACHINES:
        for name in MODELS:
            found = estimate(name, machine)
            if found is None:
                lines.append(f"| {machine.name} | {name} | does not fit in bf16 | | | | |")
                continue
            lines.append(
                f"| {machine.name} | {name} | {found.strategy if machine.devices > 1 else 'one device'} "
                f"| {found.tokens:,} | {found.memory_bytes / 1e9:.1f} GB | {found.tokens_per_s:,.0f} "
                f"| {f'{found.waiting:.3f}' if machine.devices > 1 else ''} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(table() + "\n")
