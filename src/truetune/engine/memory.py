"""The memory governor: real steps are measured, then the size of a forward and recomputation are chosen to fit.

On a GPU too large a forward is an error that can be caught; on a CPU it is a kill, so there the choice must prevent it:
two small forwards are measured, and what larger ones need is read off the line through them.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
import torch

from truetune.engine.objective import IMITATION, Objective, train_step
from truetune.engine.step import Engine, Forward, make_forwards
from truetune.errors import UserError
from truetune.ranks import ALONE, Ranks
from truetune.records import Pair, Row

# Tokens of one forward, at most: beyond them nothing gets faster (docs/log.md).
MAX_CPU_TOKENS, MAX_GPU_TOKENS = 2048, 16384
MIN_TOKENS = 64
MEASURED_TOKENS = (256, 512)
PIECE_TOKENS = 64
LARGE_BYTES = 8 << 20
"""Blocks of weights that come and go, which go back to the system as soon as they are freed (see `free_at_once`)."""
MEMORY_SHARE = 0.85
"""Of the free memory that a run may take; the rest is for other programs and for what the line misses."""


@dataclass(frozen=True)
class Limits:
    """What was chosen, and what it will need: bytes of the process (of the GPU) at the peak, seconds a token."""

    max_tokens: int
    is_checkpointed: bool
    peak_bytes: int
    seconds_per_token: float


@dataclass(frozen=True)
class _Line:
    """Peak memory against tokens of a forward, through two measured points."""

    tokens: int
    peak_bytes: int
    bytes_per_token: float
    seconds_per_token: float

    def peak(self, tokens: int) -> int:
        """Return the bytes in use at the peak of a forward and backward of `tokens`."""
        return int(self.peak_bytes + max(tokens - self.tokens, 0) * self.bytes_per_token)

    def tokens_within(self, peak_bytes: int) -> int:
        """Return the tokens that stay below `peak_bytes`."""
        return int(self.tokens + (peak_bytes - self.peak_bytes) / self.bytes_per_token)


def choose_limits(
    engine: Engine,
    rows: Sequence[Row],
    *,
    max_tokens: int | None = None,
    is_checkpointed: bool | None = None,
    ranks: Ranks = ALONE,
    objective: Objective = IMITATION,
) -> tuple[Engine, Limits]:
    """Return the engine with the forward size and recomputation that fit into memory; None leaves them to be chosen.

    All of `ranks` measure at the same time, and the one with the least room decides for all. What is measured is
    imitation: a preference loss keeps as much, and its reference keeps nothing.

    Raises: UserError naming the longest row, and what would fit, if it does not fit even with recomputation.
    """
    longest = max(rows, key=objective.least_tokens)
    longest_tokens = objective.least_tokens(longest)
    used = _used_bytes(engine.device)  # with what the comparison before took and the allocator kept
    ranks.wait()
    num_sharing = 1 if engine.device.type == "cuda" else ranks.place.local_size
    budget = used + int(MEMORY_SHARE * free_bytes(engine.device) / num_sharing) - _optimizer_bytes(engine)
    choices = [False, True] if is_checkpointed is None else [is_checkpointed]
    for choice in choices:
        set_checkpointing(engine, is_on=choice)
        line = _measure(engine, objective.pairs(rows))
        if ranks.least(budget - line.peak(longest_tokens)) >= 0:
            size = max_tokens or _power_of_two(int(ranks.least(line.tokens_within(budget))), engine.device)
            peak = max(line.peak(max(size, longest_tokens)) + _optimizer_bytes(engine), used)
            return replace(engine, max_tokens=size), Limits(size, choice, peak, line.seconds_per_token)
    fits = max(line.tokens_within(budget), 0)
    raise UserError("pair_too_large", where=longest.where, fix="pair_too_large", tokens=longest_tokens, fits=fits)


def set_checkpointing(engine: Engine, *, is_on: bool) -> None:
    """Recompute activations in the backward, or keep them."""
    if is_on:
        engine.transformer.activation_checkpointing_enable()
    elif engine.transformer.is_activation_checkpointing:
        engine.transformer.activation_checkpointing_disable()


def free_bytes(device: torch.device) -> int:
    """Return the free memory of the device; on a CPU, of the control group too, where a container has one."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return min([psutil.virtual_memory().available, *_group_bytes()])


def _group_bytes() -> Iterator[int]:
    """Yield what the process's control group (version 2) leaves free, if it has a limit."""
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and limit.read_text().strip().isdecimal():
        yield int(limit.read_text()) - int(used.read_text())


def _used_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    return int(psutil.Process().memory_info().rss)


