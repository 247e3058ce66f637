"""The governor: what it measures, what it chooses, and what it refuses."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from truetune.engine import memory
from truetune.engine.memory import Limits, choose_limits
from truetune.engine.step import Engine
from truetune.errors import UserError
from truetune.model import Base, add_lora, load_base
from truetune.records import Pair, Row, pairs_of

GIGABYTE = 10**9


@pytest.fixture
def engine(tiny_qwen: Path) -> Engine:
    """The tiny model with LoRA."""
    base = load_base(Base(str(tiny_qwen), tiny_qwen, ""), "float32")
    model = add_lora(base, r=4, alpha=8, dropout=0.0, targets=["all-linear"], seed=0)
    return Engine(model, "trie", 0, 1 << 40)


@pytest.fixture
def rows() -> list[Row]:
    """Rows of different lengths, the longest of 600 tokens."""
    lengths = [*range(20, 60), 600]
    return [
        Row(n, f"data.json:{n}", (Pair((n, *range(length - 9)), (*range(7), 2)),)) for n, length in enumerate(lengths)
    ]


def fake_lines(monkeypatch: pytest.MonkeyPatch, *, kept: float, recomputed: float, free: int) -> list[bool]:
    """Pretend that tokens need so many bytes each, with and without recomputation; collect what was tried."""
    tried: list[bool] = []

    def measure(engine: Engine, _pairs: Any) -> Any:
        is_on = engine.transformer.is_activation_checkpointing
        tried.append(is_on)
        return memory._Line(512, 0, recomputed if is_on else kept, 0.001)

    monkeypatch.setattr(memory, "_measure", measure)
    monkeypatch.setattr(memory, "_used_bytes", lambda _device: 0)
    monkeypatch.setattr(memory, "free_bytes", lambda _device: free)
    monkeypatch.setattr(memory, "_optimizer_bytes", lambda _engine: 0)
    return tried


def test_real_steps_are_measured(engine: Engine, rows: list[Row]) -> None:
    """Two forwards run and leave nothing behind; the choice is a power of two that the machine can hold."""
    chosen, limits = choose_limits(engine, rows)
    assert chosen.max_tokens == limits.max_tokens == memory.MAX_CPU_TOKENS
    assert not limits.is_checkpointed
    assert limits.seconds_per_token > 0
    assert 0.1 * GIGABYTE < limits.peak_bytes < 8 * GIGABYTE
    assert all(parameter.grad is None for parameter in engine.model.parameters())


def test_forward_size_follows_the_memory(engine: Engine, rows: list[Row], monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest power of two whose peak stays within the share of what is free."""
    for free, expected in ((5 * 10**8, 512), (10**9, 1024), (2 * 10**9, 2048), (9 * 10**9, 2048)):
        fake_lines(monkeypatch, kept=10**6, recomputed=1, free=free)
        assert choose_limits(engine, rows)[1].max_tokens == expected, free


def test_recomputation_only_if_memory_asks_for_it(
    engine: Engine, rows: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The longest pair does not fit as it is, so activations are recomputed; a choice of the user's is kept."""
    tried = fake_lines(monkeypatch, kept=10**8, recomputed=10**6, free=10**9)
    chosen, limits = choose_limits(engine, rows)
    assert tried == [False, True]
    assert (limits.is_checkpointed, chosen.transformer.is_activation_checkpointing) == (True, True)
    tried.clear()
    fake_lines(monkeypatch, kept=1, recomputed=1, free=10**9)
    assert choose_limits(engine, rows, is_checkpointed=True, max_tokens=64)[1] == Limits(64, True, 88, 0.001)


def test_pair_that_does_not_fit_is_named(engine: Engine, rows: list[Row], monkeypatch: pytest.MonkeyPatch) -> None:
    """Row, its tokens, and what would fit."""
    fake_lines(monkeypatch, kept=10**8, recomputed=2 * 10**7, free=10**9)
    with pytest.raises(UserError) as caught:
        choose_limits(engine, rows)
    assert caught.value.where == "data.json:40"
    assert caught.value.values == {"tokens": 600, "fits": 554}


def test_a_long_pair_is_not_run_to_be_measured(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be the one that does not fit: what it needs is read off short forwards, whatever the data."""
    run: list[int] = []

    def note(_engine: Engine, forward: Any) -> float:
        run.append(forward.num_tokens)
        return 1.0

    monkeypatch.setattr(memory, "_run", note)
    short = [Pair((n, *range(63)), (*range(63), 2)) for n in range(4)]
    long = [Pair((n, *range(4000)), (*range(4000), 2)) for n in range(3)]
    for pairs in (short + long, long + short, long, [Pair((1, 2), (*range(9000), 2))]):
        line = memory._measure(engine, pairs)
        assert line.tokens == run[-1]
    assert len(run) == 8
    assert max(run) < 2 * max(memory.MEASURED_TOKENS)
    assert all(many > few for few, many in zip(run[::2], run[1::2], strict=True))


def test_freed_memory_does_not_hide_growth(engine: Engine, rows: list[Row], monkeypatch: pytest.MonkeyPatch) -> None:
    """An earlier forward left the heap large; what a token needs is measured all the same."""
    bytes_per_token = 100_000

    def allocate(_engine: Engine, forward: Any) -> float:
        pieces = [torch.ones(bytes_per_token // 4) for _ in range(forward.num_tokens)]
        time.sleep(0.05)
        return float(len(pieces))

    monkeypatch.setattr(memory, "_run", allocate)
    pieces = [torch.ones(bytes_per_token // 4) for _ in range(3000)]
    last = pieces[-1]  # at the end of the heap, which therefore does not shrink
    del pieces
    line = memory._measure(engine, pairs_of(rows))
    assert line.bytes_per_token == pytest.approx(bytes_per_token, rel=0.1)
    assert len(last)


def test_peak_sees_what_was_freed(engine: Engine) -> None:
    """Memory that was taken and given back inside the block counts."""
    with memory.peak_of(engine.device) as peak:
        before = memory._used_bytes(engine.device)
        tensor = torch.ones(50_000_000)
        time.sleep(0.05)
        del tensor
    assert peak() - before > 150_000_000
