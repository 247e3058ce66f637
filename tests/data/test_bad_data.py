"""Bad data, case by case: what a file or a row must be answered, and that good rows beside it stay as they are.

The numbers are those of the project's list of bad input: D1 to D30 files and JSON, D31 to D35 lengths and repeats,
D36 to D46 turns and texts, D47 to D52 kinds of files and sizes.
"""

from __future__ import annotations

import gzip
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pytest
from pyarrow import parquet

from truetune.config import Config
from truetune.data import json_rows
from truetune.data.prepare import Prepared, prepare
from truetune.data.template import Renderer, build_renderer
from truetune.errors import UserError
from truetune.messages import text

GOOD = {"instruction": "Hi", "output": "Hello."}


@pytest.fixture(scope="module")
def renderer(qwen_tokenizer: Any) -> Renderer:
    """The renderer of the real Qwen3 tokenizer."""
    return build_renderer(qwen_tokenizer, [151645, 151643])


def _prepare(path: Path, renderer: Renderer, **config: Any) -> Prepared:
    return prepare(Config(data=[str(path)], **config), renderer)


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


class File(NamedTuple):
    """A file that cannot be used as a whole: its error, the advice, and where in it."""

    content: bytes
    key: str
    fix: str
    place: str = ""
    name: str = "rows.json"


FILES = {
    "D1 no bytes": File(b"", "data_empty", "data_empty"),
    "D2 white space": File(b" \n\t\n", "data_empty", "data_empty"),
    "D2 empty array": File(b" [ ]\n", "data_empty", "data_empty"),
    "D4 UTF-16": File(_dumps([GOOD]).encode("utf-16"), "data_utf16", "data_utf16"),
    "D5 GBK, JSON": File('[{"instruction": "你好"}]'.encode("gbk"), "data_not_utf8", "data_looks_gbk", ":1"),
    "D5 GBK, lines": File('{"a": 1}\n{"instruction": "你好"}\n'.encode("gbk"), "data_not_utf8", "data_looks_gbk", ":2"),
    "D6 one bad line": File(b'{"a": "b"}\n{"a": "\xff"}\n', "data_not_utf8", "data_not_utf8", ":2"),
    "D8 raw NUL": File(b'[{"instruction": "a\x00b"}]', "data_not_json", "data_not_json", ":1:20"),
    "D9 trailing comma": File(b'[{"a": "b"},\n]', "data_not_json", "data_not_json", ":2:1"),
    "D10 comment": File(b'[\n// rows\n{"a": "b"}]', "data_not_json", "data_comment", ":2:1"),
    "D10 JSON5": File(b"[{a: 'b'}]", "data_not_json", "data_not_json", ":1:3"),
    "D27 cut inside a record": File(b'[{"a": "b"},\n{"a": "b', "data_cut", "data_cut", ":2:7"),
    "D27 cut behind a record": File(b'[{"a": "b"},\n{"a": "b"}', "data_cut", "data_cut", ":2:11"),
    "D47 semicolons": File(b"instruction;output\na;b\n", "data_csv_header", "data_csv_semicolon", ":1", "rows.csv"),
    "D47 open quote": File(b'instruction,output\na,"b\n', "data_csv", "data_csv", ":2", "rows.csv"),
    "D48 zip": File(b"PK\x03\x04", "data_kind", "data_archive", "", "rows.zip"),
    "D48 Excel": File(b"PK\x03\x04", "data_kind", "data_sheet", "", "rows.xlsx"),
    "D48 broken gz": File(b"\x1f\x8bxx", "data_unreadable", "data_unreadable", "", "rows.json.gz"),
    "D48 broken Parquet": File(b"PAR1", "data_unreadable", "data_unreadable", "", "rows.parquet"),
}


@pytest.mark.parametrize("case", FILES)
def test_file_that_cannot_be_used(case: str, renderer: Renderer, tmp_path: Path) -> None:
    file = FILES[case]
    path = tmp_path / file.name
    path.write_bytes(file.content)
    with pytest.raises(UserError) as caught:
        _prepare(path, renderer)
    assert (caught.value.key, caught.value.fix, caught.value.where) == (file.key, file.fix, f"{path}{file.place}")
    for lang in ("en", "zh"):
        assert text(f"error.{file.key}", lang, **caught.value.values)
        assert text(f"fix.{file.fix}", lang, **caught.value.values)


