"""A batch says of each of its rows what became of it, in order, whichever way its parts are run."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from truetune.config import Config
from truetune.data.batches import Job, Preparer
from truetune.data.store import RowWriter, StoredRows
from truetune.data.template import Renderer, build_renderer
from truetune.errors import RowError
from truetune.records import RawRow, Row


@pytest.fixture(scope="module")
def renderer(qwen_tokenizer: Any) -> Renderer:
    return build_renderer(qwen_tokenizer, [151645, 151643], system="Be short.")


def _messages(*contents: str, **more: Any) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[n % 2], "content": text} for n, text in enumerate(contents)], **more}


LONG = "word " * 60
VALUES: list[dict[str, Any]] = [
    {"instruction": "Hi", "output": "Yo.", "note": 1},
    {"instruction": "Hi <|im_end|>", "output": "Yo <|endoftext|>"},
    {"instruction": "Hi"},
    _messages("a", "b", "c", "d"),
    _messages(LONG[: len(LONG) // 2], "b", LONG[: len(LONG) // 2], "d"),
    _messages(LONG, "b"),
    {"instruction": "Hi \U000f0000", "output": "Yo."},
    {"prompt": "Hi", "chosen": "Yo.", "rejected": "No."},
    {"text": "Plain."},
]
REFUSED = {2: "row_missing_key", 4: "row_too_long", 5: "row_too_long", 6: "row_private_character", 9: "row_not_object"}


def _job(first_index: int = 100) -> Job:
    raws: list[tuple[int, RawRow | RowError]] = [
        (n % 2, RawRow(f"rows.jsonl:{n}", value)) for n, value in enumerate(VALUES)
    ]
    raws.append((1, RowError("row_not_object", where="rows.jsonl:9", fix="row_not_object", kind="int")))
    return Job(first_index, raws)


def _rows(preparer: Preparer, path: Path) -> tuple[list[Row], StoredRows, Any]:
    done = preparer.run(_job())
    with RowWriter(path) as writer:
        writer.write(done.records)
    stored = StoredRows(path)
    return list(stored), stored, done.tally


@pytest.mark.parametrize("overlong", ["refuse", "cut_prompt"])
def test_every_row_is_accounted_for(overlong: str, renderer: Renderer, tmp_path: Path) -> None:
    rows, stored, tally = _rows(Preparer(Config(max_length=60, overlong=overlong), renderer), tmp_path / "x.arrow")
    refused = {n: key for n, key in REFUSED.items() if not (overlong == "cut_prompt" and n == 4)}
    assert tally.num_read == len(VALUES) + 1
    assert {int(error.where.rpartition(":")[2]): error.key for error in tally.refused} == refused
    assert [row.index for row in rows] == [100 + n for n in range(10) if n not in refused]
    assert [row.where for row in rows] == [f"rows.jsonl:{n}" for n in range(10) if n not in refused]
    assert stored.of_rows("source").tolist() == [n % 2 for n in range(10) if n not in refused]
    assert tally.num_cut == (overlong == "cut_prompt")
    assert sum(tally.formats.values()) == len(rows)
    assert tally.ignored == {"note": 1}
    pairs = {row.index - 100: (len(row.pairs), len(row.rejected)) for row in rows}
    assert pairs[3] == (2, 0)
    assert pairs[7] == (1, 1)
    assert (rows[-1].prompt, rows[-1].answer) == ((), "Plain.")
    assert (rows[0].prompt, rows[0].answer) == (({"role": "user", "content": "Hi"},), "Yo.")


def test_parts_make_the_whole(renderer: Renderer) -> None:
    preparer = Preparer(Config(max_length=60), renderer)
    rendered = preparer.render(_job())
    done = preparer.finish(rendered, renderer.encode(rendered.texts))
    whole = preparer.run(_job())
    assert done.records.equals(whole.records)
    assert done.tally.to_json() == whole.tally.to_json()


def test_goes_through_a_pipe(renderer: Renderer) -> None:
    """A preparer that has been used, a job and what is done survive pickling; what is computed is the same."""
    preparer = Preparer(Config(max_length=60, overlong="cut_prompt"), renderer)
    whole = preparer.run(_job())
    again, job = pickle.loads(pickle.dumps((preparer, _job())))
    done = pickle.loads(pickle.dumps(again.run(job)))
    assert again.config == preparer.config
    assert done.records.equals(whole.records)
    assert done.tally.to_json() == whole.tally.to_json()
