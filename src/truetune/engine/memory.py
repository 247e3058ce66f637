"""How large a forward may be, and whether to recompute activations: estimates, on the safe side."""

from __future__ import annotations

from typing import Any

import psutil
import torch

# On a CPU 1,024 tokens already keep the cores at their matrix-product peak, and short forwards pad less.
CPU_TOKENS, GPU_TOKENS = 1024, 8192
# Share of the free memory that activations may take.
ACTIVATION_SHARE = 0.5


def choose_max_tokens() -> int:
    """Return the tokens of one forward, padding included."""
    return GPU_TOKENS if torch.cuda.is_available() else CPU_TOKENS


def choose_checkpointing(model: Any, num_tokens: int) -> bool:
    """Return True if the activations of a forward of `num_tokens` would take too much of the free memory."""
    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else psutil.virtual_memory().available
    return estimate_activation_bytes(model, num_tokens) > ACTIVATION_SHARE * free


def estimate_activation_bytes(model: Any, num_tokens: int) -> int:
    """Return the bytes kept for the backward: about 16 hidden and 5 intermediate vectors a layer, and fp32 logits."""
    config = model.config.get_text_config()
    per_layer = 16 * config.hidden_size + 5 * getattr(config, "intermediate_size", 4 * config.hidden_size)
    size = next(model.parameters()).element_size()
    return int(num_tokens * (config.num_hidden_layers * per_layer * size + 3 * 4 * config.vocab_size))
