"""Probes: messages and their exact prompt ids, written beside an adapter and checked whenever it is used."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from truetune.data.template import Renderer, Tools
from truetune.disk import to_json, write_atomic
from truetune.errors import UserError
from truetune.records import Conversation, Message, first_difference

FILE = "truetune.json"
FORMAT = 2
"""1 had a fingerprint of samples of the weights, blind between them, and no tools in its probes."""
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

# Templates that know tools write them, and calls and their results, in ways of their own.
TOOLS: tuple[dict[str, Any], ...] = (
    {
        "type": "function",
        "function": {
            "name": "tide",
            "description": "High water at a harbour.",
            "parameters": {"type": "object", "properties": {"harbour": {"type": "string"}}, "required": ["harbour"]},
        },
    },
)


def write(folder: Path, renderer: Renderer, *, prompts: Sequence[Sequence[Message]], base: dict[str, str]) -> None:
    """Write truetune.json: how prompts are rendered, on what base, and probes that prove it."""
    plain: list[dict[str, Any]] = [{"messages": messages} for messages in [*FIXED_PROBES, *map(list, prompts)]]
    special = _special_probes(renderer)
    chosen = [*plain[: NUM_PROBES - len(special)], *special]
    values = {
        "format": FORMAT,
        "base": base,
        "system": renderer.system,
        "chat_template_kwargs": renderer.template_kwargs,
        "template_sha256": renderer.template_hash,
        "stop_ids": list(renderer.stop_ids),
        "date": renderer.date,
        "probes": [probe | {"prompt_ids": prompt_ids(renderer, probe)} for probe in chosen],
    }
    write_atomic(folder / FILE, to_json(values, indent=2) + "\n")


def write_ending(folder: Path, renderer: Renderer) -> None:
    """Let generation_config.json name the tokens that end an answer, so that every tool stops where training did."""
    path = folder / "generation_config.json"
    values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    # With it, transformers would take the stop tokens of config.json instead.
    values.pop("_from_model_config", None)
    write_atomic(path, to_json(values | {"eos_token_id": stop_ids(renderer)}, indent=2) + "\n")


def stop_ids(renderer: Renderer) -> list[int]:
    """Return the ids that end an answer, first the one that ends the answers of training."""
    turns = ({"role": "user", "content": "."}, {"role": "assistant", "content": "."})
    end = renderer.pairs(Conversation("turn", turns))[0].answer_ids[-1]
    return [*dict.fromkeys([end, *renderer.stop_ids])]


def _special_probes(renderer: Renderer) -> list[dict[str, Any]]:
    """Return probes with tools, and with thinking the other way, where the template writes them."""
    messages = FIXED_PROBES[0]
    plain = renderer.prompt_ids(messages)
    is_thinking = renderer.template_kwargs.get("enable_thinking", True)
    probes: list[dict[str, Any]] = [
        {"messages": messages, "tools": list(TOOLS)},
        {"messages": messages, "chat_template_kwargs": {"enable_thinking": not is_thinking}},
    ]
    return [probe for probe in probes if _rendered(renderer, probe) not in (None, plain)]


def _rendered(renderer: Renderer, probe: dict[str, Any]) -> list[int] | None:
    try:
        return prompt_ids(renderer, probe)
    except UserError:
        # The template refuses tools.
        return None


def prompt_ids(renderer: Renderer, probe: dict[str, Any]) -> list[int]:
    """Return the ids of a probe: its messages, with its tools and template arguments where it has some."""
    arguments = renderer.template_kwargs | probe.get("chat_template_kwargs", {})
    if arguments != renderer.template_kwargs:
        renderer = replace(renderer, template_kwargs=arguments)
    tools: Tools = probe.get("tools")
    return renderer.prompt_ids(probe["messages"], tools=tools)


def read(folder: Path) -> dict[str, Any] | None:
    """Return truetune.json, or None for an adapter that another tool wrote.

    Raises: UserError if it is damaged, or of another format.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        number = values["format"]
    except (ValueError, LookupError, TypeError):
        raise UserError("identity_damaged", where=str(path), fix="identity_damaged") from None
    if number != FORMAT:
        raise UserError("identity_format", where=str(path), fix="identity_format", number=number)
    return values


def check_base(folder: Path, known: dict[str, Any], *, name: str, fingerprint: str) -> None:
    """Compare a base with the one that the adapter in `folder` was trained on. `name`: of the base at hand.

    Raises: UserError with both names if it is another one.
    """
    trained = known["base"]
    if trained["fingerprint"] != fingerprint:
        raise UserError("other_base", where=str(folder), fix="other_base", name=name, trained=trained["name"])


def check(folder: Path, renderer: Renderer, *, known: dict[str, Any]) -> int:
    """Render every probe of truetune.json and compare; return how many agreed.

    Raises: UserError at the first probe whose prompt ids differ from those of training, or if they are all the same
        and the template still is another one: the next prompt may differ.
    """
    for number, probe in enumerate(known["probes"], start=1):
        found, trained = prompt_ids(renderer, probe), probe["prompt_ids"]
        if found != trained:
            at = first_difference(found, trained)
            raise UserError("probe_differs", where=str(folder / FILE), fix="probe_differs", number=number, at=at)
    if renderer.template_hash != known["template_sha256"]:
        raise UserError("template_changed", where=str(folder), fix="probe_differs", count=len(known["probes"]))
    return len(known["probes"])
