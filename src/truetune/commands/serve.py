"""`truetune serve [RUN|ADAPTER|MODEL ...]`: an OpenAI-compatible server for what was trained."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from truetune.config import hand_down
from truetune.errors import UserError
from truetune.messages import text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from truetune.console import Console
    from truetune.use import Voice

ENGINES = ("transformers", "vllm")


def command(lang: str) -> click.Command:
    """Return the command, described in `lang`."""

    def run(
        paths: tuple[str, ...], host: str, port: int, engine: str, token_file: str | None, no_run_system: bool
    ) -> int:
        from truetune.console import Console
        from truetune.use import newest_run

        chosen = list(paths) or [str(newest_run())]
        if engine == "vllm":
            return _exec_vllm(chosen, host, port, token_file=token_file, use_run_system=not no_run_system)
        return _serve(Console(lang), chosen, host, port, token_file=token_file, use_run_system=not no_run_system)

    return click.Command(
        "serve",
        callback=run,
        help=text("command.serve", lang),
        params=[
            click.Argument(["paths"], nargs=-1, metavar="[RUN|ADAPTER|MODEL]..."),
            click.Option(["--host"], default="127.0.0.1", metavar="ADDRESS", help=text("help.host", lang)),
            click.Option(["--port"], type=click.IntRange(1, 65535), default=8000, help=text("help.port", lang)),
            click.Option(["--engine"], type=click.Choice(ENGINES), default=ENGINES[0], help=text("help.engine", lang)),
            click.Option(["--token-file"], metavar="FILE", help=text("help.token_file", lang)),
            click.Option(["--no-run-system"], is_flag=True, help=text("help.no_run_system", lang)),
        ],
    )


def _serve(
    console: Console, paths: Sequence[str], host: str, port: int, *, token_file: str | None, use_run_system: bool
) -> int:
    _need_packages()
    # oneDNN keeps 1,024 compiled products, 130 KB each; a server meets that many shapes.
    hand_down("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256", is_default=True)
    from truetune.serve.listen import bind
    from truetune.serve.running import make_service, serve
    from truetune.use import find_voices, load_voices

    token = _token(host, token_file)
    with bind(host, port) as bound:
        base, voices = find_voices(paths, use_run_system=use_run_system)
        with console.status("status.load_use", name=base.title):
            model = load_voices(base, voices)

        def log(**values: object) -> None:
            console.note("serve.answered", **values)

        service = make_service(model, voices, lang=console.lang, log=log)
        for voice in voices:
            _introduce(voice, console)
        if base.quantization:
            console.say("use.quantised", kind=base.quantization)
        if token_file:
            console.say("serve.token", path=token_file)
        console.say("serve.context", tokens=service.context)
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
        return serve(service, bound=bound, token=token, on_ready=lambda: console.say("serve.ready", url=url))


def _need_packages() -> None:
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError:
        raise UserError("extra_missing", where="truetune serve", fix="extra_missing", extra="serve") from None


def _token(host: str, token_file: str | None) -> str | None:
    """Return what requests must bear; None on this machine's own address, if none was asked for."""
    from truetune.serve.guard import is_loopback, read_token

    if token_file is not None:
        return read_token(Path(token_file).expanduser())
    if not is_loopback(host):
        raise UserError("serve_no_token", where=f"--host {host}", fix="serve_no_token")
    return None


def _introduce(voice: Voice, console: Console) -> None:
    """Say under which name a model answers, with which system prompt, and whether its prompts are those of training."""
    console.say("serve.model", name=voice.name)
    if voice.renderer.system:
        console.say("serve.system", system=voice.renderer.system)
    if voice.renderer.template_kwargs:
        console.say("serve.arguments", values=voice.renderer.template_kwargs)
    if voice.num_probes is not None:
        console.say("serve.probes", count=voice.num_probes)
    elif voice.adapter is not None:
        console.say("serve.no_probes")


def _exec_vllm(paths: Sequence[str], host: str, port: int, *, token_file: str | None, use_run_system: bool) -> int:
    """Become vLLM, with the same names and prompts."""
    import os

    from truetune.config import cache_dir
    from truetune.serve import vllm
    from truetune.use import find_voices

    program = vllm.find()
    token = _token(host, token_file)
    base, voices = find_voices(paths, use_run_system=use_run_system)
    vllm.refuse_unknown(base, voices)
    template = cache_dir() / "vllm" / f"{voices[0].renderer.template_hash[:16]}-{os.getpid()}.jinja"
    template.parent.mkdir(parents=True, exist_ok=True)
    template.write_text(vllm.one_template(voices), encoding="utf-8")
    if token is not None:
        # Not as an argument, which every user of the machine can read.
        hand_down("VLLM_API_KEY", token)
    words = vllm.words(program, voices, base=base.folder, template=template, host=host, port=port)
    os.execv(program, words)
