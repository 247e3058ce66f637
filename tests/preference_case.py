"""One small case that TRL and Truetune both compute: a model whose weights are a formula, and rows of token ids.

    python -m bench.preference_values       writes tests/assets/trl_preference.json from it, in TRL's own environment

Needs torch and transformers only, so that it can be imported there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

FIXTURE = Path(__file__).parent / "assets" / "trl_preference.json"
NUM_WORDS, STOP = 40, 1
LORA: dict[str, Any] = {"r": 2, "lora_alpha": 4, "lora_dropout": 0.0, "target_modules": "all-linear"}

# (prompt, chosen, rejected), words without the stop token. Rows 0 and 1 have one prompt; in row 2 the answers begin
# alike, in row 3 one answer begins with the other one.
ROWS = [
    ((5, 6, 7), (10, 11, 12), (13, 14)),
    ((5, 6, 7), (20, 21), (22, 23, 24, 25)),
    ((5, 6, 8, 9), (30, 31, 32), (30, 31, 33, 34)),
    ((15,), (16, 17), (16, 17, 18, 19)),
    ((35, 36, 37, 38, 39), (2,), (3,)),
]
# Where the prompt is one token, nothing of it can be learned: TRL's ORPO, which learns prompts, is then the paper's.
ONE_TOKEN_ROWS = [(prompt[-1:], chosen, rejected) for prompt, chosen, rejected in ROWS]

CASES: list[dict[str, Any]] = [
    {"loss": "dpo", "beta": 0.1, "gamma": 0.0, "rows": "ROWS"},
    {"loss": "dpo", "beta": 0.7, "gamma": 0.0, "rows": "ROWS"},
    {"loss": "ipo", "beta": 0.1, "gamma": 0.0, "rows": "ROWS"},
    {"loss": "orpo", "beta": 0.1, "gamma": 0.0, "rows": "ONE_TOKEN_ROWS"},
    {"loss": "orpo", "beta": 2.0, "gamma": 0.0, "rows": "ONE_TOKEN_ROWS"},
    {"loss": "simpo", "beta": 2.0, "gamma": 1.0, "rows": "ROWS"},
    {"loss": "kto", "beta": 0.1, "gamma": 0.0, "rows": "ROWS"},
    {"loss": "kto", "beta": 0.7, "gamma": 0.0, "rows": "ROWS"},
]


def make_model() -> Any:
    """Return the base model, fp32."""
    config = LlamaConfig(
        vocab_size=NUM_WORDS,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=STOP,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    fill(model, is_filled=lambda _: True)
    return model


def fill(model: Any, *, is_filled: Any) -> None:
    """Give the parameters with such names values that depend on their place and number alone; norms lie about 1."""
    with torch.no_grad():
        for index, (name, weight) in enumerate(sorted(model.named_parameters())):
            if is_filled(name):
                places = torch.arange(weight.numel(), dtype=torch.float64).reshape(weight.shape)
                values = 0.5 * torch.cos(places * (1.7 + 0.01 * index) + index) + (1.0 if weight.dim() == 1 else 0.0)
                weight.copy_(values)


def fill_lora(model: Any) -> None:
    """Give A and B values, too: with B = 0 the policy would be its reference."""
    fill(model, is_filled=lambda name: "lora_" in name)
