"""An adapter as tensors and settings for the plain base, whatever training started at.

PiSSA and OLoRA start at factors A0, B0 of the base. What they learned is B A - B0 A0, which is LoRA of twice the rank:

    file        lora_A.weight [2r, in] = A over A0        lora_B.weight [out, 2r] = B beside -B0

That is PEFT's own conversion (peft 0.21, LoraModel.subtract_mutated_init). It holds all four to the bit, so that a run
goes on from it, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from truetune.engine.lora import FusedLinear


def to_files(model: Any) -> dict[str, torch.Tensor]:
    """Return the tensors of a model's adapter under PEFT's names."""
    from peft import get_peft_model_state_dict

    found: dict[str, torch.Tensor] = get_peft_model_state_dict(model, save_embedding_layers=False)
    for name, layer in started(model):
        a, b = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
        found |= {
            a: torch.cat([found[a], layer.start_A]),
            b: torch.cat([found[b], -layer.start_B], dim=1),
        }
    return found


def from_files(tensors: Mapping[str, torch.Tensor], model: Any) -> None:
    """Put what `to_files` gave into a model that has LoRA of the same shape."""
    from peft import set_peft_model_state_dict

    own = dict(tensors)
    for name, layer in started(model):
        a, b = own[f"{name}.lora_A.weight"], own[f"{name}.lora_B.weight"]
        r, device = len(layer.start_A), layer.start_A.device
        own |= {f"{name}.lora_A.weight": a[:r], f"{name}.lora_B.weight": b[:, :r]}
        layer.keep_start(a[r:].to(device), -b[:, r:].to(device))
    set_peft_model_state_dict(model, own)


def settings(values: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """Return adapter_config.json for what `to_files` gave: `values` are PEFT's, of the adapter in training."""
    if next(started(model), None) is None:
        return dict(values)
    # The scale stays: alpha / r, or alpha / sqrt(r).
    factor = 2**0.5 if values["use_rslora"] else 2
    return {**values, "r": 2 * values["r"], "lora_alpha": factor * values["lora_alpha"], "init_lora_weights": True}


def started(model: Any) -> Iterator[tuple[str, FusedLinear]]:
    """Yield (name, layer) of each layer whose adapter started at factors of the base."""
    from truetune.engine.lora import FusedLinear

    for name, layer in model.named_modules():
        if isinstance(layer, FusedLinear) and layer.start is not None:
            yield name, layer