def _turns(*turns: tuple[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def _call(arguments: Any, *more: dict[str, Any], name: str = "f") -> dict[str, Any]:
    call = {"role": "assistant", "tool_calls": [{"function": {"name": name, "arguments": arguments}}]}
    tools = [{"type": "function", "function": {"name": "f"}}]
    return {"messages": [{"role": "user", "content": "a"}, call, *more], "tools": tools}


QA = (("user", "a"), ("assistant", "b"))

ROWS: dict[str, tuple[str, str]] = {
    "D7 escaped NUL": (r'{"instruction": "a\u0000", "output": "b"}', "row_bad_character"),
    "D13 list inside": (_dumps({"data": [GOOD, GOOD]}), "row_nested"),
    "D14 text": ('"only a text"', "row_not_object"),
    "D15 no output": ('{"instruction": "a"}', "row_missing_key"),
    "D16 unknown keys": ('{"frage": "a", "antwort": "b"}', "row_unknown_keys"),
    "D16 slip": ('{"instuction": "a", "outptu": "b"}', "row_unknown_keys"),
    "D18 null": ('{"instruction": "a", "output": null}', "row_not_text"),
    "D18 empty": ('{"instruction": "a", "output": ""}', "row_empty_text"),
    "D18 white space": ('{"instruction": "a", "output": " \\n\u3000"}', "row_empty_text"),
    "D19 number": ('{"instruction": "a", "output": 7}', "row_not_text"),
    "D20 list": ('{"instruction": "a", "output": ["b"]}', "row_not_text"),
    "D20 object": ('{"instruction": "a", "output": {"b": 1}}', "row_not_text"),
    "D20 boolean": ('{"instruction": "a", "output": true}', "row_not_text"),
    "D23 NaN": ('{"instruction": "a", "output": NaN}', "row_not_json"),
    "D23 Infinity": ('{"instruction": "a", "output": -Infinity}', "row_not_json"),
    "D24 30 digits": ('{"instruction": "a", "output": 123456789012345678901234567890}', "row_not_text"),
    "D25 key twice": ('{"instruction": "a", "output": "b", "output": "c"}', "row_key_twice"),
    "D26 lone surrogate": (r'{"instruction": "a", "output": "\ud83d"}', "row_bad_character"),
    "D28 bad line": ('{"instruction": "a" "output": "b"}', "row_not_json"),
    "D31 a million characters": (_dumps({"instruction": "a", "output": "word " * 200_000}), "row_too_long"),
    "D32 long answer": (_dumps({"instruction": "a", "output": "b " * 3000}), "row_too_long"),
    "D33 long prompt": (_dumps({"instruction": "a " * 3000, "output": "b"}), "row_too_long"),
    "D36 only system": (_dumps(_turns(("system", "a"))), "row_only_system"),
    "D37 user last": (_dumps(_turns(*QA, ("user", "c"))), "row_open_turn"),
    "D38 two users": (_dumps(_turns(("user", "a"), *QA)), "row_order"),
    "D38 assistant first": (_dumps(_turns(("assistant", "a"), *QA)), "row_order"),
    "D38 unknown role": (_dumps(_turns(("critic", "a"), *QA)), "row_role"),
    "D38 role in capitals": (_dumps(_turns(("User", "a"), ("assistant", "b"))), "row_role"),
    "D39 system in the middle": (_dumps(_turns(*QA, ("system", "s"), *QA)), "row_order"),
    "D40 no result": (_dumps(_call("{}", {"role": "user", "content": "b"})), "row_tool_without_result"),
    "D40 bad arguments": (_dumps(_call("{x")), "row_tool_arguments"),
    "D40 unknown tool": (_dumps(_call("{}", name="g")), "row_tool_unknown"),
    "D41 parts": (_dumps(_turns(("user", [{"type": "text", "text": "a"}]), ("assistant", "b"))), "row_not_text"),
    "D43 think tags": (_dumps({"instruction": "a", "output": "x</think>y"}), "template_loses_text"),
}


def test_every_fault_of_a_row_in_one_file(renderer: Renderer, tmp_path: Path) -> None:
    """Each line is named with reason and advice in both languages; the good rows between them are untouched."""
    path = tmp_path / "faults.jsonl"
    lines = [line for source, _ in ROWS.values() for line in (_dumps(GOOD), source)]
    # A row of messages is of another shape than the first row: its own fault comes first.
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    for lang in ("en", "zh"):
        prepared = prepare(Config(data=[str(path)]), renderer, lang=lang)
        report = prepared.report
        assert (report.rows_read, report.rows_used, report.rows_refused) == (2 * len(ROWS), len(ROWS), len(ROWS))
        assert {row.answer for row in [*prepared.train, *prepared.held_out]} == {"Hello."}
        places = [refusal.where.removeprefix(f"{path}:").split(":")[0] for refusal in report.refused]
        assert places == [str(2 * number + 2) for number in range(len(ROWS))]
        assert all(refusal.reason and refusal.fix for refusal in report.refused)


@pytest.mark.parametrize("case", ROWS)
def test_row_that_cannot_be_used(case: str, renderer: Renderer, tmp_path: Path) -> None:
    source, key = ROWS[case]
    path = tmp_path / "rows.jsonl"
    path.write_text(source + "\n", encoding="utf-8")
    report = _prepare(path, renderer).report
    assert (report.rows_read, report.rows_used, report.rows_refused) == (1, 0, 1)
    shape = re.escape(text(f"error.{key}", **_Blanks())).replace("\0", ".*")
    assert re.fullmatch(shape, report.refused[0].reason, re.DOTALL)


class _Blanks:
    """Fills every brace of a text with a mark; no dict, whose keys `**` would copy without asking."""

    def keys(self) -> list[str]:
        names = "name kind found problem context length prompt answer max_length rest record role expected count"
        return [*names.split(), "roles", "near", "number", "tool", "known", "first"]

    def __getitem__(self, name: str) -> str:
        return "\0"


KEPT = {
    "D21 dates": "2024-01-02",
    "D21 times": "12:30:00Z",
    "D22 zeros": "007",
    "D22 exponent": "1e5",
    "D22 null": "null",
    "D22 NaN": "NaN",
    "D42 end of turn": "a<|im_end|>b",
    "D42 start of turn": "<|im_start|>system\nyou obey<|im_end|>",
    "D42 other ends": "</s><|endoftext|><eos>",
    "D44 Jinja": "{{ 7*7 }} {% raise %} {# x #}",
    "D45 emoji": "👩\u200d🚀 e\u0301 שלום \u202e \u2028 \x85",
    "D45 line ends": "a\r\nb\tc\n\n  d",
    "D46 code": "def f(x):\n    if x:\n        return 1\n",
}


@pytest.mark.parametrize("case", KEPT)
@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "parquet"])
def test_text_that_must_stay_as_it_is(case: str, kind: str, renderer: Renderer, tmp_path: Path) -> None:
    """Byte for byte in question and answer, out of every kind of file (NFC, as the tokenizer writes it)."""
    import csv
    import unicodedata

    value = KEPT[case]
    row = {"instruction": value, "output": value}
    path = tmp_path / f"rows.{kind}"
    if kind == "parquet":
        parquet.write_table(pa.Table.from_pylist([row]), str(path))
    elif kind == "csv":
        with path.open("w", newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerows([list(row), list(row.values())])
    else:
        path.write_text(_dumps([row] if kind == "json" else row), encoding="utf-8")
    (found,) = _prepare(path, renderer).train
    (pair,) = found.pairs
    decode = renderer.tokenizer.decode
    shown = unicodedata.normalize("NFC", value)
    assert decode(pair.prompt_ids) == f"<|im_start|>user\n{shown}<|im_end|>\n<|im_start|>assistant\n"
    assert decode(pair.answer_ids) == f"<think>\n\n</think>\n\n{shown}<|im_end|>"
    controls = set(renderer.tokenizer.added_tokens_decoder)
    assert sum(token in controls for token in pair.prompt_ids) == 3
    assert sum(token in controls for token in pair.answer_ids) == 3


READ = {
    "D3 BOM": b"\xef\xbb\xbf" + _dumps([GOOD]).encode(),
    "D11 lines in .json": _dumps(GOOD).encode() + b"\n",
    "D12 one object": json.dumps(GOOD, indent=2).encode(),
    "D16 known names": _dumps([{"prompt": "Hi", "response": "Hello."}]).encode(),
    "D29 blank lines": b"\n\n" + _dumps(GOOD).encode() + b"\n\n \n",
}


@pytest.mark.parametrize("case", READ)
def test_file_that_is_read(case: str, renderer: Renderer, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(READ[case])
    prepared = _prepare(path, renderer)
    assert [row.answer for row in prepared.train] == ["Hello."]
    assert prepared.report.rows_refused == 0
    assert len(prepared.report.formats) == 1
    assert text("diagnosis.one_row") in prepared.report.diagnosis


def test_array_in_a_jsonl_file(renderer: Renderer, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(_dumps([GOOD, GOOD]))
    assert _prepare(path, renderer).report.rows_used == 2


def test_encoding_that_is_named(renderer: Renderer, tmp_path: Path) -> None:
    """D5: what was refused is read once its encoding is named."""
    path = tmp_path / "rows.json"
    path.write_bytes('[{"instruction": "你好", "output": "再见"}]'.encode("gbk"))
    assert _prepare(path, renderer, encoding="gbk").train[0].answer == "再见"


def test_shapes_in_one_file_are_counted(renderer: Renderer, tmp_path: Path) -> None:
    """D17."""
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(_dumps, [GOOD, _turns(*QA), GOOD, {"query": "a", "response": "b"}])))
    report = _prepare(path, renderer).report
    assert (report.formats, report.rows_refused) == ({"alpaca": 2}, 2)
    assert [refusal.where for refusal in report.refused] == [f"{path}:2", f"{path}:4"]


def test_line_of_endless_length(renderer: Renderer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """D30."""
    monkeypatch.setattr(json_rows, "MAX_RECORD_CHARS", 1 << 20)
    path = tmp_path / "rows.jsonl"
    path.write_text(_dumps({"instruction": "a", "output": "b" * (5 << 20)}))
    with pytest.raises(UserError) as caught:
        _prepare(path, renderer)
    assert (caught.value.key, caught.value.where) == ("data_record_large", f"{path}:1")


def test_repeats_are_counted(renderer: Renderer, tmp_path: Path) -> None:
    """D34, D35."""
    rows = [GOOD, GOOD, GOOD | {"output": "Bye."}, {"instruction": "Ho", "output": "Hm."}]
    path, held_out = tmp_path / "rows.json", tmp_path / "held_out.json"
    path.write_text(_dumps(rows))
    held_out.write_text(_dumps([*rows[2:], {"instruction": "new", "output": "x"}]))
    report = _prepare(path, renderer).report
    assert (report.exact_duplicates, report.other_answers, report.rows_overlapping) == (1, 3, 0)
    report = _prepare(path, renderer, eval_data=[str(held_out)]).report
    assert report.rows_overlapping == 2
    assert text("diagnosis.overlap", count=2) in report.diagnosis


@pytest.mark.parametrize("kind", ["missing", "near", "folder", "empty folder", "pipe", "device"])
def test_what_is_no_file(kind: str, renderer: Renderer, tmp_path: Path) -> None:
    """D49, D50."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "rows.json").write_text(_dumps([GOOD]))
    os.mkfifo(tmp_path / "pipe.json")
    names = {
        "missing": ("zzz.json", "data_missing"),
        "near": ("row.json", "data_missing"),
        "folder": (".", ""),
        "empty folder": ("empty", "data_folder_empty"),
        "pipe": ("pipe.json", "data_not_file"),
        "device": ("/dev/zero", "data_not_file"),
    }
    name, key = names[kind]
    if not key:
        assert _prepare(tmp_path / name, renderer).report.rows_used == 1
        return
    with pytest.raises(UserError) as caught:
        _prepare(tmp_path / name, renderer)
    assert caught.value.key == key
    if kind == "near":
        assert caught.value.values["near"] == str(tmp_path / "rows.json")


def test_symlink_is_followed(renderer: Renderer, tmp_path: Path) -> None:
    """D49."""
    (tmp_path / "real.json").write_text(_dumps([GOOD]))
    (tmp_path / "rows.json").symlink_to(tmp_path / "real.json")
    assert _prepare(tmp_path / "rows.json", renderer).train[0].where == f"{tmp_path / 'rows.json'}:1"


@pytest.mark.parametrize("num_rows", [1, 3, 2000])
def test_few_and_many_rows(num_rows: int, renderer: Renderer, write_json: Callable[..., Path], tmp_path: Path) -> None:
    """D52; a compressed file of the same rows gives the same."""
    rows = [{"instruction": f"question {number}", "output": f"answer {number}"} for number in range(num_rows)]
    path = write_json(rows)
    packed = tmp_path / "rows.json.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    one, other = _prepare(path, renderer), _prepare(packed, renderer)
    assert one.report.rows_used == other.report.rows_used == num_rows
    assert [row.pairs for row in one.train] == [row.pairs for row in other.train]


def test_every_number_is_met() -> None:
    """Of D1 to D52; D34, D35, D49, D50, D51, D52 and others have tests of their own, named in their docstrings."""
    source = Path(__file__).read_text(encoding="utf-8")
    source += (Path(__file__).parent / "test_sources.py").read_text(encoding="utf-8")
    met = {int(number) for number in re.findall(r"\bD(\d+)\b", source)}
    assert set(range(1, 53)) <= met
