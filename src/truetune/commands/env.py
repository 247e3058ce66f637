"""`truetune env`: versions, devices, and the dtype that would be chosen, with the reason."""

from __future__ import annotations

import click

from truetune.messages import text


def command(lang: str) -> click.Command:
    """Return the command, described in `lang`."""

    def run() -> None:
        import importlib.metadata
        import platform

        import psutil
        import torch

        from truetune.console import Console
        from truetune.model import choose_dtype
        from truetune.output import PACKAGES

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
                ("label.attention", console.text("env.attention")),
            ],
        )

    return click.Command("env", callback=run, help=text("command.env", lang))
