"""Model families that the engine was run on: tests/equivalence/test_families.py fails if one computes otherwise.

A list to read, not to decide by: what a model gets is decided by the comparison before step 1.
"""

from __future__ import annotations

FAMILIES = {
    "cohere2": "trie",
    "ernie4_5": "trie",
    "gemma2": "trie",
    "gemma3_text": "trie",
    "glm4": "trie",
    "gpt_oss": "padded",
    "granite": "trie",
    "llama": "trie",
    "mistral": "trie",
    "olmo2": "trie",
    "phi3": "trie",
    "qwen2": "trie",
    "qwen3": "trie",
    "qwen3_moe": "trie",
    "qwen3_next": "padded",
    "smollm3": "trie",
}
"""model_type of config.json → how its pairs are computed (see `attention` in docs/config.md)."""
