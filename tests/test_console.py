"""The only printer: plain and unwrapped without a terminal, coloured on one, errors in three parts."""

from __future__ import annotations

import re
import sys
from typing import Any

import pytest
from rich.cells import cell_len

from truetune.console import Console, Steps
from truetune.errors import UserError, UserErrors
from truetune.records import Pair

ESCAPE = "\x1b"
LONG = "/".join(f"folder-{number:03d}" for number in range(28)) + "/data.json:17"


class Letters:
    """A tokenizer whose ids are code points."""

    def decode(self, ids: tuple[int, ...]) -> str:
        return "".join(map(chr, ids))


def pair(prompt: str, answer: str) -> Pair:
    return Pair(tuple(map(ord, prompt)), tuple(map(ord, answer)))


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "COLORTERM", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


def pretend_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make standard output and error look like a terminal of 80 columns (in the test itself: capsys renews them)."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")


# --- without a terminal ---


def show_everything(console: Console) -> None:
    console.say("train.done", style="bold", path=LONG)
    console.write(LONG)
    console.pairs("report.title", [("label.steps", LONG), ("label.tokens", 3)])
    console.table(["column.run", "column.state"], [[LONG, "done"]])
    console.pair_view(Letters(), pair(LONG, "answer"))
    with console.status("status.load_use", name=LONG):
        pass
    console.error(UserError("no_data", where=LONG, fix="no_data"))


