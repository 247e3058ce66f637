"""The same names, prompts and address with vLLM in place of our engine: one command that takes over the process."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from truetune.data.template import Renderer
from truetune.errors import UserError
from truetune.model import Base
from truetune.use import Voice


def find() -> str:
    """Return vLLM's program.

    Raises: UserError with the install command if there is none.
    """
    program = shutil.which("vllm")
    if program is None or importlib.util.find_spec("vllm") is None:
        raise UserError("vllm_missing", where="--engine vllm", fix="vllm_missing")
    return program


def words(program: str, voices: Sequence[Voice], *, base: Path, template: Path, host: str, port: int) -> list[str]:
    """Return the command: the base under its name, each adapter under its own, and our template file."""
    adapters = [voice for voice in voices if voice.folder is not None]
    command = [program, "serve", str(base), "--host", host, "--port", str(port)]
    command += ["--served-model-name", *(voice.name for voice in voices if voice.folder is None)]
    # "vllm": its own defaults, not a repetition penalty of the model's generation_config.json.
    command += ["--chat-template", str(template), "--generation-config", "vllm"]
    if adapters:
        ranks = [
            json.loads((voice.folder / "adapter_config.json").read_text())["r"] for voice in adapters if voice.folder
        ]
        rank = next((size for size in (8, 16, 32, 64, 128, 256, 320, 512) if size >= max(ranks)), max(ranks))
        command += ["--enable-lora", "--max-lora-rank", str(rank)]
        command += ["--lora-modules", *(f"{voice.name}={voice.folder}" for voice in adapters)]
    return command


def refuse_unknown(base: Base, voices: Sequence[Voice]) -> None:
    """Refuse what vLLM would compute otherwise, or not at all: a quantised base, DoRA.

    Raises: UserError with what to do instead.
    """
    if base.quantization is not None:
        raise UserError("vllm_kind", where=base.title, fix="vllm_kind", kind=f"quantization: {base.quantization}")
    for voice in voices:
        path = voice.folder / "adapter_config.json" if voice.folder else None
        if path and json.loads(path.read_text(encoding="utf-8")).get("use_dora"):
            raise UserError("vllm_kind", where=voice.name, fix="vllm_kind", kind="use_dora")


def one_template(voices: Sequence[Voice]) -> str:
    """Return a template that renders as all the voices do: vLLM has one for all of them.

    Raises: UserError if they differ.
    """
    found = {whole_template(voice.renderer): voice.name for voice in voices}
    if len(found) > 1:
        raise UserError("vllm_templates", where="--engine vllm", fix="vllm_templates", names=", ".join(found.values()))
    return next(iter(found))


def whole_template(renderer: Renderer) -> str:
    """Return the template with the run's system prompt and its values for the template in it.

    A request's own system message and values still win over them.
    """
    head = ""
    for name, value in renderer.template_kwargs.items():
        head += f"{{%- if {name} is not defined %}}{{%- set {name} = {_literal(value)} %}}{{%- endif %}}"
    if renderer.system is not None:
        message = f"[{{'role': 'system', 'content': {_literal(renderer.system)}}}]"
        head += "{%- if messages[0]['role'] != 'system' %}"
        head += f"{{%- set messages = {message} + messages %}}{{%- endif %}}"
    return head + renderer.chat_template


def _literal(value: object) -> str:
    """Return a value as Jinja writes it: Python's literals for texts, numbers, truth and lists of them."""
    return repr(value)
