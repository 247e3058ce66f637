"""The kinds of LoRA, in PEFT's words and in those of a run: every test of kinds goes through these tables."""

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

RUNS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": "true"},
    "dora": {"use_dora": "true"},
    "pissa": {"lora_init": "pissa"},
    "olora": {"lora_init": "olora", "use_rslora": "true"},
    "loraplus": {"loraplus_lr_ratio": 8},
    "4bit": {"quantization": "4bit"},
    "8bit": {"quantization": "8bit", "use_dora": "true"},
}
"""Keys of runs."""
