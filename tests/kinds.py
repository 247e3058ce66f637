"""The kinds of LoRA: what the tests of kinds go through."""

from __future__ import annotations

from typing import Any

KINDS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "dora and rslora": {"use_dora": True, "use_rslora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa_niter_16": {"init_lora_weights": "pissa_niter_16"},
    "pissa and rslora": {"init_lora_weights": "pissa", "use_rslora": True},
    "olora": {"init_lora_weights": "olora"},
}
"""What add_lora and PEFT's LoraConfig are told."""

STARTED = [name for name, kind in KINDS.items() if "init_lora_weights" in kind]
"""Kinds that start at a part of the base."""
