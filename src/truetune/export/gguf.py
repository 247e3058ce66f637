"""A model in fp32 → a GGUF file: metadata as llama.cpp reads them, tensors under its names, quantised by `gguf`.

Where llama.cpp computes otherwise than transformers, weights are written as it wants them:

    llama, mistral   rows of q and k: halves of a head interleaved, since its rotation pairs neighbours
    gemma3           norm weights plus one
    llama3's rope    its factors as a tensor, rope_freqs
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from truetune.errors import UserError
from truetune.export.vocabulary import Vocabulary

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3_text": "gemma3"}
"""Family in config.json: llama.cpp's name of what computes it."""

OWN_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0")
"""Types that the `gguf` package can make."""

BLOCK = 32
"""Weights of one block of Q8_0 and Q4_0: rows must be whole blocks."""


@dataclass(frozen=True)
class Ending:
    """The ids that a GGUF file names. `eot`: ends a turn, as trained. `adds_bos`: training's prompts begin with bos."""

    eos: int
    eot: int
    bos: int | None
    unknown: int | None
    pad: int | None
    adds_bos: bool


def architecture(config: Any, *, where: str) -> str:
    """Return llama.cpp's name of the model's family.

    Raises: UserError if it is not one that is written here, or computes something that llama.cpp does not.
    """
    family = str(config.model_type)
    if family not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UserError("gguf_family", where=where, fix="gguf_family", family=family, known=known)
    found = {
        "rope": _rope(config).get("rope_type", "default") not in ("default", "linear", "llama3", "yarn"),
        "query_pre_attn_scalar": family == "gemma3_text" and config.query_pre_attn_scalar != config.head_dim,
        "softcapping": bool(getattr(config, "final_logit_softcapping", None)),
        "sliding_window": family in ("mistral", "qwen2", "qwen3") and _slides(config),
        "mlp_bias": bool(getattr(config, "mlp_bias", False)),
    }
    problems = [name for name, is_there in found.items() if is_there]
    if problems:
        raise UserError("gguf_family", where=where, fix="gguf_family", family=f"{family} ({problems[0]})", known="…")
    return ARCHITECTURES[family]


def _slides(config: Any) -> bool:
    window = getattr(config, "sliding_window", None)
    return bool(window) and getattr(config, "use_sliding_window", True) and window < config.max_position_embeddings


def _rope(config: Any) -> dict[str, Any]:
    """Return the rotation's parameters, of full attention where there are two kinds."""
    every: dict[str, Any] = config.rope_parameters
    values: dict[str, Any] = every.get("full_attention", every)
    return values


