"""`truetune check`: what would be learned, on screen and as JSON, without weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from truetune.cli import run
from truetune.model import load_tokenizer

# The contract of product.md; more keys are allowed.
REQUIRED = {
    *("rows_read", "rows_used", "rows_refused", "refused", "exact_duplicates", "pairs", "learned_tokens"),
    *("learned_template_tokens", "total_tokens", "trie_tokens", "longest", "steps", "diagnosis"),
}

load_once = cache(load_tokenizer)

Capture = pytest.CaptureFixture[str]
Write = Callable[..., Path]
Rows = list[dict[str, str]]


@pytest.fixture(autouse=True)
def _quick_and_english(monkeypatch: pytest.MonkeyPatch) -> None:
    # Two seconds a test, otherwise.
    monkeypatch.setattr("truetune.preflight.load_tokenizer", load_once)
    for name in ("LC_ALL", "LC_MESSAGES", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LANG", "en_US.UTF-8")


def check(data: Path, model: Path, *words: str) -> int:
    return run(["check", str(data), "--model", str(model), *words])


def report_of(path: Path) -> dict[str, Any]:
    report = json.loads(path.read_text(encoding="utf-8"))
    assert isinstance(report, dict)
    return report


# --- clean data ---


def test_clean_data_leave_with_zero_and_show_the_numbers(
    tiny_qwen: Path, rows: Rows, write_json: Write, capsys: Capture
) -> None:
    assert check(write_json(rows), tiny_qwen) == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    assert lines[:5] == [
        "Reading and checking the data",
        "Data",
        "  rows read            40",
        "  rows used            40, 8 of them held out",
        "  rows refused         0",
    ]
    assert "  Only 6 steps: the model will hardly change. Add rows, or raise num_train_epochs." in lines


def test_the_json_report_keeps_the_contract(tiny_qwen: Path, rows: Rows, write_json: Write, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    rows[5] = rows[4]
    assert check(write_json(rows), tiny_qwen, "--json", str(path), "--batch-size", "5") == 0
    report = report_of(path)
    assert set(report) >= REQUIRED
    assert (report["rows_read"], report["rows_used"], report["rows_refused"]) == (40, 40, 0)
    assert (report["refused"], report["exact_duplicates"], report["pairs"]) == ([], 1, 40)
    trained = report["rows_used"] - report["rows_held_out"]
    assert report["steps"] == 3 * -(-trained // 5)
    # Qwen3's template writes an empty think block of 4 tokens before an answer, and the stop token behind it.
    assert report["learned_template_tokens"] == 5 * 40
    assert 5 * 40 < report["learned_tokens"] < report["trie_tokens"] < report["total_tokens"]
    assert report["quantiles"]["p50"] <= report["longest"] <= report["total_tokens"] / 40 * 2
    # Few steps, a repeat, and much of such short answers written by the template.
    assert len(report["diagnosis"]) == 3
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["data.json", "report.json"]


def test_the_numbers_are_those_of_the_tokenizer(
    tiny_qwen: Path, qwen_tokenizer: Any, rows: Rows, write_json: Write, tmp_path: Path
) -> None:
    path = tmp_path / "report.json"
    assert check(write_json(rows[:3]), tiny_qwen, "--json", str(path)) == 0
    report = report_of(path)
    lengths, learned = [], 0
    for row in rows[:3]:
        turns = [{"role": "user", "content": row["instruction"]}]
        prompt = qwen_tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
        answer = qwen_tokenizer("<think>\n\n</think>\n\n" + row["output"] + "<|im_end|>")["input_ids"]
        lengths.append(len(prompt) + len(answer))
        learned += len(answer)
    assert report["total_tokens"] == sum(lengths)
    assert (report["learned_tokens"], report["longest"]) == (learned, max(lengths))


def test_flags_change_the_numbers(tiny_qwen: Path, rows: Rows, write_json: Write, tmp_path: Path) -> None:
    data, path = write_json(rows), tmp_path / "report.json"
    found = {}
    for words in ([], ["--eval-split", "0"], ["--max-steps", "4"], ["--system", "Be exact."]):
        assert check(data, tiny_qwen, "--json", str(path), *words) == 0
        found[" ".join(words)] = report_of(path)
    assert {words: (r["rows_held_out"], r["steps"]) for words, r in found.items()} == {
        "": (8, 6),
        "--eval-split 0": (0, 9),
        "--max-steps 4": (8, 4),
        "--system Be exact.": (8, 6),
    }
    assert found["--system Be exact."]["total_tokens"] > found[""]["total_tokens"]
    assert found["--system Be exact."]["learned_tokens"] == found[""]["learned_tokens"]


def test_the_configuration_file_is_read(tiny_qwen: Path, rows: Rows, write_json: Write, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    config = write_json(f"model: {tiny_qwen}\ndata: [{write_json(rows)}]\nbatch_size: 4\nlora_r: 8\n", "c.yaml")
    assert run(["check", "--config", str(config), "--json", str(path)]) == 0
    assert report_of(path)["steps"] == 24


# --- --show ---


def test_show_prints_rows_with_the_learned_part_marked(
    tiny_qwen: Path, rows: Rows, write_json: Write, capsys: Capture
) -> None:
    data = write_json(rows)
    assert check(data, tiny_qwen, "--show", "2") == 0
    out = capsys.readouterr().out
    assert (out.count("⟦"), out.count("⟧")) == (2, 2)
    for number, line in ((0, 2), (1, 7)):
        assert f"{data}:{line}  prompt " in out
        assert f"<|im_start|>user\nWhat is {number} plus {number}?<|im_end|>\n<|im_start|>assistant\n" in out
        assert f"It is {2 * number}.<|im_end|>⟧" in out
    assert "What is 2 plus 2?" not in out


def test_show_more_rows_than_there_are(tiny_qwen: Path, rows: Rows, write_json: Write, capsys: Capture) -> None:
    assert check(write_json(rows), tiny_qwen, "--show", "1000") == 0
    assert capsys.readouterr().out.count("⟦") == 40


def test_show_prints_every_learned_turn(tiny_qwen: Path, write_json: Write, capsys: Capture) -> None:
    turns = [("user", "One?"), ("assistant", "First."), ("user", "Two?"), ("assistant", "Second.")]
    data = write_json([{"messages": [{"role": role, "content": content} for role, content in turns]}])
    assert check(data, tiny_qwen, "--show", "1") == 0
    marked = [part.split("⟧")[0] for part in capsys.readouterr().out.split("⟦")[1:]]
    assert [part.removeprefix("<think>\n\n</think>\n\n") for part in marked] == [
        "First.<|im_end|>",
        "Second.<|im_end|>",
    ]


def test_show_longest(tiny_qwen: Path, rows: Rows, write_json: Write, capsys: Capture) -> None:
    rows[17]["output"] = "A much longer answer than any other row has, by far."
    assert check(write_json(rows), tiny_qwen, "--show", "longest") == 0
    out = capsys.readouterr().out
    assert out.count("⟦") == 1
    assert f"data.json:{17 * 5 + 2}  prompt" in out
    assert f"{rows[17]['output']}<|im_end|>⟧" in out


def test_markup_in_a_row_is_shown_as_it_is(tiny_qwen: Path, rows: Rows, write_json: Write, capsys: Capture) -> None:
    rows[0]["output"] = "[bold]x[/bold] :smile: [/]"
    assert check(write_json(rows), tiny_qwen, "--show", "1") == 0
    assert "[bold]x[/bold] :smile: [/]<|im_end|>⟧" in capsys.readouterr().out


@pytest.mark.parametrize("value", ["x", "-1", "1.5", "shortest"])
def test_show_anything_else_is_refused(
    value: str, tiny_qwen: Path, rows: Rows, write_json: Write, capsys: Capture
) -> None:
    assert check(write_json(rows), tiny_qwen, "--show", value) == 2
    assert capsys.readouterr().err == (
        f"--show: --show cannot be {value}\n  → Give a number of rows, or longest, refused, or duplicates.\n"
    )


# --- refused rows ---


@pytest.fixture
def bad(rows: Rows, write_json: Write) -> Path:
    """Forty rows; the second has no output, the third an empty one, the fourth is a number."""
    mixed: list[Any] = list(rows)
    mixed[1] = {"instruction": "No output", "input": ""}
    mixed[2] = {"instruction": "Empty output", "input": "", "output": " "}
    mixed[3] = 3
    return write_json(mixed, "bad.json")


def test_refused_rows_leave_with_two_and_their_places(bad: Path, tiny_qwen: Path, capsys: Capture) -> None:
    assert check(bad, tiny_qwen) == 2
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    at = lines.index(f'{bad}:7: the key "output" is missing (found: input, instruction)')
    assert lines[at + 1 : at + 6] == [
        '  → Add "output" to this row.',
        f"{bad}:11: output is empty",
        "  → Fill it, or remove the row.",
        f"{bad}:16: the row is not an object but: number",
        '  → Write {"instruction": …, "output": …} or {"messages": […]}.',
    ]
    assert "  rows refused         3" in lines


def test_refused_rows_in_json(bad: Path, tiny_qwen: Path, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    assert check(bad, tiny_qwen, "--json", str(path)) == 2
    report = report_of(path)
    assert report["rows_read"] == report["rows_used"] + report["rows_refused"] == 40
    assert report["rows_refused"] == len(report["refused"]) == 3
    assert [set(row) for row in report["refused"]] == [{"where", "reason", "fix"}] * 3
    assert [row["where"] for row in report["refused"]] == [f"{bad}:7", f"{bad}:11", f"{bad}:16"]
    assert all(row["reason"] and row["fix"] for row in report["refused"])


def test_refused_rows_that_may_be_skipped_still_leave_with_two(bad: Path, tiny_qwen: Path) -> None:
    assert check(bad, tiny_qwen, "--invalid", "skip") == 2


def test_show_refused_lists_them_all_once(rows: Rows, write_json: Write, tiny_qwen: Path, capsys: Capture) -> None:
    for row in rows[:15]:
        del row["output"]
    data = write_json(rows)
    assert check(data, tiny_qwen) == 2
    short = capsys.readouterr().out
    assert check(data, tiny_qwen, "--show", "refused") == 2
    full = capsys.readouterr().out
    assert (short.count("is missing"), full.count("is missing")) == (10, 15)
    assert "… and 5 more refused rows (1 reasons)" in short
    assert "more refused rows" not in full
    assert [f"{data}:{2 + 4 * number}: " in full for number in range(15)] == [True] * 15


def test_nothing_usable_is_reported(write_json: Write, tiny_qwen: Path, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    assert check(write_json([{"instruction": "x"}]), tiny_qwen, "--json", str(path)) == 2
    report = report_of(path)
    assert (report["rows_used"], report["pairs"], report["longest"], report["steps"]) == (0, 0, 0, 0)


def test_a_row_too_long_is_refused_not_cut(rows: Rows, write_json: Write, tiny_qwen: Path, capsys: Capture) -> None:
    rows[3]["output"] = "word " * 50
    data = write_json(rows)
    assert check(data, tiny_qwen, "--max-length", "40") == 2
    out = capsys.readouterr().out
    assert f"{data}:17: " in out
    assert "more than max_length 40" in out
    assert "An answer is never cut." in out


# --- language, files ---


def test_everything_in_chinese(bad: Path, tiny_qwen: Path, tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "report.json"
    assert check(bad, tiny_qwen, "--lang", "zh", "--show", "1", "--json", str(path)) == 2
    out = capsys.readouterr().out
    assert out.splitlines()[:2] == ["正在读取并检查数据", "数据"]
    assert f"{bad}:7: 缺少“output”（有：input, instruction）\n  → 给这一条加上“output”。\n" in out
    assert f"{bad}:2  提示 " in out
    report = report_of(path)
    assert report["refused"][1]["reason"] == "output 是空的"
    assert report["diagnosis"][0].startswith("只有 ")


def test_a_report_into_a_folder_that_does_not_exist(
    tiny_qwen: Path, rows: Rows, write_json: Write, tmp_path: Path, capsys: Capture
) -> None:
    path = tmp_path / "no" / "report.json"
    assert check(write_json(rows), tiny_qwen, "--json", str(path)) == 2
    assert capsys.readouterr().err.startswith(f"{path}: the folder {path.parent} does not exist\n  → ")
    assert not path.parent.exists()


def test_check_writes_nothing_without_json(
    tiny_qwen: Path, rows: Rows, write_json: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(path.name for path in tiny_qwen.iterdir())
    assert check(write_json(rows), tiny_qwen) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["data.json"]
    assert sorted(path.name for path in tiny_qwen.iterdir()) == before


# --- duplicates ---


def test_duplicates_are_listed_on_screen_and_in_the_store(
    tiny_qwen: Path, rows: Rows, write_json: Write, tmp_path: Path, capsys: Capture
) -> None:
    data, store = write_json(rows), tmp_path / "store"
    assert check(data, tiny_qwen, "--show", "duplicates", "--store", str(store)) == 0
    assert "No row is an exact duplicate of another." in capsys.readouterr().out.splitlines()
    assert (store / "duplicates.jsonl").read_text() == ""
    rows[20] = rows[30] = rows[2]
    rows[31] = rows[1]
    assert check(write_json(rows), tiny_qwen, "--show", "duplicates", "--store", str(store)) == 0
    lines = capsys.readouterr().out.splitlines()
    groups = [json.loads(line) for line in (store / "duplicates.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(group["row"], group["count"], len(group["others"])) for group in groups] == [(1, 1, 1), (2, 2, 2)]
    for group in groups:
        places = ", ".join(group["others"])
        assert f"{group['where']}: {group['count']} more like it: {places}" in lines
