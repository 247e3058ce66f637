"""Before step 1 of a stream: the first rows, looked at as if they were all, in a time that the rest does not change."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from truetune.config import Config
from truetune.data.head import HEAD_ROWS, prepare_stream
from truetune.data.prepare import prepare
from truetune.data.template import Renderer, build_renderer
from truetune.errors import UserError
from truetune.messages import text


@pytest.fixture(scope="module")
def renderer(qwen_tokenizer: Any) -> Renderer:
    """How Qwen3 is asked."""
    return build_renderer(qwen_tokenizer, [151645])


def write(path: Path, count: int, *, start: int = 0) -> Path:
    """Rows with a prompt each."""
    with path.open("w") as file:
        for n in range(start, start + count):
            file.write(json.dumps({"instruction": f"What is {n}?", "output": f"It is {n}."}) + "\n")
    return path


def config(path: Path, **keys: Any) -> Config:
    """A streamed run's keys."""
    return Config(**{"data": [str(path)], "streaming": True, "max_steps": 7, "batch_size": 4, **keys})


def test_of_few_rows_it_says_what_preparing_says(renderer: Renderer, tmp_path: Path) -> None:
    """The same rows on the same sides, the same report but for the steps and one note."""
    path = write(tmp_path / "a.jsonl", 100)
    streamed = prepare_stream(config(path), renderer)
    whole = prepare(config(path, streaming=False), renderer)
    assert list(streamed.train) == list(whole.train)
    assert list(streamed.held_out) == list(whole.held_out)
    assert len(streamed.held_out) == 8
    assert streamed.report.notes[0] == text("note.streaming", rows=100, buffer=10_000)
    assert streamed.report.steps == whole.report.steps == 7
    for name, value in vars(whole.report).items():
        if name != "notes":
            assert getattr(streamed.report, name) == value
    assert streamed.feed is not None
    assert streamed.to_train is streamed.feed
    assert whole.to_train is whole.train


def test_no_held_out_prompt_is_trained(renderer: Renderer, tmp_path: Path) -> None:
    """A prompt that is held out stays so wherever it stands again: in the part that nobody looked at first, too."""
    path = write(tmp_path / "a.jsonl", 200)
    path.write_text(path.read_text() * 3)
    prepared = prepare_stream(config(path, shuffle_rows=64), renderer)
    assert prepared.feed is not None
    held = {row.prompt[-1]["content"] for row in prepared.held_out}
    rows = [row for _, some in zip(range(100), prepared.feed.steps(0, batch_size=4), strict=False) for row in some[1]]
    assert len(held) >= 8
    assert not held & {row.prompt[-1]["content"] for row in rows}
    assert len(rows) == 400


def test_rows_to_evaluate_on_may_be_given(renderer: Renderer, tmp_path: Path) -> None:
    path, held = write(tmp_path / "a.jsonl", 50), write(tmp_path / "b.jsonl", 9, start=500)
    prepared = prepare_stream(config(path, eval_data=[str(held)], eval_split=0), renderer)
    assert [row.where for row in prepared.held_out] == [f"{held}:{line}" for line in range(1, 10)]
    assert (len(prepared.train), prepared.report.rows_held_out) == (50, 9)
    assert prepared.feed is not None
    assert prepared.feed.kept_apart == frozenset()
    assert prepared.report.exact_duplicates == 0
    numbers = [row.index for row in (*prepared.train, *prepared.held_out)]
    assert numbers == list(range(59))


def test_a_held_out_row_that_is_trained_is_one_that_repeats(renderer: Renderer, tmp_path: Path) -> None:
    """Of rows that are given to evaluate on, too; what is said is what preparing says."""
    path, held = write(tmp_path / "a.jsonl", 50), write(tmp_path / "b.jsonl", 9, start=45)
    given = {"eval_data": [str(held)], "eval_split": 0}
    streamed, whole = (
        prepare_stream(config(path, **given), renderer),
        prepare(config(path, streaming=False, **given), renderer),
    )
    for prepared in (streamed, whole):
        assert prepared.report.exact_duplicates == 5
        assert [(group.where, group.others) for group in prepared.duplicates()] == [
            (f"{path}:{line}", (f"{held}:{line - 45}",)) for line in range(46, 51)
        ]
    assert [row.index for row in streamed.held_out] == [row.index for row in whole.held_out]


