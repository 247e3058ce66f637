"""`truetune env [MODEL]`: versions, devices, and the dtype and attention that would be chosen, with the reason."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from truetune.messages import text

if TYPE_CHECKING:
    from truetune.console import Console


def command(lang: str) -> click.Command:
    """Return the command, described in `lang`."""

    def run(model: str | None) -> None:
        import importlib.metadata
        import platform

        import psutil
        import torch

        from truetune.checkpoint import PACKAGES
        from truetune.console import Console
        from truetune.engine.families import FAMILIES
        from truetune.model import choose_dtype

        console = Console(lang)
        dtype, reason = choose_dtype()
        memory = psutil.virtual_memory()
        has_gpu = torch.cuda.is_available()
        gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())] if has_gpu else []
        console.pairs(
            "env.title",
            [
                ("label.python", f"{platform.python_version()}, {platform.platform()}"),
                ("label.packages", ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)),
                (
                    "label.cpu",
                    console.text(
                        "env.cpu", threads=torch.get_num_threads(), kind=torch.backends.cpu.get_cpu_capability()
                    ),
                ),
                ("label.gpu", ", ".join(gpus) or "-"),
                ("label.memory", console.text("env.memory", total=memory.total / 2**30, free=memory.available / 2**30)),
                ("label.dtype", f"{dtype} ({console.text(f'dtype.{reason}')})"),
                ("label.attention", _attention(model, console)),
                ("label.families", ", ".join(FAMILIES)),
            ],
        )

    argument = click.Argument(["model"], required=False)
    return click.Command("env", params=[argument], callback=run, help=text("command.env", lang))


def _attention(name: str | None, console: Console) -> str:
    """Return how a model's pairs will be computed, as far as its family says: the comparison before step 1 decides."""
    from truetune.engine.families import FAMILIES
    from truetune.model import find_base, model_type, prepare_base

    if name is None:
        return console.text("env.attention")
    base = find_base(name)
    prepare_base(base)
    family = model_type(base.folder)
    if family in FAMILIES:
        return console.text("env.attention_family", kind=FAMILIES[family], family=family)
    return console.text("env.attention_unknown", family=family)
