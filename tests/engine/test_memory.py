"""The estimates: they grow with what they should grow with, and decide."""

from __future__ import annotations

from pathlib import Path

import pytest

from truetune.engine import memory
from truetune.model import Base, load_base


def test_checkpointing_follows_the_free_memory(tiny_qwen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Off where the activations fit, on where they do not."""
    model = load_base(Base(str(tiny_qwen), tiny_qwen, ""), "float32")
    needed = memory.estimate_activation_bytes(model, 1024)
    assert memory.estimate_activation_bytes(model, 2048) == 2 * needed

    class Free:
        available = 0

    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: Free)
    for share, expected in ((1.0, True), (3.0, False)):
        Free.available = int(needed * share)
        assert memory.choose_checkpointing(model, 1024) is expected
    assert memory.choose_max_tokens() in (memory.CPU_TOKENS, memory.GPU_TOKENS)
