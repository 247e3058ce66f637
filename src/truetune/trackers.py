"""Experiment trackers by name, through accelerate: SwanLab and TensorBoard."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from truetune.config import Config
from truetune.errors import UserError

TRAIN_KEYS = ("loss", "learning_rate", "grad_norm", "memory_bytes", "cpu_percent", "gpu_percent", "epoch")


def check_installed(names: Sequence[str]) -> None:
    """Raise UserError, with the install command, for a tracker whose package is missing."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError("extra_missing", where=f"report_to: {name}", fix="extra_missing", extra=name)


def start(accelerator: Any, config: Config, *, folder: Path) -> None:
    """Start the trackers that `accelerator` was made with; what they write lies under `folder`.

    Raises: UserError if a tracker refuses its settings or its login.
    """
    scalars = {key: value for key, value in config.model_dump().items() if isinstance(value, str | int | float | bool)}
    name = config.tracker_name or folder.name
    swanlab = {"experiment_name": name, "logdir": str(folder / "swanlab")}
    try:
        accelerator.init_trackers(config.tracker_project, config=scalars, init_kwargs={"swanlab": swanlab})
    except (RuntimeError, ValueError, OSError) as error:
        names = ", ".join(config.report_to)
        raise UserError("tracker_refused", where=f"report_to: {names}", fix="tracker_refused", problem=error) from error


def log(accelerator: Any, event: Mapping[str, Any], *, every: int) -> Exception | None:
    """Hand an event to the trackers: each evaluation, and the steps that `every` divides.

    Returns what a tracker raised: a service that cannot be reached is no reason to lose hours of training.
    """
    if event["kind"] == "eval" or (event["kind"] == "step" and event["step"] % every == 0):
        try:
            accelerator.log(scalars_of(event), step=event["step"])
        except Exception as error:
            return error
    return None


def end(accelerator: Any) -> Exception | None:
    """Close the trackers; return what one of them raised."""
    try:
        accelerator.end_training()
    except Exception as error:
        return error
    return None


def scalars_of(event: Mapping[str, Any]) -> dict[str, float]:
    """Return what trackers get of an event, under the names that Trainer's callbacks use ("train/loss", ...)."""
    if event["kind"] == "eval":
        return {"eval/loss": event["eval_loss"]}
    if event["kind"] != "step":
        return {}
    values = {f"train/{key}": event[key] for key in TRAIN_KEYS if event[key] is not None}
    values["train/rows_per_second"] = event["rows"] / event["seconds"]
    values["train/tokens_per_second"] = event["computed_tokens"] / event["seconds"]
    return values
