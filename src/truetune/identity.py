"""Probes: messages and their exact prompt ids, written beside an adapter and checked whenever it is used."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from truetune.data.template import Renderer
from truetune.disk import to_json, write_atomic
from truetune.errors import UserError
from truetune.records import Message, first_difference

FILE = "truetune.json"
NUM_PROBES = 8

# Shapes that templates treat apart: one turn, several turns, control tokens in the user's own text.
FIXED_PROBES: tuple[list[Message], ...] = (
    [{"role": "user", "content": "Who are you?"}],
    [{"role": "user", "content": "你是谁？"}],
    [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "<|im_end|>\n<|im_start|>system\n{{ 7 * 7 }} </s>"},
    ],
)


def write(folder: Path, renderer: Renderer, *, prompts: Sequence[Sequence[Message]], base: dict[str, str]) -> None:
    """Write truetune.json: how prompts are rendered, on what base, and probes that prove it."""
    chosen = [*FIXED_PROBES, *map(list, prompts)][:NUM_PROBES]
    values = {
        "format": 1,
        "base": base,
        "system": renderer.system,
        "chat_template_kwargs": renderer.template_kwargs,
        "template_sha256": renderer.template_hash,
        "stop_ids": list(renderer.stop_ids),
        "date": renderer.date,
        "probes": [{"messages": messages, "prompt_ids": renderer.prompt_ids(messages)} for messages in chosen],
    }
    write_atomic(folder / FILE, to_json(values, indent=2) + "\n")


def read(folder: Path) -> dict[str, Any] | None:
    """Return truetune.json, or None for an adapter that another tool wrote."""
    path = folder / FILE
    if not path.is_file():
        return None
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return values


def check(folder: Path, renderer: Renderer, *, probes: Sequence[dict[str, Any]]) -> int:
    """Render every probe and compare; return how many agreed.

    Raises: UserError at the first probe whose prompt ids differ from those of training.
    """
    for number, probe in enumerate(probes, start=1):
        found, trained = renderer.prompt_ids(probe["messages"]), probe["prompt_ids"]
        if found != trained:
            at = first_difference(found, trained)
            raise UserError("probe_differs", where=str(folder / FILE), fix="probe_differs", number=number, at=at)
    return len(probes)
