"""Keys of a configuration that contradict each other: each fault is found, none hides another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from truetune.errors import UserError

Origins = Mapping[str, str]
"""Where each key that was given stands; the file that a run writes gives every key."""

PER_DEVICE_KEYS = {"per_device_train_batch_size", "gradient_accumulation_steps"}
LORA_KEYS = (
    *("lora_r", "lora_alpha", "lora_dropout", "target_modules"),
    *("use_rslora", "use_dora", "lora_init", "loraplus_lr_ratio", "quantization"),
)
"""What means something to LoRA alone: refused with full fine-tuning, and not written for it."""

WITH_REFERENCE = ("dpo", "ipo", "kto")
"""Losses that need the base beside what is trained: the same weights with the adapter off."""


def contradictions(config: Any, origins: Origins) -> list[UserError]:
    """Return a fault for each pair of keys of a Config that contradict each other."""
    return [fault for find in FINDERS for fault in find(config, origins)]


def _data(config: Any, origins: Origins) -> Iterator[UserError]:
    """Yield what is given twice of the batch, and of the held-out rows."""
    per_device = {key for key in PER_DEVICE_KEYS if getattr(config, key) is not None}
    if "batch_size" in origins and per_device and config.batch_size != config.rows_per_step:
        names = ", ".join(sorted(per_device))
        yield UserError(
            "config_batch_size_twice", where=origins["batch_size"], fix="config_batch_size_twice", names=names
        )
    if config.eval_data and "eval_split" in origins and config.eval_split > 0:
        yield UserError("config_eval_twice", where=origins["eval_split"], fix="config_eval_twice")


def _full(config: Any, origins: Origins) -> Iterator[UserError]:
    """Yield what full fine-tuning has no use for, and what it cannot do."""
    if config.finetuning != "full":
        return
    for key in LORA_KEYS:
        if key in origins:
            yield UserError("config_not_lora", where=origins[key], fix="config_not_lora", name=key)
    if config.loss in WITH_REFERENCE:
        yield UserError("config_full_reference", where=origins["loss"], fix="config_full_reference", loss=config.loss)


def _start(config: Any, origins: Origins) -> Iterator[UserError]:
    """Yield each key that does not go with a start at a part of the base as it is.

    PEFT has none for DoRA and quantised weights, and none to be dropped.
    """
    for key in ("use_dora", "quantization", "lora_dropout") if config.lora_init != "default" else ():
        if getattr(config, key):
            where = origins.get(key, origins.get("lora_init", key))
            yield UserError("config_lora_init", where=where, fix="config_lora_init", init=config.lora_init, name=key)


def _loss(config: Any, origins: Origins) -> Iterator[UserError]:
    """Yield each key that the loss does not read, or cannot do with."""
    # By value: the file that a run writes gives every key.
    if config.loss == "sft" and config.dpo_beta != type(config).model_fields["dpo_beta"].default:
        yield UserError("config_other_loss", where=origins["dpo_beta"], fix="config_beta", name="dpo_beta")
    if config.loss != "simpo" and config.simpo_gamma is not None:
        yield UserError("config_other_loss", where=origins["simpo_gamma"], fix="config_gamma", name="simpo_gamma")
    if config.loss == "kto" and config.rows_per_step == 1:
        yield UserError("config_kto_batch", where=origins.get("batch_size", "batch_size"), fix="config_kto_batch")


def _shard(config: Any, origins: Origins) -> Iterator[UserError]:
    """Yield what a sharded base cannot do."""
    if config.strategy != "shard":
        return
    for key, plain in (("loss", "sft"), ("quantization", None), ("finetuning", "lora"), ("streaming", False)):
        value = getattr(config, key)
        if value != plain:
            where = origins.get("strategy", origins.get(key, key))
            yield UserError("config_shard", where=where, fix="config_shard", name=key, value=value)


def _stream(config: Any, origins: Origins) -> Iterator[UserError]:
    """Yield each key that means nothing where rows are streamed, or is lacking there."""
    if not config.streaming:
        return
    default = type(config)()
    for name in ("data_weights", "num_train_epochs"):
        if name in origins and getattr(config, name) != getattr(default, name):
            yield UserError("stream_key", where=origins[name], fix="stream_key", name=name)
    if config.max_steps is None:
        yield UserError("stream_max_steps", where=origins["streaming"], fix="stream_max_steps")


FINDERS: tuple[Callable[[Any, Origins], Iterator[UserError]], ...] = (*(_data, _full, _start, _loss, _shard, _stream),)
