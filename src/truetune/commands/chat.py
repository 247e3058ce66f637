"""`truetune chat [RUN|ADAPTER|MODEL]`: talk to what was trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from truetune.messages import text

if TYPE_CHECKING:
    from truetune.console import Console
    from truetune.records import Message
    from truetune.use import Model


def command(lang: str) -> click.Command:
    """Return the command, described in `lang`."""

    def run(path: str | None, message: str | None, is_base: bool, no_run_system: bool, **sampling: Any) -> None:
        from truetune.console import Console
        from truetune.use import load, newest_run

        console = Console(lang)
        chosen = path or str(newest_run())
        if message is None:
            with console.status("status.load_use", name=chosen):
                model = load(chosen, is_base=is_base, use_run_system=not no_run_system)
            _introduce(model, console)
            _converse(model, console, sampling)
        else:
            model = load(chosen, is_base=is_base, use_run_system=not no_run_system)
            _introduce(model, console, is_brief=True)
            _answer(model, [{"role": "user", "content": message}], console, sampling)

    return click.Command(
        "chat",
        callback=run,
        help=text("command.chat", lang),
        params=[
            click.Argument(["path"], required=False),
            click.Option(["-m", "--message", "message"], metavar="TEXT", help=text("help.message", lang)),
            click.Option(["--base", "is_base"], is_flag=True, help=text("help.base", lang)),
            click.Option(["--no-run-system"], is_flag=True, help=text("help.no_run_system", lang)),
            click.Option(
                ["--max-new-tokens"], type=click.IntRange(min=1), default=512, help=text("help.max_new_tokens", lang)
            ),
            click.Option(
                ["--temperature"], type=click.FloatRange(0, 2), default=0.0, help=text("help.temperature", lang)
            ),
        ],
    )


def _introduce(model: Model, console: Console, *, is_brief: bool = False) -> None:
    """Say what answers, with which system prompt, and whether its prompts are those of training."""
    console.note("chat.model", name=model.name)
    if model.renderer.system:
        console.note("chat.system", system=model.renderer.system)
    if model.num_probes is None:
        console.note("chat.no_probes")
    elif not is_brief:
        console.note("chat.probes", count=model.num_probes)
    if not is_brief:
        console.note("chat.how")


def _converse(model: Model, console: Console, sampling: dict[str, Any]) -> None:
    """Take turns until /exit, Ctrl-D or Ctrl-C at the prompt; Ctrl-C while an answer runs ends that answer."""
    messages: list[Message] = []
    while True:
        try:
            question = input("\n> ").strip()
        except (EOFError, KeyboardInterrupt):
            console.blank()
            return
        if question == "/exit":
            return
        if question == "/new":
            messages = []
        elif question:
            messages.append({"role": "user", "content": question})
            try:
                messages.append({"role": "assistant", "content": _answer(model, messages, console, sampling)})
            except KeyboardInterrupt:
                messages.pop()
                console.say("chat.stopped", style="dim")


def _answer(model: Model, messages: list[Message], console: Console, sampling: dict[str, Any]) -> str:
    """Print the answer as it comes, and return it."""
    pieces = []
    for piece in model.stream(messages, **sampling):
        console.write(piece, end="")
        pieces.append(piece)
    console.blank()
    return "".join(pieces).strip()
