"""AdamW over what is trained, and the curve of its learning rate."""

from __future__ import annotations

from typing import Any

import torch

from truetune.config import Config
from truetune.console import Console
from truetune.engine.master import Masters


def make_optimizer(
    model: Any, masters: Masters, *, config: Config, num_steps: int
) -> tuple[torch.optim.Optimizer, Any]:
    """Return AdamW over the trained weights, and the learning rate's schedule."""
    # Not above: it imports PEFT, which is to be imported by engine/quiet.py first.
    from transformers import get_scheduler

    masters.gather()
    optimizer = _adamw(model, masters, config)
    optimizer.register_step_post_hook(masters.refresh)
    scheduler = get_scheduler(
        config.lr_scheduler_type,
        optimizer,
        # Rounded down, so that a run of a few steps does not spend one of them at learning rate 0.
        num_warmup_steps=int(config.warmup_ratio * num_steps),
        num_training_steps=num_steps,
    )
    return optimizer, scheduler


def _adamw(model: Any, masters: Masters, config: Config) -> torch.optim.Optimizer:
    """Return AdamW over the trained weights: in one group, or those of B in one of their own (LoRA+)."""
    ratio = config.loraplus_lr_ratio
    if ratio is None:
        is_full = config.finetuning == "full"
        # One pass over all weights instead of ten: of whole models, the step would take as long as the backward.
        return torch.optim.AdamW(
            masters.weights, lr=config.learning_rate, weight_decay=config.weight_decay, fused=is_full or None
        )
    from peft.optimizers import create_loraplus_optimizer

    optimizer: torch.optim.Optimizer = create_loraplus_optimizer(
        model,
        torch.optim.AdamW,
        lr=config.learning_rate,
        loraplus_lr_ratio=ratio,
        loraplus_weight_decay=config.weight_decay,
    )
    # PEFT makes four: A, embeddings, B, what is never decayed.
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
    return optimizer


def show_rates(scheduler: Any, console: Console, *, num_steps: int) -> None:
    """Say how the learning rate goes; with LoRA+, how much more B's is."""
    rates = rates_of(scheduler, num_steps)
    console.say("train.rates", **rates)
    if rates["times"] != 1:
        console.say("train.rates_b", **rates)


def rates_of(scheduler: Any, num_steps: int) -> dict[str, Any]:
    """Return what is shown of the learning rate's curve: at the first step, the highest, at the last step.

    `times`: the highest rate of a group (B's, with LoRA+) over that of the first.
    """
    base, factor = scheduler.base_lrs[0], scheduler.lr_lambdas[0]
    rates = [base * factor(step) for step in range(num_steps)]
    highest = max(rates)
    return {
        "first": rates[0],
        "highest": highest,
        "at": rates.index(highest) + 1,
        "last": rates[-1],
        "times": scheduler.base_lrs[-1] / base,
    }