def head_size(config: Any) -> int:
    """Return the size of an attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def write(path: Path, model: Any, *, kind: str, words: Vocabulary, ending: Ending, template: str) -> None:
    """Write `model` (fp32) to `path`; `kind` is one of OWN_TYPES."""
    import gguf

    config = model.config.get_text_config()
    writer = gguf.GGUFWriter(path, architecture(config, where=str(path)))
    _add_shape(writer, config)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind}" if kind != "F32" else "ALL_F32"])
    _add_tokenizer(writer, words, ending, template)
    for name, weight in tensors(model):
        data, type_of = _stored(weight, kind, name)
        writer.add_tensor(name, data, raw_dtype=type_of)
    write_file(writer)


def write_file(writer: Any) -> None:
    """Write all that was added, and close the file however that ends."""
    with closing(writer):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()


def _add_shape(writer: Any, config: Any) -> None:
    import gguf

    rope, head = _rope(config), head_size(config)
    writer.add_type("model")
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(head)
    writer.add_key_length(head)
    writer.add_value_length(head)
    if config.model_type == "gemma3_text":
        writer.add_sliding_window(config.sliding_window)
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def _add_tokenizer(writer: Any, words: Vocabulary, ending: Ending, template: str) -> None:
    writer.add_tokenizer_model(words.model)
    writer.add_tokenizer_pre(words.pre)
    writer.add_token_list([word.encode() for word in words.words])
    writer.add_token_types(words.kinds)
    if words.merges:
        writer.add_token_merges(words.merges)
    if words.scores:
        writer.add_token_scores(words.scores)
    writer.add_eos_token_id(ending.eos)
    writer.add_eot_token_id(ending.eot)
    for number, add in (
        (ending.bos, writer.add_bos_token_id),
        (ending.unknown, writer.add_unk_token_id),
        (ending.pad, writer.add_pad_token_id),
    ):
        if number is not None:
            add(number)
    writer.add_add_bos_token(ending.adds_bos)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(words.adds_space)
    writer.add_chat_template(template)


def tensors(model: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (llama.cpp's name, fp32 weight as llama.cpp wants it) of a model; a tied head is left out."""
    config = model.config.get_text_config()
    name_of = names(config)
    if _rope(config).get("rope_type") == "llama3":
        yield "rope_freqs.weight", _llama3_factors(config)
    state = model.state_dict()
    embedding = model.get_input_embeddings().weight
    for name, weight in state.items():
        if name == "lm_head.weight" and weight.data_ptr() == embedding.data_ptr():
            continue
        yield name_of(name), turned(weight.detach().float().numpy(), name, config=config)


def names(config: Any) -> Any:
    """Return the function transformers' name → llama.cpp's.

    Raises (the function): UserError if llama.cpp has no such tensor.
    """
    import gguf

    kind = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == ARCHITECTURES[config.model_type])
    table = gguf.get_tensor_name_map(kind, config.num_hidden_layers)

    def name_of(name: str) -> str:
        found: str | None = table.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise UserError("gguf_tensor", where=name, fix="gguf_family", name=name, family=config.model_type, known="")
        return found

    return name_of


def turned(weight: np.ndarray, name: str, *, config: Any) -> np.ndarray:
    """Return a weight as llama.cpp wants it; `name`: transformers'."""
    if ARCHITECTURES[config.model_type] == "llama":
        for part, num_heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if f".{part}." in name:
                return interleaved(weight, num_heads)
    if config.model_type == "gemma3_text" and name.endswith("norm.weight"):
        return weight + 1
    return weight


def interleaved(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Return the rows of q or k with the halves of each head interleaved.

    head of size 4   x0 x1 y0 y1  →  x0 y0 x1 y1      transformers rotates (x0, y0), llama.cpp neighbours
    """
    rows = weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, *weight.shape[1:])
    return rows.swapaxes(1, 2).reshape(weight.shape)


def _llama3_factors(config: Any) -> np.ndarray:
    """Return by what each frequency of Llama 3's rope is divided (transformers' modeling_rope_utils, inverted)."""
    rope = _rope(config)
    size, factor, old = head_size(config), rope["factor"], rope["original_max_position_embeddings"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    factors = []
    for place in range(0, size, 2):
        wave = 2 * math.pi * rope["rope_theta"] ** (place / size)
        smooth = min(max((old / wave - low) / (high - low), 0.0), 1.0)
        factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


def _stored(weight: np.ndarray, kind: str, name: str) -> tuple[np.ndarray, Any]:
    """Return (bytes, type) of a tensor: vectors in fp32, rows that are no whole blocks in F16, embeddings in 8 bits."""
    import gguf
    from gguf import quants

    chosen = kind
    if weight.ndim < 2:
        chosen = "F32"
    elif kind.startswith("Q") and weight.shape[-1] % BLOCK:
        chosen = "F16"
    elif kind == "Q4_0" and name in ("token_embd.weight", "output.weight"):
        # As llama.cpp's own quantiser keeps them finer than the rest.
        chosen = "Q8_0"
    type_of = gguf.GGMLQuantizationType[chosen]
    return quants.quantize(np.ascontiguousarray(weight), type_of), type_of
