"""From settings and preflight to a loop that is ready: model, LoRA, optimizer, scheduler, every "auto" chosen."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from transformers import get_scheduler

from truetune.checkpoint import State
from truetune.config import Config, Settings
from truetune.console import Console
from truetune.engine.memory import choose_checkpointing, choose_max_tokens
from truetune.errors import UserError
from truetune.evaluate import choose_eval_steps, limit_rows, loss_evaluator
from truetune.loop import Loop, Plan
from truetune.model import Base, add_lora, choose_dtype, count_parameters, load_base, pad_id
from truetune.preflight import Preflight
from truetune.records import Row

SAVES_PER_RUN = 20
# Keys that may change between a run and its resumption, since they change nothing that is computed.
FREE_KEYS = (
    *("output_dir", "lang", "logging_steps", "save_steps", "save_total_limit", "hub", "revision"),
    *("report_to", "tracker_project", "tracker_name"),
    # These have hashes of their own in the identity.
    *("model", "data", "eval_data"),
)


@dataclass(frozen=True)
class Assembly:
    """A loop ready to run. `settings`: with every "auto" chosen. `evaluate`: gives the held-out loss."""

    settings: Settings
    accelerator: Accelerator
    loop: Loop
    evaluate: Callable[[], float | None]
    state: State


def assemble(settings: Settings, flight: Preflight, *, folder: Path, console: Console) -> Assembly:
    """Load the model and put the loop together. `folder`: the run's, where trackers may write.

    Raises: UserError if the weights or the LoRA targets do not fit.
    """
    config = settings.config
    project = ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder / "tensorboard"))
    accelerator = Accelerator(log_with=list(config.report_to) or None, project_config=project)
    if accelerator.gradient_accumulation_steps != 1 or accelerator.mixed_precision != "no":
        # Read from the environment that `accelerate launch` sets; backward would divide the gradient by it.
        raise UserError("accelerate_settings", where="ACCELERATE_*", fix="accelerate_settings")
    if accelerator.num_processes > 1:
        raise UserError("several_devices", where="accelerate", fix="several_devices", n=accelerator.num_processes)
    dtype, reason = choose_dtype(config.dtype)
    with console.status("status.load", name=flight.base.title, dtype=dtype, reason=console.text(f"dtype.{reason}")):
        model = accelerator.prepare(_load(flight.base, config, dtype))
    settings, held_out = _choose(settings.with_chosen(dtype=dtype), flight, model)
    config = settings.config
    if config.gradient_checkpointing is True:
        model.activation_checkpointing_enable()
    _show_choices(settings, console, model=model, num_held_out=(len(held_out), len(flight.prepared.held_out)))
    optimizer, scheduler = _optimizer(model, config, num_steps=flight.prepared.report.steps)
    plan = _plan(config, num_steps=flight.prepared.report.steps, filler=pad_id(flight.renderer.tokenizer))
    loop = Loop(model, optimizer, scheduler, plan, accelerator.backward)
    evaluate = loss_evaluator(model, held_out, max_tokens=plan.max_tokens, pad_id=plan.pad_id)
    state = State(model, optimizer, scheduler, identity_of(config, flight), flight.base.reference())
    return Assembly(settings, accelerator, loop, evaluate, state)


def _load(base: Base, config: Config, dtype: str) -> Any:
    return add_lora(
        load_base(base, dtype),
        r=config.lora_r,
        alpha=config.lora_alpha,
        dropout=config.lora_dropout,
        targets=config.target_modules,
        seed=config.seed,
    )


def _optimizer(model: Any, config: Config, *, num_steps: int) -> tuple[torch.optim.Optimizer, Any]:
    """Return AdamW over the trainable parameters, and the learning rate's schedule."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
    scheduler = get_scheduler(
        config.lr_scheduler_type,
        optimizer,
        # Rounded down, so that a run of a few steps does not spend one of them at learning rate 0.
        num_warmup_steps=int(config.warmup_ratio * num_steps),
        num_training_steps=num_steps,
    )
    return optimizer, scheduler


def _plan(config: Config, *, num_steps: int, filler: int) -> Plan:
    """Return the loop's numbers; every "auto" is chosen by now."""
    return Plan(
        num_steps=num_steps,
        batch_size=config.rows_per_step,
        seed=config.seed,
        max_tokens=int(config.max_tokens_per_forward),
        pad_id=filler,
        max_grad_norm=config.max_grad_norm,
        eval_steps=int(config.eval_steps),
        save_steps=int(config.save_steps),
    )


def _choose(settings: Settings, flight: Preflight, model: Any) -> tuple[Settings, list[Row]]:
    """Replace every "auto" by a value, and choose the held-out rows that are evaluated."""
    config, prepared = settings.config, flight.prepared
    steps = prepared.report.steps
    num_trained_rows = min(steps * config.rows_per_step, int(len(prepared.train) * config.num_train_epochs + 1))
    held_out = list(prepared.held_out if config.eval_data else limit_rows(prepared.held_out, num_trained_rows))
    chosen: dict[str, Any] = {}
    if config.max_tokens_per_forward == "auto":
        chosen["max_tokens_per_forward"] = choose_max_tokens()
    if config.gradient_checkpointing == "auto":
        tokens = max(int(chosen.get("max_tokens_per_forward", config.max_tokens_per_forward)), prepared.report.longest)
        chosen["gradient_checkpointing"] = choose_checkpointing(model, tokens)
    if config.eval_steps == "auto":
        chosen["eval_steps"] = choose_eval_steps(steps, num_trained_rows=num_trained_rows, num_rows=len(held_out))
    if config.save_steps == "auto":
        chosen["save_steps"] = max(-(-steps // SAVES_PER_RUN), 1)
    return settings.with_chosen(**chosen), held_out


def _show_choices(settings: Settings, console: Console, *, model: Any, num_held_out: tuple[int, int]) -> None:
    """Print what is trained, and every value that is not the default with its origin."""
    trainable, total = count_parameters(model)
    console.say("train.parameters", trainable=trainable, total=total, share=trainable / total)
    values, defaults = settings.config.model_dump(), Config().model_dump()
    for key, origin in settings.origins.items():
        if values[key] != defaults[key]:
            console.say("train.choice", name=key, value=values[key], origin=origin)
    used, total_held_out = num_held_out
    if used < total_held_out:
        console.say("train.fewer_held_out", used=used, total=total_held_out)


def identity_of(config: Config, flight: Preflight) -> dict[str, str]:
    """Return what a checkpoint belongs to: with another value of any of these, resuming it would be wrong."""
    values = {key: value for key, value in config.model_dump(mode="json").items() if key not in FREE_KEYS}
    return {
        "base": flight.base.fingerprint,
        "data": flight.prepared.data_hash,
        "template": flight.renderer.template_hash,
        "config": hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest(),
    }
