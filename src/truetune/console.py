"""The only printer: tables, progress, coloured tokens, errors. Without a terminal: no colour, no bars, no wrapping."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.cells import cell_len, set_cell_size
from rich.console import Console as Rich
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from truetune.messages import text
from truetune.records import Pair

# Wide enough that nothing wraps where nobody looks at a screen, so that "file:line" survives grep.
PLAIN_WIDTH = 100_000
LEARNED_STYLE, PROMPT_STYLE = "bold green", "dim"
# Where there is no colour, the learned part stands between these.
LEARNED_MARKS = ("⟦", "⟧")


class Console:
    """Prints texts of the catalogue in one language."""

    def __init__(self, lang: str = "en", *, quiet: bool = False) -> None:
        self.lang = lang
        self.is_terminal = sys.stdout.isatty() and not quiet
        width = None if self.is_terminal else PLAIN_WIDTH
        self._out = Rich(width=width, highlight=False, emoji=False, quiet=quiet, soft_wrap=not self.is_terminal)
        self._err = Rich(width=width, highlight=False, emoji=False, stderr=True, soft_wrap=not sys.stderr.isatty())

    def text(self, key: str, **values: Any) -> str:
        """Return a text of the catalogue."""
        return text(key, self.lang, **values)

    def say(self, key: str, style: str = "", **values: Any) -> None:
        """Print a text of the catalogue on a line of its own."""
        self._out.print(escape(self.text(key, **values)), style=style)

    def note(self, key: str, **values: Any) -> None:
        """Print a text about the answer to come on the error stream, so that a pipe gets the answer alone."""
        self._err.print(escape(self.text(key, **values)), style="dim")

    def write(self, piece: str, *, end: str = "\n", is_dim: bool = False) -> None:
        """Print text as it is: a model's answer, a table for other programs. Never read as markup."""
        if self._out.quiet:
            return
        if is_dim and self.is_terminal:
            self._out.print(Text(piece, style="dim"), end=end, soft_wrap=True)
        else:
            self._out.file.write(piece + end)
        self._out.file.flush()

    def blank(self) -> None:
        """Print an empty line."""
        self._out.print()

    def pairs(self, title: str, rows: Sequence[tuple[str, Any]]) -> None:
        """Print a title and label-value lines, the labels (catalogue keys) aligned."""
        self._out.print(escape(self.text(title)), style="bold")
        labels = [self.text(label) for label, _ in rows]
        width = max(map(cell_len, labels))
        for label, (_, value) in zip(labels, rows, strict=True):
            self.write(f"  {label}{' ' * (width - cell_len(label))}  {value}")

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print a table; `columns` are catalogue keys."""
        table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
        for column in columns:
            table.add_column(escape(self.text(column)), overflow="fold")
        for row in rows:
            table.add_row(*map(escape, row))
        self._out.print(table)

    def side_by_side(self, question: str, sides: Mapping[str, str]) -> None:
        """Print a question and the answers to it, their labels (catalogue keys) aligned, with an empty line behind."""
        self._out.print(escape(question), style="bold")
        labels = [self.text(label) for label in sides]
        width = max(map(cell_len, labels))
        table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column(style="dim", no_wrap=True)
        table.add_column(overflow="fold")
        for label, answer in zip(labels, sides.values(), strict=True):
            table.add_row(escape(label), escape(answer))
            if not self.is_terminal:
                # A table would fill each line with blanks.
                self.write(f"{label}{' ' * (width - cell_len(label))}  {answer}")
        if self.is_terminal:
            self._out.print(table)
        self.blank()

    def pair_view(self, tokenizer: Any, pair: Pair) -> None:
        """Print one pair: the prompt dim, what is learned green; between ⟦ ⟧ where there is no colour."""
        view = Text().append(tokenizer.decode(pair.prompt_ids), style=PROMPT_STYLE)
        before, after = ("", "") if self.is_terminal else LEARNED_MARKS
        view.append(before + tokenizer.decode(pair.answer_ids) + after, style=LEARNED_STYLE)
        self._out.print(view)

    def error(self, error: Any) -> None:
        """Print a fault in three parts on the error stream: where, what, how to fix it."""
        for fault in getattr(error, "errors", (error,)):
            what = text(f"error.{fault.key}", self.lang, **fault.values)
            self._err.print(f"[bold red]{escape(fault.where)}[/]: {escape(what)}")
            self._err.print(f"  → {escape(text(f'fix.{fault.fix}', self.lang, **fault.values))}", style="yellow")

    @contextmanager
    def status(self, key: str, **values: Any) -> Iterator[None]:
        """Show that something takes a while: a spinner on a terminal, a line elsewhere."""
        if not self.is_terminal:
            self.say(key, **values)
            yield
            return
        with self._out.status(escape(self.text(key, **values))):
            yield

    @contextmanager
    def counting(self, key: str) -> Iterator[Callable[[int], None]]:
        """Give a function that shows how far a count has come, on a terminal."""
        if not self.is_terminal:
            yield lambda _: None
            return
        with self._out.status(escape(self.text(key, count=0))) as status:
            yield lambda count: status.update(escape(self.text(key, count=count)))

    @contextmanager
    def progress(self, total: int, done: int = 0) -> Iterator[Steps]:
        """Show the steps of a run: a bar on a terminal, a line every `logging_steps` elsewhere."""
        bar = Progress(
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            TextColumn(escape(self.text("label.eta"))),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=self._out,
            disable=not self.is_terminal,
        )
        with bar:
            yield Steps(self, bar, bar.add_task("", total=total, completed=done))


class Steps:
    """What the bar of a run shows: loss, rows/s, memory."""

    def __init__(self, console: Console, bar: Progress, task: Any) -> None:
        self._console, self._bar, self._task = console, bar, task
        self._durations_s: list[float] = []

    def show(self, event: Mapping[str, Any], *, is_logged: bool) -> None:
        """Show an event of the loop; `is_logged`: print a line where there is no bar."""
        if event["kind"] == "memory":
            self._console.say("train.smaller", step=event["step"], tokens=event["max_tokens"])
            return
        if event["kind"] == "sample":
            self._show_sample(event)
            return
        if event["kind"] == "finding":
            values = {name: value for name, value in event.items() if name not in ("kind", "name")}
            self._console.say(f"finding.{event['name']}", style="yellow", **values)
            return
        if event["kind"] == "skipped":
            self._console.say("train.skipped", style="yellow", **{k: event[k] for k in ("step", "loss", "row_ids")})
            self._bar.update(self._task, advance=1)
            return
        if event["kind"] == "eval":
            self._show_evaluation(event)
            return
        self._durations_s.append(event["seconds"])
        values = {
            "loss": f"{event['loss']:.4f}",
            "rate": f"{event['rows'] / event['seconds']:.2f}",
            "memory": f"{event['memory_bytes'] / 2**30:.1f}",
        }
        self._bar.update(self._task, advance=1, description=escape(self._console.text("train.bar", **values)))
        if is_logged and not self._console.is_terminal:
            total = int(self._bar.tasks[0].total or 0)
            left = (total - event["step"]) * sum(self._durations_s) / len(self._durations_s)
            grad_norm = f"{event['grad_norm']:.3f}"
            self._console.say(
                "train.step", step=event["step"], total=total, eta=_minutes(left), grad_norm=grad_norm, **values
            )

    def _show_evaluation(self, event: Mapping[str, Any]) -> None:
        """Show the held-out loss; of a preference loss, also how often the chosen answer has the higher reward."""
        values = {"step": event["step"], "loss": f"{event['eval_loss']:.4f}"}
        if "eval_reward_accuracy" in event:
            values["accuracy"] = f"{event['eval_reward_accuracy']:.0%}"
            self._console.say("train.eval_compared", margin=f"{event['eval_reward_margin']:.3f}", **values)
            return
        self._console.say("train.eval", **values)

    def _show_sample(self, event: Mapping[str, Any]) -> None:
        """Show a prompt and its answer, a line each; before the first prompt, whose answers follow."""
        if event["number"] == 0:
            key = "train.samples_base" if event["step"] == 0 else "train.samples"
            self._console.say(key, style="dim", step=event["step"])
        self._console.say("train.prompt", style="dim", prompt=one_line(event["prompt"]))
        self._console.say("train.answer", answer=one_line(event["answer"]))


def one_line(shown: str, width: int = 110) -> str:
    """Return a text as one line, its end cut where it is longer than `width` columns.

    >>> one_line("a\\n b  c", 4), one_line("你好吗", 4)
    ('a b…', '你…')
    """
    shown = " ".join(shown.split())
    return shown if cell_len(shown) <= width else set_cell_size(shown, width - 1).rstrip() + "…"


def _minutes(seconds: float) -> str:
    """Return "m:ss".

    >>> _minutes(75)
    '1:15'
    """
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
