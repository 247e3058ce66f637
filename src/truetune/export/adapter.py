"""An adapter alone as a GGUF file: llama.cpp lays it over a GGUF of its base.

PEFT        base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight [r, in]     scale = alpha / r
llama.cpp   blk.0.attn_q.weight.lora_a [r, in]   …lora_b [out, r]                      scale = adapter.lora.alpha / r
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from truetune.disk import clear_killed, staged_file
from truetune.errors import UserError
from truetune.export import gguf
from truetune.export.proven import Exported, check_in_llama, ending, require_free
from truetune.export.vocabulary import vocabulary
from truetune.merge import load_with_reference
from truetune.model import need_gguf
from truetune.source import Source

PREFIX = "base_model.model."
SIDES = {".lora_A.weight": ".lora_a", ".lora_B.weight": ".lora_b"}


def export_adapter(source: Source, *, output: Path) -> Exported:
    """Write the adapter of `source` as GGUF, in fp32; where llama.cpp is installed, proven on its base.

    Raises: UserError if there is no adapter, or it is of a kind that llama.cpp does not have.
    """
    require_free(output)
    need_gguf(str(output))
    folder = source.require_adapter()
    model, reference = load_with_reference(source)
    base = model.get_base_model()
    base_config = base.config.get_text_config()
    gguf.architecture(base_config, where=source.base.name)
    end = ending(source)
    clear_killed(output)
    with staged_file(output) as path:
        write(path, folder, config=base_config)
        whole = model.unload()
        words = vocabulary(source.renderer.tokenizer, whole.get_input_embeddings().weight.shape[0])
        on = path.with_name("base.gguf")
        gguf.write(on, whole, kind="F32", words=words, ending=end, template=source.renderer.chat_template)
        del model, whole
        drift, prompts = check_in_llama(on, source, reference=reference, kind="F32", adapter=path)
        on.unlink()
    return Exported(output, "F32", None, drift, prompts, end, reference.trained)


def write(path: Path, folder: Path, *, config: Any) -> None:
    """Write the adapter in `folder` (PEFT's) to `path`; `config`: of its base.

    Raises: UserError if it is of a kind that llama.cpp does not have.
    """
    import gguf as package

    settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    weights = load_file(folder / "adapter_model.safetensors")
    _refuse_kinds(settings, weights, where=str(folder), is_tied=bool(config.tie_word_embeddings))
    name_of = gguf.names(config)
    writer = package.GGUFWriter(path, gguf.architecture(config, where=str(folder)))
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    # llama.cpp divides by r, rank-stabilised LoRA by its root.
    factor = settings["r"] ** 0.5 if settings.get("use_rslora") else 1.0
    writer.add_float32("adapter.lora.alpha", settings["lora_alpha"] * factor)
    for name, weight in weights.items():
        side = next(side for side in SIDES if name.endswith(side))
        layer = name.removeprefix(PREFIX).removesuffix(side) + ".weight"
        # Rows of B are rows of the layer; A's are those of the rank.
        turned = gguf.turned(weight, layer, config=config) if side == ".lora_B.weight" else weight
        writer.add_tensor(name_of(layer) + SIDES[side], turned.astype("float32"))
    gguf.write_file(writer)


def _refuse_kinds(settings: dict[str, Any], weights: dict[str, Any], *, where: str, is_tied: bool) -> None:
    found = [name for name in ("use_dora", "modules_to_save", "alpha_pattern", "lora_bias") if settings.get(name)]
    found += ["rank_pattern + use_rslora"] if settings.get("rank_pattern") and settings.get("use_rslora") else []
    found += [name for name in weights if not name.endswith(tuple(SIDES))]
    found += [name for name in weights if ".lm_head." in name and is_tied]
    if found:
        raise UserError("gguf_adapter", where=where, fix="gguf_adapter", kind=found[0])
