"""The model that a run trains: its base where it fits, with LoRA or all weights trained, whole or spread over ranks."""

from __future__ import annotations

from typing import Any

import psutil
import torch

from truetune.config import Config, Settings
from truetune.console import Console
from truetune.engine.memory import free_bytes
from truetune.engine.quantised import held_bytes
from truetune.engine.shard import make_mesh, shard
from truetune.errors import UserError
from truetune.model import Base, BaseWeights, add_lora, choose_dtype, load_base, train_all
from truetune.preflight import Preflight
from truetune.ranks import ALONE, Ranks
from truetune.weights import needed_bytes, require_memory

CPU = torch.device("cpu")


def load_bare(
    settings: Settings, flight: Preflight, *, console: Console, num_sharing: int = 1, device: torch.device = CPU
) -> tuple[Settings, Any]:
    """Load the base as it is: in fp32 where all of it will be trained. Return it behind the settings with its dtype.

    `num_sharing`: processes whose bases lie side by side in this machine's memory. `device`: where it is to train.

    Raises: MachineError if it does not fit into memory; UserError if the weights do not fit the configuration.
    """
    config, base = settings.config, flight.base
    dtype, reason = choose_dtype(config.dtype)
    is_full = config.finetuning == "full"
    # Whole models are trained where they compute; a base is on the CPU first, and of a known size there.
    free = (free_bytes(device) if is_full else psutil.virtual_memory().available) // num_sharing
    needed = needed_bytes(base.folder, dtype=dtype, quantization=base.quantization, is_full=is_full)
    require_memory(needed, free, name=base.title, dtype=base.quantization or dtype, is_full=is_full)
    with console.status("status.load", name=base.title, dtype=dtype, reason=console.text(f"dtype.{reason}")):
        model = load_base(base, "float32" if is_full else dtype)
    if base.quantization is not None:
        held, plain = held_bytes(model), needed_bytes(base.folder, dtype="bfloat16")
        console.say("train.quantised", kind=base.quantization, held=held / 1e9, plain=plain / 1e9, share=held / plain)
    return settings.with_chosen(dtype=dtype), model


def load_model(
    settings: Settings, flight: Preflight, *, console: Console, ranks: Ranks = ALONE, device: torch.device = CPU
) -> tuple[Settings, Any]:
    """Return the settings with the dtype, and the model to train on this rank: whole, or its part of it.

    Raises: UserError if the LoRA targets do not fit.
    """
    if settings.config.strategy != "shard":
        return _to_train(settings, flight, console=console, num_sharing=ranks.place.local_size, device=device)
    if ranks.size == 1:
        raise UserError("shard_alone", where="strategy", fix="shard_alone")
    mesh = make_mesh(ranks.size)
    with ranks.in_turn():
        # Of a sharded base, a machine holds a whole one at a time.
        settings, model = _to_train(settings, flight, console=console, num_sharing=1, device=device)
        model = shard(model, mesh)
    return settings, model


def _to_train(
    settings: Settings, flight: Preflight, *, console: Console, num_sharing: int, device: torch.device
) -> tuple[Settings, Any]:
    model = flight.bare_model
    if model is None:
        settings, model = load_bare(settings, flight, console=console, num_sharing=num_sharing, device=device)
    return settings, _trained(model, flight.base, settings.config)


def _trained(bare_model: Any, base: Base, config: Config) -> Any:
    """Return a base with LoRA, or with all its weights trained."""
    if config.finetuning == "full":
        # In fp32, whatever computes: these are the optimizer's weights.
        model = train_all(bare_model)
        model.disable_adapter = BaseWeights(model, lambda: load_base(base, config.dtype))
        return model
    return add_lora(
        bare_model,
        r=config.lora_r,
        alpha=config.lora_alpha,
        dropout=config.lora_dropout,
        targets=config.target_modules,
        seed=config.seed,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        init_lora_weights=True if config.lora_init == "default" else config.lora_init,
    )
