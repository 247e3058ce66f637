"""`truetune export RUN --to gguf|adapter|ollama|hub`: a model for other programs, proven before it gets its name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from truetune.errors import UserError
from truetune.messages import text

if TYPE_CHECKING:
    from truetune.console import Console
    from truetune.drift import Drift
    from truetune.export.proven import Exported
    from truetune.source import Source

TARGETS = ("gguf", "adapter", "ollama", "hub")


def command(lang: str) -> click.Command:
    """Return the command, described in `lang`."""

    def run(run: str, to: str, quantize: str, output: str | None, repo: str | None, dry_run: bool) -> None:
        from truetune.console import Console
        from truetune.source import find

        console = Console(lang)
        source = find(run)
        if to == "hub":
            _hub(source, repo, console, is_dry=dry_run)
            return
        kind = quantize.upper()
        name = Path(run).name.removesuffix(".gguf")
        default = {"gguf": f"{name}-{kind}.gguf", "adapter": f"{name}-adapter.gguf", "ollama": f"{name}-ollama"}[to]
        path = Path(output or default).expanduser()
        if to == "ollama":
            _ollama(source, path, kind, console)
            return
        with console.status("status.export", name=run):
            done = _file(source, path, kind, is_adapter=to == "adapter")
        _report(done, source, console)

    return click.Command(
        "export",
        callback=run,
        help=text("command.export", lang),
        params=[
            click.Argument(["run"]),
            click.Option(["--to"], required=True, type=click.Choice(TARGETS), help=text("help.export_to", lang)),
            click.Option(["--quantize"], default="F16", metavar="TYPE", help=text("help.export_quantize", lang)),
            click.Option(["--output"], metavar="PATH", help=text("help.export_output", lang)),
            click.Option(["--repo"], metavar="OWNER/NAME", help=text("help.export_repo", lang)),
            click.Option(["--dry-run"], is_flag=True, help=text("help.export_dry_run", lang)),
        ],
    )


def _file(source: Source, path: Path, kind: str, *, is_adapter: bool) -> Exported:
    from truetune.export.adapter import export_adapter
    from truetune.export.proven import export_gguf

    return export_adapter(source, output=path) if is_adapter else export_gguf(source, output=path, kind=kind)


def _report(done: Exported, source: Source, console: Console) -> None:
    """Say what was written, and how far it is from what was trained."""
    console.say("export.done", path=done.path, kind=done.kind, size=done.path.stat().st_size / 1e6)
    if done.trained is not None:
        console.say("merge.quantised", kind=source.base.quantization, **done.trained.facts())
    if done.by_transformers is not None:
        _say_drift("transformers", done.by_transformers, console)
    if done.by_llama is None or done.prompts is None:
        console.say("export.no_llama", style="yellow")
        return
    _say_drift("llama.cpp", done.by_llama, console)
    prompts = done.prompts
    hidden = prompts.num_probes - prompts.num_reachable
    console.say("export.prompts", same=prompts.num_same, reachable=prompts.num_reachable)
    if hidden:
        console.say("export.prompts_hidden", count=hidden)


def _say_drift(reader: str, drift: Drift, console: Console) -> None:
    console.say("export.drift", reader=reader, **drift.facts())


def _ollama(source: Source, folder: Path, kind: str, console: Console) -> None:
    from truetune.export.proven import export_ollama

    with console.status("status.export", name=source.path):
        done, num_proven = export_ollama(source, folder=folder, kind=kind)
    _report(done, source, console)
    console.say("export.ollama", count=num_proven, path=folder / "Modelfile", name=folder.name)


def _hub(source: Source, repo: str | None, console: Console, *, is_dry: bool) -> None:
    from truetune.export.hub import prepare, push

    upload = prepare(source.folder or source.base.folder)
    for name, num_bytes in upload.files:
        console.write(f"{num_bytes:>14,}  {name}")
    console.blank()
    console.write(upload.card)
    if upload.num_prompts:
        console.say("export.hub_prompts", style="yellow", count=upload.num_prompts)
    if is_dry:
        console.say("export.hub_dry")
        return
    if repo is None:
        raise UserError("hub_no_repo", where="--repo", fix="hub_no_repo")
    console.say("export.hub_done", address=push(upload, repo=repo))