def test_pieces_of_texts_have_numbers_of_their_own(renderer: Renderer, tmp_path: Path) -> None:
    """A text that becomes several rows moves the numbers of all behind it, in the next batch, too."""
    path = tmp_path / "a.jsonl"
    texts = [f"{n} " + "and one more word " * (40 if n % 50 == 0 else 1) for n in range(600)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    keys = {"max_length": 64, "eval_split": 0}
    streamed, whole = (
        prepare_stream(config(path, **keys), renderer),
        prepare(config(path, streaming=False, **keys), renderer),
    )
    assert len(whole.train) > 620
    assert list(streamed.train) == list(whole.train)
    assert streamed.feed is not None
    (_, rows) = next(streamed.feed.steps(0, batch_size=len(whole.train)))
    assert sorted(row.index for row in rows) == list(range(len(whole.train)))


def test_rejected_answers_count_where_they_are_learned(renderer: Renderer, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [
        {"prompt": f"What is {n}?", "chosen": f"It is {n}.", "rejected": "No idea at all, I am afraid."}
        for n in range(60)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = {"loss": "dpo", "eval_split": 0}
    streamed, whole = (
        prepare_stream(config(path, **keys), renderer),
        prepare(config(path, streaming=False, **keys), renderer),
    )
    assert streamed.report.total_tokens == whole.report.total_tokens
    assert streamed.train.lengths(0, 1).tolist() == whole.train.lengths(0, 1).tolist()
    assert len(streamed.train.lengths(0, 1)) == 120


def test_the_time_to_begin_does_not_depend_on_the_length(renderer: Renderer, tmp_path: Path) -> None:
    seconds = {}
    for factor in (1, 20):
        path = write(tmp_path / f"{factor}.jsonl", factor * (HEAD_ROWS + 1000))
        seen: list[int] = []
        began = time.process_time()
        prepared = prepare_stream(config(path, shuffle_rows=512), renderer, on_progress=seen.append)
        assert prepared.feed is not None
        next(prepared.feed.steps(0, batch_size=4))
        seconds[factor] = time.process_time() - began
        assert (seen[-1], prepared.report.rows_read) == (HEAD_ROWS, HEAD_ROWS)
    assert seconds[20] < 2.5 * seconds[1] + 0.2


def test_what_the_data_are_follows_from_files_and_held_out_rows(renderer: Renderer, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", 100)
    first = prepare_stream(config(path), renderer).data_hash
    assert prepare_stream(config(path), renderer).data_hash == first
    assert prepare_stream(config(path, seed=1), renderer).data_hash != first
    path.write_text(path.read_text() + " ")
    assert prepare_stream(config(path), renderer).data_hash != first


def test_a_hub_id_is_downloaded_and_streamed(
    renderer: Renderer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, start in (("train-0.jsonl", 0), ("train-1.jsonl", 50), ("test.jsonl", 100)):
        write(tmp_path / name, 50, start=start)
    monkeypatch.setattr("truetune.data.sources.fetch", lambda name, **_: tmp_path if name == "org/rows" else None)
    prepared = prepare_stream(config(tmp_path, data=["org/rows"], eval_split=0), renderer)
    assert prepared.feed is not None
    rows = [row for _, some in zip(range(25), prepared.feed.steps(0, batch_size=4), strict=False) for row in some[1]]
    assert {row.where.rpartition(":")[0].rpartition("/")[2] for row in rows} == {"train-0.jsonl", "train-1.jsonl"}
    assert len({row.where for row in rows}) == 100


def test_an_empty_stream_is_refused(renderer: Renderer, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("")
    with pytest.raises(UserError, match="empty"):
        prepare_stream(config(path), renderer)
