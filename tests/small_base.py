"""A base of two layers and a few hundred tokens that has learned to answer, so that LoRA can change it in seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

Row = dict[str, str]

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(rows: list[Row]) -> Any:
    """Return a tokenizer of 420 tokens, which are parts of `rows`; bytes are its alphabet, so it reads any text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([text for row in rows for text in row.values()], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", chat_template=TEMPLATE)


def make_model(tokenizer: Any, *, hidden_size: int = 64) -> Any:
    """Return a random Qwen3 of two layers for the tokens of `tokenizer`."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": hidden_size, "intermediate_size": 2 * hidden_size, "head_dim": hidden_size // 4}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tokenizer), eos_token_id=1, **sizes, **layers)).train()


def teach(folder: Path, *, rows: list[Row], words: list[Row], num_steps: int) -> Path:
    """Make a base whose tokens are parts of `words`, and train all its weights on `rows` by plain transformers."""
    from truetune.data.template import build_renderer
    from truetune.records import Conversation

    tokenizer = make_tokenizer(words)
    model = make_model(tokenizer)
    pairs = []
    for row in rows:
        messages = ({"role": "user", "content": row["instruction"]}, {"role": "assistant", "content": row["output"]})
        pairs += build_renderer(tokenizer, [1]).pairs(Conversation("x", messages))
    ids = torch.zeros(len(pairs), max(map(len, pairs)), dtype=torch.long)
    labels = torch.full_like(ids, torch.nn.CrossEntropyLoss().ignore_index)
    for number, pair in enumerate(pairs):
        ids[number, : len(pair)] = torch.tensor(pair.prompt_ids + pair.answer_ids)
        labels[number, len(pair.prompt_ids) : len(pair)] = torch.tensor(pair.answer_ids)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(num_steps):
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
