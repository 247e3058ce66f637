"""Models of five families with some thousand weights and tokenizers of some hundred words: quick to write and read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

TEXT = [
    "What is 3 plus 3? It is 6. Who are you? I am the keeper of the light, and I keep it burning.",
    "Hello, hello! How many stairs are there? 142 stairs, and a cat on every one of them. 你是谁？我是守塔人。",
    "The lamp flashes every twelve seconds; the boat comes on Tuesday. Ünïcödé, naïve café. 1234567890",
] * 4
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPLIT = QWEN2_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA3 = (
    "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}{{ '<|start_header_id|>' + m.role + "
    "'<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\\n\\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' + "
    "(first if loop.first else '') + m.content | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\\n\\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if m.role == 'user' %}"
    "{{ '[INST] ' + (first if loop.last else '') + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)


def byte_level(template: str, special: list[str], *, split: str | None, **named: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE; `split`: the regex of its pre-tokenizer, None: GPT-2's own."""
    tokenizer = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    first = [] if split is None else [pre_tokenizers.Split(Regex(split), "isolated", False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*first, level]) if first else level
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in special])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **named)


def sentencepiece(template: str, special: list[str], *, prefix_space: bool, **named: str) -> PreTrainedTokenizerFast:
    """A BPE as SentencePiece makes it: ▁ for a space, bytes for what is not in the vocabulary."""
    learned = Tokenizer(models.BPE())
    learned.normalizer = normalizers.Replace(" ", "▁")
    learned.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    learned.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=300))
    model = json.loads(learned.to_str())["model"]
    words = [*special, *(f"<0x{n:02X}>" for n in range(256)), *model["vocab"]]
    vocab = {word: number for number, word in enumerate(dict.fromkeys(words))}
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    replace = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prefix_space else replace
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, unk_token="<unk>", **named)


def _tokenizer(family: str) -> PreTrainedTokenizerFast:
    if family in ("qwen2", "qwen3"):
        return byte_level(
            CHATML, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], split=QWEN2_SPLIT, eos_token="<|im_end|>"
        )
    if family == "llama":
        special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
        names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
        return byte_level(LLAMA3, special, split=LLAMA3_SPLIT, **names)
    if family == "gemma3":
        special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
        return sentencepiece(GEMMA, special, prefix_space=False, bos_token="<bos>", eos_token="<eos>")
    special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
    return sentencepiece(MISTRAL, special, prefix_space=False, bos_token="<s>", eos_token="</s>")


CONFIGS = {
    "llama": ("LlamaConfig", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8}),
    "mistral": ("MistralConfig", {"sliding_window": None}),
}
FAMILIES = tuple(CONFIGS)
STOPS = {"gemma3": ["<eos>", "<end_of_turn>"]}


def small_model(folder: Path, family: str = "qwen3", *, is_tied: bool = True, **changes: Any) -> Path:
    """Write a random model of a family, 3 layers of size 64, with its tokenizer, template and stop tokens."""
    tokenizer = _tokenizer(family)
    name, own = CONFIGS[family]
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    stops = tokenizer.convert_tokens_to_ids(STOPS.get(family, [tokenizer.eos_token]))
    config = getattr(transformers, name)(
        vocab_size=len(tokenizer),
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=is_tied,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=stops if len(stops) > 1 else stops[0],
        pad_token_id=None,
        **{**sizes, **own, **changes},
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            # Norms and biases that are not what a forgotten one would be, and logits that differ.
            parameter += (0.1 if parameter.ndim == 1 else 0.05) * torch.randn_like(parameter)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def small_run(folder: Path, family: str, *, num_steps: int) -> Path:
    """Train a run with a system prompt and held-out rows on a small base beside it, and return its folder."""
    from truetune.cli import run

    small_model(folder / "base", family)
    rows = [{"instruction": f"What is {n} plus {n}?", "output": f"It is {2 * n}."} for n in range(24)]
    (folder / "data.json").write_text(json.dumps(rows), encoding="utf-8")
    keys = ["--max-steps", str(num_steps), "--learning-rate", "1e-2", "--system", "Count.", "--dtype", "float32"]
    words = ["train", str(folder / "data.json"), "--model", str(folder / "base"), *keys]
    assert run([*words, "--output-dir", str(folder / "run")]) == 0
    return folder / "run"