def test_without_a_terminal_there_is_no_colour_and_no_wrapping(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(LONG) > 300
    show_everything(Console())
    out, err = capsys.readouterr()
    assert ESCAPE not in out + err
    assert [line for line in out.splitlines() if LONG in line] == [
        line for line in out.splitlines() if "folder-0" in line
    ]
    assert (out.count(LONG), err.count(LONG)) == (6, 1)


def test_a_line_longer_than_any_screen_is_not_wrapped(capsys: pytest.CaptureFixture[str]) -> None:
    console, line = Console(), "word " * 50_000 + "end"
    console.write(line)
    console.say("train.done", path=line)
    console.pair_view(Letters(), pair(line, "answer"))
    assert [len(found) for found in capsys.readouterr().out.splitlines()] == [
        len(line),
        len(line) + len("Result: "),
        len(line) + len("⟦answer⟧"),
    ]


def test_without_a_terminal_a_status_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with Console().status("status.load_use", name="m"):
        assert capsys.readouterr().out == "Loading m\n"
    assert capsys.readouterr().out == ""


def test_without_a_terminal_the_learned_part_stands_between_marks(capsys: pytest.CaptureFixture[str]) -> None:
    Console().pair_view(Letters(), pair("<user>Hi\n<assistant>", "Hello.<end>"))
    assert capsys.readouterr().out == "<user>Hi\n<assistant>⟦Hello.<end>⟧\n"


def test_a_learned_part_of_several_lines_is_marked_once(capsys: pytest.CaptureFixture[str]) -> None:
    Console().pair_view(Letters(), pair("[bold]p[/]", "one\ntwo [red]three[/red]"))
    assert capsys.readouterr().out == "[bold]p[/]⟦one\ntwo [red]three[/red]⟧\n"


def test_quiet_prints_nothing_but_errors(capsys: pytest.CaptureFixture[str]) -> None:
    show_everything(Console(quiet=True))
    out, err = capsys.readouterr()
    assert out == ""
    assert LONG in err


# --- text that looks like markup ---

MARKUP = "[bold]x[/bold] [/] [link=http://a]b[/link] [0] [[y]] \\[z]"


def test_markup_in_a_value_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console()
    console.say("train.done", path=MARKUP)
    console.write(MARKUP)
    console.pairs("report.title", [("label.steps", MARKUP)])
    console.table(["column.run"], [[MARKUP]])
    with console.status("status.load_use", name=MARKUP):
        pass
    assert capsys.readouterr().out.count(MARKUP) == 5


def test_markup_in_a_fault_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    Console().error(UserError("show", where=MARKUP, fix="config_value", value=MARKUP, name=MARKUP))
    assert capsys.readouterr().err.count(MARKUP) == 3


def test_a_place_may_end_in_a_backslash(capsys: pytest.CaptureFixture[str]) -> None:
    Console().error(UserError("no_data", where="C:\\data\\", fix="no_data"))
    assert capsys.readouterr().err.startswith("C:\\data\\: no data given\n")


def test_emoji_names_in_an_answer_stay_text(capsys: pytest.CaptureFixture[str]) -> None:
    Console().write("a :smile: b")
    assert capsys.readouterr().out == "a :smile: b\n"


def test_pieces_of_an_answer_are_joined(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console()
    for piece in ("He", "llo", " [w", "orld]"):
        console.write(piece, end="")
    console.blank()
    assert capsys.readouterr().out == "Hello [world]\n"


# --- errors ---


@pytest.mark.parametrize(
    ("lang", "expected"),
    [
        ("en", 'a.json:3: the key "output" is missing (found: x)\n  → Add "output" to this row.\n'),
        ("zh", "a.json:3: 缺少“output”（有：x）\n  → 给这一条加上“output”。\n"),
    ],
)
def test_an_error_has_three_parts_on_the_error_stream(
    lang: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    error = UserError("row_missing_key", where="a.json:3", fix="row_missing_key", name="output", found="x")
    Console(lang).error(error)
    out, err = capsys.readouterr()
    assert (out, err) == ("", expected)


def test_several_errors_are_printed_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    faults = [UserError("no_data", where=f"place {number}", fix="no_data") for number in range(3)]
    Console().error(UserErrors(faults))
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines[::2]] == ["place 0", "place 1", "place 2"]
    assert [line.startswith("  → ") for line in lines[1::2]] == [True] * 3


# --- labels ---


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_values_of_labels_are_aligned(lang: str, capsys: pytest.CaptureFixture[str]) -> None:
    labels = ["label.rows_read", "label.exact_duplicates", "label.pairs", "label.learned_tokens", "label.steps"]
    Console(lang).pairs("report.title", [(label, "@") for label in labels])
    title, *lines = capsys.readouterr().out.splitlines()
    assert title in ("Data", "数据")
    assert len(lines) == 5
    assert len({cell_len(line[: line.index("@")]) for line in lines}) == 1
    assert len({len(line) for line in lines}) == (1 if lang == "en" else 4)


# --- a run's steps ---

STEP: dict[str, Any] = {
    "kind": "step",
    "step": 2,
    "loss": 1.23456,
    "grad_norm": 0.5,
    "rows": 8,
    "seconds": 2.0,
    "memory_bytes": 3 * 2**30,
}


def test_without_a_terminal_a_step_is_a_line_where_it_is_logged(capsys: pytest.CaptureFixture[str]) -> None:
    with Console().progress(40) as steps:
        assert isinstance(steps, Steps)
        steps.show({"kind": "eval", "step": 0, "eval_loss": 2.5}, is_logged=True)
        steps.show(STEP, is_logged=True)
        steps.show(STEP | {"step": 3}, is_logged=False)
    out, err = capsys.readouterr()
    assert out == (
        "step 0: held-out loss 2.5000\nstep 2/40: loss 1.2346  grad norm 0.500  4.00 rows/s  3.0 GB  ETA 1:16\n"
    )
    assert err == ""


# --- on a terminal ---


def test_a_terminal_colours_learned_tokens(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_terminal(monkeypatch)
    Console().pair_view(Letters(), pair("prompt", "answer"))
    out = capsys.readouterr().out
    assert re.fullmatch(r"\x1b\[2mprompt\x1b\[0m\x1b\[(1;|2;)*32manswer\x1b\[0m\n", out)


def test_a_terminal_wraps_and_colours(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_terminal(monkeypatch)
    console = Console()
    console.say("train.done", style="bold", path="x" * 100)
    console.error(UserError("no_data", where="place", fix="no_data"))
    out, err = capsys.readouterr()
    assert ESCAPE in out
    assert max(len(line) for line in re.sub(r"\x1b\[[\d;]*m", "", out).splitlines()) == 80
    assert err.startswith("\x1b[1;31mplace\x1b[0m: no data given\n")


def test_a_terminal_shows_steps_in_a_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_terminal(monkeypatch)
    with Console().progress(40) as steps:
        steps.show(STEP, is_logged=True)
    out = capsys.readouterr().out
    assert "loss 1.2346" in out
    assert "grad norm" not in out
    assert "1/40" in out


def test_no_color_is_respected(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_terminal(monkeypatch)
    monkeypatch.setenv("NO_COLOR", "1")
    Console().error(UserError("no_data", where="place", fix="no_data"))
    assert "\x1b[1;31m" not in capsys.readouterr().err


def test_output_to_a_file_is_plain_though_errors_go_to_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    show_everything(Console())
    out, err = capsys.readouterr()
    assert ESCAPE not in out
    assert ESCAPE in err
    assert out.count(LONG) == 6
