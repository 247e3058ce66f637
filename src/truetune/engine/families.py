"""Model families that the engine was run on: tests/equivalence/test_families.py fails if one computes otherwise.

A list to read, not to decide by: what a model gets is decided by the comparison before step 1.
"""

from __future__ import annotations

FAMILIES = {
    "bailing_hybrid": "trie",
    "bamba": "trie",
    "cohere2": "trie",
    "ernie4_5": "trie",
    "falcon_h1": "trie",
    "gemma2": "trie",
    "gemma3_text": "trie",
    "glm4": "trie",
    "gpt_oss": "padded",
    "granite": "trie",
    "granitemoehybrid": "trie",
    "jamba": "padded",
    "kimi_linear": "trie",
    "lfm2": "trie",
    "lfm2_moe": "trie",
    "lfm3": "trie",
    "llama": "trie",
    "mamba2": "trie",
    "minimax": "padded",
    "mistral": "trie",
    "nemotron_h": "trie",
    "olmo2": "trie",
    "olmo_hybrid": "trie",
    "phi3": "trie",
    "qwen2": "trie",
    "qwen3": "trie",
    "qwen3_5": "trie",
    "qwen3_5_moe": "trie",
    "qwen3_5_moe_text": "trie",
    "qwen3_5_text": "trie",
    "qwen3_moe": "trie",
    "qwen3_next": "trie",
    "smollm3": "trie",
    "zamba2": "trie",
}
"""model_type of config.json → how its pairs are computed (see `attention` in docs/config.md)."""
