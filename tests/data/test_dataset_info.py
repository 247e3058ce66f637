"""dataset_info.json: rows under other names say the same as rows under known ones; what is not there is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from truetune.data.formats import ignored_keys, to_conversation
from truetune.data.sources import find_files, read_rows
from truetune.errors import UserError
from truetune.records import Message, RawRow

TURNS: tuple[Message, ...] = (
    {"role": "system", "content": "S"},
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": "a"},
)
TAGS = {"role_tag": "who", "content_tag": "says", "user_tag": "me", "assistant_tag": "you", "system_tag": "rule"}

DATA_SETS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {"instruction": "q", "output": "a", "system": "S"}),
    "renamed": (
        {"columns": {"prompt": "question", "response": "reply", "system": "rule", "history": "before"}},
        {"question": "q", "reply": "a", "rule": "S", "before": []},
    ),
    "turns": (
        {"formatting": "sharegpt"},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "S"},
    ),
    "tagged": (
        {"formatting": "sharegpt", "columns": {"messages": "talk"}, "tags": TAGS},
        {"talk": [{"who": "rule", "says": "S"}, {"who": "me", "says": "q"}, {"who": "you", "says": "a"}]},
    ),
    "openai": (
        {
            "formatting": "sharegpt",
            "columns": {"messages": "messages"},
            "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
        },
        {"messages": list(TURNS)},
    ),
}


@pytest.fixture
def info(tmp_path: Path) -> Path:
    """A description of all DATA_SETS, each a file of one row, and of one that is on a hub."""
    told: dict[str, Any] = {"elsewhere": {"hf_hub_url": "somebody/rows"}}
    for name, (entry, row) in DATA_SETS.items():
        (tmp_path / f"{name}.json").write_text(json.dumps([row]))
        told[name] = entry | {"file_name": f"{name}.json"}
    path = tmp_path / "dataset_info.json"
    path.write_text(json.dumps(told))
    return path


@pytest.mark.parametrize("name", DATA_SETS)
def test_other_names_say_the_same(name: str, info: Path) -> None:
    (source,) = find_files([f"{info}:{name}"])
    (row,) = read_rows(source)
    assert isinstance(row, RawRow)
    assert row.where == f"{info.parent / name}.json:1"
    assert to_conversation(row).messages == TURNS


def test_preference_in_other_names(info: Path) -> None:
    told = {
        "pairs": {
            "file_name": "p.json",
            "ranking": True,
            "columns": {"prompt": "q", "chosen": "good", "rejected": "bad"},
        }
    }
    info.write_text(json.dumps(told))
    (info.parent / "p.json").write_text(json.dumps([{"q": "hi", "good": "yes", "bad": "no"}]))
    (source,) = find_files([str(info)])
    (row,) = read_rows(source)
    assert isinstance(row, RawRow)
    found = to_conversation(row)
    assert [turns[-1]["content"] for turns in (found.messages, found.rejected)] == ["yes", "no"]


def test_all_files_that_are_there(info: Path) -> None:
    assert [source.path.stem for source in find_files([str(info)])] == list(DATA_SETS)
    # A folder means its files under their own names, and not the description.
    assert [source.names for source in find_files([str(info.parent)])] == [None] * len(DATA_SETS)


@pytest.mark.parametrize(
    ("content", "name", "key"),
    [
        ("[]", None, "data_info"),
        ("{", None, "data_info"),
        ('{"a": 1}', None, "data_info"),
        ("{}", "a", "data_info_name"),
        ('{"a": {"hf_hub_url": "x/y"}}', "a", "data_info_file"),
        ('{"a": {"file_name": "none.json"}}', None, "data_info_file"),
    ],
)
def test_what_is_not_there(content: str, name: str | None, key: str, tmp_path: Path) -> None:
    path = tmp_path / "dataset_info.json"
    path.write_text(content)
    with pytest.raises(UserError) as caught:
        find_files([f"{path}:{name}" if name else str(path)])
    assert caught.value.key == key
    assert caught.value.where.startswith(str(path))


def test_names_that_are_not_mapped_do_not_count(info: Path) -> None:
    """With columns given, a row's own "output" is not its answer, and is noted as unused."""
    info.write_text(json.dumps({"d": {"file_name": "d.json", "columns": {"prompt": "question", "response": "answer"}}}))
    row = {"question": "q", "answer": "right", "output": "wrong", "input": "more"}
    (info.parent / "d.json").write_text(json.dumps([row]))
    (source,) = find_files([str(info)])
    (found,) = read_rows(source)
    assert isinstance(found, RawRow)
    assert [turn["content"] for turn in to_conversation(found).messages] == ["q", "right"]
    assert ignored_keys(found) == {"output (not in columns)", "input (not in columns)"}
