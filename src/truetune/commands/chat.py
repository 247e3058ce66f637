"""`truetune chat [RUN|ADAPTER|MODEL]`: talk to what was trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from truetune.cli import answer_options
from truetune.disk import to_json
from truetune.messages import text

if TYPE_CHECKING:
    from truetune.console import Console
    from truetune.records import Message
    from truetune.use import Model


SAVED_FILE = "chat.jsonl"
"""Where /save writes if no file is named."""


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
            _Conversation(model, console, sampling).run()
        else:
            model = load(chosen, is_base=is_base, use_run_system=not no_run_system)
            _introduce(model, console, is_brief=True)
            answer(model, [{"role": "user", "content": message}], console=console, sampling=sampling)

    return click.Command(
        "chat",
        callback=run,
        help=text("command.chat", lang),
        params=[
            click.Argument(["path"], required=False),
            click.Option(["-m", "--message", "message"], metavar="TEXT", help=text("help.message", lang)),
            click.Option(["--base", "is_base"], is_flag=True, help=text("help.base", lang)),
            *answer_options(lang),
            click.Option(
                ["--temperature"], type=click.FloatRange(0, 2), default=0.0, help=text("help.temperature", lang)
            ),
            click.Option(
                ["--top-p"], type=click.FloatRange(0, 1, min_open=True), default=1.0, help=text("help.top_p", lang)
            ),
            click.Option(["--seed"], type=click.IntRange(min=0), help=text("help.seed", lang)),
        ],
    )


def _introduce(model: Model, console: Console, *, is_brief: bool = False) -> None:
    """Say what answers, with which system prompt, and whether its prompts are those of training."""
    console.note("chat.model", name=model.name)
    if model.quantization:
        console.note("use.quantised", kind=model.quantization)
    if model.renderer.system:
        console.note("chat.system", system=model.renderer.system)
    if model.num_probes is None:
        console.note("chat.no_probes")
    elif not is_brief:
        console.note("chat.probes", count=model.num_probes)
    if not is_brief:
        console.note("chat.how")


class _Conversation:
    """What is said so far, and what the lines that begin with a slash do."""

    def __init__(self, model: Model, console: Console, sampling: dict[str, Any]) -> None:
        self.model, self.console, self.sampling = model, console, sampling
        self.system: list[Message] = []
        self.messages: list[Message] = []
        self.commands: dict[str, Callable[[str], None]] = {
            "/reset": self._reset,
            "/base": self._ask_base,
            "/system": self._set_system,
            "/save": self._save,
        }

    def run(self) -> None:
        """Take turns until /exit, Ctrl-D or Ctrl-C at the prompt; Ctrl-C while an answer runs ends that answer."""
        while True:
            try:
                line = input("\n> ").strip()
            except (EOFError, KeyboardInterrupt):
                self.console.blank()
                return
            if line == "/exit":
                return
            word, _, rest = line.partition(" ")
            if word in self.commands:
                self.commands[word](rest.strip())
            elif word.startswith("/") and word[1:].isalpha() and not rest:
                self.console.say("chat.how", style="dim")
            elif line:
                self._ask(line)

    def _ask(self, question: str) -> None:
        self.messages.append({"role": "user", "content": question})
        try:
            self.messages.append(self._answer())
        except KeyboardInterrupt:
            self.messages.pop()
            self.console.say("chat.stopped", style="dim")

    def _answer(self) -> Message:
        return answer(self.model, [*self.system, *self.messages], console=self.console, sampling=self.sampling)

    def _reset(self, _: str) -> None:
        self.messages = []
        self.console.say("chat.reset", style="dim")

    def _ask_base(self, _: str) -> None:
        """Let the base answer the last question, behind what was said before it; what was said stays as it is."""
        from truetune.generate import base_only

        if len(self.messages) < 2 or not self.model.has_adapter:
            self.console.say("chat.no_base", style="dim")
            return
        said = self.messages
        self.messages = said[:-1]
        try:
            with base_only(self.model.model):
                self._answer()
        except KeyboardInterrupt:
            self.console.say("chat.stopped", style="dim")
        self.messages = said

    def _set_system(self, prompt: str) -> None:
        self.messages = []
        self.system = [{"role": "system", "content": prompt}] if prompt else []
        self.console.say("chat.system_set" if prompt else "chat.system_back", style="dim", system=prompt)

    def _save(self, name: str) -> None:
        """Append what was said as a row to train on."""
        if not self.messages:
            self.console.say("chat.nothing_said", style="dim")
            return
        path = Path(name or SAVED_FILE).expanduser()
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(to_json({"messages": [*self.system, *self.messages]}) + "\n")
        except OSError as error:
            self.console.say("chat.not_saved", style="yellow", path=path, problem=error.strerror)
            return
        self.console.say("chat.saved", style="dim", path=path)


def answer(model: Model, messages: list[Message], *, console: Console, sampling: dict[str, Any]) -> Message:
    """Print the answer as it comes, what the model thinks dim, and return it."""
    from truetune.serve.text import ReplyReader

    reader = ReplyReader(opens_thinking=model.renderer.opens_thinking)
    said: dict[str, list[str]] = {"reasoning": [], "content": []}

    def show(piece: str, *, is_last: bool = False) -> None:
        for kind, part in reader.add(piece, is_last=is_last):
            if kind == "content" and said["reasoning"] and not said["content"]:
                console.write("\n")
            console.write(part, end="", is_dim=kind == "reasoning")
            said[kind].append(part)

    for piece in model.stream(messages, **sampling):
        show(piece)
    show("", is_last=True)
    console.blank()
    content, reasoning = ("".join(said[kind]).strip() for kind in ("content", "reasoning"))
    return {"role": "assistant", "content": content} | ({"reasoning_content": reasoning} if reasoning else {})
