"""The preflight: what stops a run before weights are loaded, and what it shows."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from pathlib import Path
from typing import Any

import pytest

from truetune.config import resolve
from truetune.console import Console
from truetune.errors import UserError
from truetune.preflight import MAX_REFUSED_SHOWN, preflight, require_usable, show_refused, show_report
from truetune.records import Refusal, Report
from truetune.weights import count_parameters


def report(**values: Any) -> Report:
    """A report of 100 rows, all of them good."""
    numbers = {
        "rows_read": 1100,
        "rows_used": 1100,
        "rows_refused": 0,
        "refused": (),
        "exact_duplicates": 2,
        "pairs": 1234,
        "learned_tokens": 1000,
        "learned_template_tokens": 250,
        "total_tokens": 4000,
        "trie_tokens": 3000,
        "longest": 77,
        "steps": 63,
        "rows_held_out": 8,
        "quantiles": {"p50": 20, "p90": 40, "p99": 60},
    }
    return Report(**numbers | values)


def refusals(count: int) -> list[Refusal]:
    return [Refusal(f"a.json:{number}", f"reason {number % 3}", f"fix {number}") for number in range(1, count + 1)]


# --- require_usable ---


def test_a_clean_report_is_usable() -> None:
    require_usable(report(), skip_invalid=False)


def test_refused_rows_stop_a_run_unless_they_may_be_skipped() -> None:
    bad = report(rows_refused=3, refused=refusals(3), rows_used=1097)
    with pytest.raises(UserError) as caught:
        require_usable(bad, skip_invalid=False)
    assert (caught.value.key, caught.value.where, caught.value.exit_code) == ("rows_refused", "a.json:1", 2)
    assert caught.value.values["count"] == 3
    require_usable(bad, skip_invalid=True)


@pytest.mark.parametrize(("used", "held_out"), [(0, 0), (8, 8)])
@pytest.mark.parametrize("skip_invalid", [True, False])
def test_without_a_row_to_train_on_a_run_stops(used: int, held_out: int, skip_invalid: bool) -> None:
    with pytest.raises(UserError) as caught:
        require_usable(report(rows_used=used, rows_held_out=held_out), skip_invalid=skip_invalid)
    assert caught.value.key == "no_rows"


def test_one_row_is_enough() -> None:
    require_usable(report(rows_used=9, rows_held_out=8), skip_invalid=False)


# --- show_report ---


def test_the_report_shows_every_number(capsys: pytest.CaptureFixture[str]) -> None:
    told = report(notes=["a note"], diagnosis=["a diagnosis"], formats={"alpaca": 1100}, trie_tokens=3000)
    show_report(told, Console())
    assert capsys.readouterr().out == (
        "Data\n"
        "  rows read            1,100\n"
        "  rows used            1,100, 8 of them held out\n"
        "  rows refused         0\n"
        "  formats              alpaca 1,100\n"
        "  exact duplicates     2\n"
        "  prompt-answer pairs  1,234\n"
        "  tokens               4,000; 3,000 computed in an epoch, since common prefixes count once (25% saved)\n"
        "  tokens learned       1,000 (25% of all; 25% of them written by the template)\n"
        "  tokens a pair        20 median, 40 p90, 60 p99, 77 longest\n"
        "  steps                63\n"
        "  a note\n"
        "  a diagnosis\n"
    )


def test_the_report_in_chinese(capsys: pytest.CaptureFixture[str]) -> None:
    show_report(report(), Console("zh"))
    out = capsys.readouterr().out
    assert out.startswith("数据\n")
    assert "1,100，其中留出 8 条" in out
    assert len(out.splitlines()) == 11


def test_an_empty_report_can_be_shown(capsys: pytest.CaptureFixture[str]) -> None:
    numbers = ("rows_read", "rows_used", "pairs", "learned_tokens", "learned_template_tokens", "total_tokens", "steps")
    show_report(report(**dict.fromkeys(numbers, 0)), Console())
    assert "0 (0% of all; 0% of them written by the template)" in capsys.readouterr().out


# --- show_refused ---


def test_refused_rows_are_shown_with_where_reason_and_fix(capsys: pytest.CaptureFixture[str]) -> None:
    show_refused(report(refused=refusals(2)), Console())
    assert capsys.readouterr().out == "a.json:1: reason 1\n  → fix 1\na.json:2: reason 2\n  → fix 2\n"


def test_many_refused_rows_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    show_refused(report(refused=refusals(MAX_REFUSED_SHOWN + 7)), Console())
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * MAX_REFUSED_SHOWN + 1
    assert lines[-1] == "… and 7 more refused rows (3 reasons); see truetune check --show refused."


def test_exactly_as_many_as_are_shown_are_not_counted(capsys: pytest.CaptureFixture[str]) -> None:
    show_refused(report(refused=refusals(MAX_REFUSED_SHOWN)), Console())
    assert len(capsys.readouterr().out.splitlines()) == 2 * MAX_REFUSED_SHOWN


def test_all_refused_rows_can_be_shown(capsys: pytest.CaptureFixture[str]) -> None:
    show_refused(report(refused=refusals(40)), Console(), limit=None)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 80
    assert lines[-2:] == ["a.json:40: reason 1", "  → fix 40"]


def test_nothing_refused_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    show_refused(report(), Console())
    assert capsys.readouterr().out == ""


# --- preflight ---


@pytest.mark.parametrize(
    ("flags", "key", "where"),
    [({"model": "/m"}, "no_data", "data"), ({"data": ["a.json"]}, "no_model", "--model"), ({}, "no_data", "data")],
)
def test_data_and_model_are_needed(flags: dict[str, Any], key: str, where: str) -> None:
    with pytest.raises(UserError) as caught:
        preflight(resolve(flags).config, Console(quiet=True))
    assert (caught.value.key, caught.value.where) == (key, where)


def test_what_is_checked_is_what_will_be_trained(
    tiny_qwen: Path,
    qwen_tokenizer: Any,
    rows: list[dict[str, str]],
    write_json: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("truetune.preflight.load_tokenizer", lambda _folder: qwen_tokenizer)
    config = resolve({"data": [str(write_json(rows))], "model": str(tiny_qwen), "system": "Be exact."}).config
    flight = preflight(config, Console(quiet=True))
    assert flight.base.folder == tiny_qwen
    assert flight.renderer.system == "Be exact."
    found = flight.prepared.report
    assert (found.rows_read, found.rows_used, found.rows_refused, found.rows_held_out) == (40, 40, 0, 8)
    assert len(flight.prepared.train) == 32
    shown = flight.renderer.tokenizer.decode(flight.prepared.train[0].pairs[0].prompt_ids)
    assert shown.startswith("<|im_start|>system\nBe exact.<|im_end|>\n<|im_start|>user\nWhat is ")


@pytest.mark.parametrize(("template", "date"), [("{{ strftime_now('%Y') }}", "2026-01-02"), ("", None)])
def test_the_date_reaches_a_template_that_writes_it(
    template: str,
    date: str | None,
    tiny_qwen: Path,
    qwen_tokenizer: Any,
    rows: list[dict[str, str]],
    write_json: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer = copy(qwen_tokenizer)
    tokenizer.chat_template = template + qwen_tokenizer.chat_template
    monkeypatch.setattr("truetune.preflight.load_tokenizer", lambda _folder: tokenizer)
    config = resolve({"data": [str(write_json(rows))], "model": str(tiny_qwen)}).config
    flight = preflight(config, Console(quiet=True), date="2026-01-02")
    assert flight.renderer.date == date
    shown = tokenizer.decode(flight.prepared.train[0].pairs[0].prompt_ids)
    assert shown.startswith("2026<|im_start|>" if template else "<|im_start|>")


@pytest.mark.parametrize(("dtype", "each"), [("float32", 16), ("bfloat16", 18)])
def test_what_full_fine_tuning_needs_is_said(
    dtype: str, each: int, tiny_qwen: Path, write_json: Callable[..., Path], rows: list[dict[str, str]]
) -> None:
    """Before any weights are loaded, with the number of them; of LoRA nothing is said."""
    count = count_parameters(tiny_qwen)
    given = {"data": [str(write_json(rows))], "model": str(tiny_qwen), "dtype": dtype}
    flight = preflight(resolve({**given, "finetuning": "full"}).config, Console(quiet=True))
    (note,) = [one for one in flight.prepared.report.notes if "Full fine-tuning" in one]
    assert f"{each} bytes for each of {count:,} weights" in note
    assert f"{each * count / 1e9:.1f} GB" in note
    assert ("copy" in note) == (dtype == "bfloat16")
    plain = preflight(resolve(given).config, Console(quiet=True))
    assert not any("Full fine-tuning" in one for one in plain.prepared.report.notes)


@pytest.mark.real
def test_a_gguf_base_tells_what_it_takes_in_memory(
    smol: Path, write_json: Callable[..., Path], rows: list[dict[str, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Not what the file has; in 4 bits less, but for the embeddings."""
    from truetune.commands.demo import demo_model

    taken = {}
    for kind in ("float32", "bfloat16", "4bit"):
        key = {"quantization": kind} if kind == "4bit" else {"dtype": kind}
        settings = resolve({"data": [str(write_json(rows))], "model": demo_model(), **key})
        preflight(settings.config, Console("en"))
        said = capsys.readouterr().out
        taken[kind] = float(said.split("weights take ")[1].split()[0])
        assert f"as {kind}" in said
        assert 0.05 < float(said.split("GGUF file has ")[1].split()[0]) < 0.15
    assert taken["float32"] == pytest.approx(2 * taken["bfloat16"], abs=0.02)
    assert taken["bfloat16"] == pytest.approx(2 * 0.1345, abs=0.02)
