"""Fine-tune a chat model on your own examples, and prove that it worked.

import truetune
run = truetune.train("examples.json", model="Qwen/Qwen3-4B-Instruct-2507")
print(truetune.load(run.path).chat("Who are you?"))
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from truetune.records import Report
    from truetune.rundir import Run
    from truetune.use import Model

__all__ = ["check", "load", "train"]


def train(data: str | Path | list[str], *, model: str | Path, **keys: Any) -> Run:
    """Fine-tune `model` on `data` and return the run. `keys`: as in docs/config.md, e.g. `max_steps=10`.

    Raises: truetune.errors.UserError if the data, the model or a key cannot be used; nothing is written then.
    """
    from truetune import report
    from truetune.config import language, resolve
    from truetune.console import Console
    from truetune.place import read_place
    from truetune.training import train as run_training

    going = {name: keys.pop(name) for name in ("resume", "allow_changed", "skip_bad") if name in keys}
    settings = resolve({"data": _names(data), **_plain({"model": model, **keys})})
    console = Console(language(settings.config.lang), quiet=read_place().rank > 0)
    run = run_training(settings, console, **going)
    report.show(run.path, console)
    return run


def check(data: str | Path | list[str], *, model: str | Path, **keys: Any) -> Report:
    """Return what would be learned from `data`, without loading any weights.

    Raises: truetune.errors.UserError if a file or the model cannot be used at all; refused rows are in the report.
    """
    from truetune.config import language, resolve
    from truetune.console import Console
    from truetune.preflight import preflight

    settings = resolve({"data": _names(data), **_plain({"model": model, **keys})})
    console = Console(language(settings.config.lang), quiet=True)
    return preflight(settings.config, console).prepared.report


def load(path: str | Path) -> Model:
    """Load a run, an adapter folder or a model to talk to: `.chat("Who are you?")`, `.stream(messages)`.

    Raises: truetune.errors.UserError if it does not exist or is not what it was when it was trained.
    """
    from truetune.use import load as load_for_use

    return load_for_use(path)


def _names(data: str | Path | list[str]) -> list[str]:
    return [*map(str, data)] if isinstance(data, list | tuple) else [str(data)]


def _plain(keys: dict[str, Any]) -> dict[str, Any]:
    """Paths become text, as on the command line."""
    return {key: str(value) if isinstance(value, Path) else value for key, value in keys.items()}