def _optimizer_bytes(engine: Engine) -> int:
    """Return what training holds beyond a measured step: AdamW's two fp32 numbers for each trained weight.

    And for weights in bf16, whose masters gather the gradient in fp32, the rest of that.
    """
    trained = [parameter for parameter in engine.model.parameters() if parameter.requires_grad]
    return sum(int(parameter.numel()) * (8 + 4 - parameter.element_size()) for parameter in trained)


def _power_of_two(tokens: int, device: torch.device) -> int:
    most = MAX_GPU_TOKENS if device.type == "cuda" else MAX_CPU_TOKENS
    return 1 << (min(max(tokens, MIN_TOKENS), most).bit_length() - 1)


def _measure(engine: Engine, pairs: Sequence[Pair]) -> _Line:
    """Run forwards and backwards of about MEASURED_TOKENS tokens, and return the line of their peaks."""
    points = []
    for tokens in MEASURED_TOKENS:
        forward = _forward_of(engine, pairs, tokens)
        with peak_of(engine.device) as peak:
            seconds = _run(engine, forward)
        points.append((forward.num_tokens, peak(), seconds))
    (few, few_bytes, _), (many, many_bytes, seconds) = points
    slope = (many_bytes - few_bytes) / (many - few) if many > few else 0.0
    return _Line(many, many_bytes, max(slope, _least_bytes_per_token(engine)), seconds / many)


def _forward_of(engine: Engine, pairs: Sequence[Pair], tokens: int) -> Forward:
    """Return a forward of about `tokens` tokens, or of all there are: pieces of the pairs, half of each one learned.

    Never a whole long pair: it may be the one that does not fit.
    """
    ids = list(islice((token for pair in pairs for token in pair.prompt_ids + pair.answer_ids), tokens))
    pieces = [ids[start : start + PIECE_TOKENS] for start in range(0, len(ids), PIECE_TOKENS)]
    cut = [Pair(tuple(piece[: len(piece) // 2]), tuple(piece[len(piece) // 2 :])) for piece in pieces if len(piece) > 1]
    return make_forwards(replace(engine, max_tokens=1 << 40), cut)[0]


def _run(engine: Engine, forward: Forward) -> float:
    """Run one step of one forward, leave no gradient behind, and return the seconds it took."""
    began = time.perf_counter()
    train_step(engine, [forward], seeds=(0, 0), backward=lambda loss: loss.backward())
    if engine.device.type == "cuda":
        torch.cuda.synchronize(engine.device)
    seconds = time.perf_counter() - began
    engine.model.zero_grad(set_to_none=True)
    return seconds


def _least_bytes_per_token(engine: Engine) -> int:
    """Return what a token needs at the very least: its input to every layer, and its gradient."""
    config = engine.transformer.config.get_text_config()
    size = engine.transformer.get_input_embeddings().weight.element_size()
    return int((config.num_hidden_layers + 8) * config.hidden_size * size)


def _c_library() -> Any:
    return ctypes.CDLL(None) if os.name == "posix" else None


def give_back_freed() -> None:
    """Return freed memory to the system: what an allocator keeps for itself would hide what comes next.

    C libraries name it differently; where it has neither name, growth within the kept memory is not seen.
    """
    library = _c_library()
    if hasattr(library, "malloc_trim"):  # glibc
        library.malloc_trim(0)
    elif hasattr(library, "malloc_zone_pressure_relief"):  # macOS
        library.malloc_zone_pressure_relief(None, 0)


def copy_from_file(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Give weights memory of their own: a single one left in a mapped file keeps all of the file in memory."""
    for parameter in parameters:
        parameter.data = parameter.data.clone()


def free_at_once() -> None:
    """Let glibc give every large block its own mapping, so that freeing it gives the memory back.

    By itself it moves that limit up to the largest block that was freed, 32 MB at most, and lays smaller ones side by
    side; layers that come and go between what stays then leave holes, 0.3 GB more a step (docs/log.md).
    """
    library = _c_library()
    if hasattr(library, "mallopt"):
        library.mallopt(-3, LARGE_BYTES)  # M_MMAP_THRESHOLD


@contextmanager
def peak_of(device: torch.device) -> Iterator[Callable[[], int]]:
    """Give a function that returns, after the block, the most bytes that were in use inside it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield lambda: int(torch.cuda.max_memory_allocated(device))
        return
    give_back_freed()
    peaks, is_over = [_used_bytes(device)], threading.Event()

    def watch() -> None:
        while not is_over.wait(0.002):
            peaks.append(_used_bytes(device))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield lambda: max(peaks)
    finally:
        is_over.set()
        watcher.join()
        peaks.append(_used_bytes(device))
