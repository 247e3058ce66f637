"""Steps out of a stream: every row once an epoch, shuffled within its block, and the same from any position."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from truetune.config import Config
from truetune.data import crew
from truetune.data.batches import Preparer
from truetune.data.feed import Feed
from truetune.data.sources import Source
from truetune.data.stream import open_stream
from truetune.data.template import Renderer, build_renderer
from truetune.errors import RowError, UserError, UserErrors
from truetune.records import Row

NUM_ROWS, BLOCK_ROWS = 53, 10


@pytest.fixture(scope="module")
def renderer(qwen_tokenizer: Any) -> Renderer:
    """How Qwen3 is asked."""
    return build_renderer(qwen_tokenizer, [151645])


@pytest.fixture
def make(tmp_path: Path, renderer: Renderer) -> Callable[..., Feed]:
    """Make a feed of two files; `bad`: numbers of rows without an answer."""

    def build(*, bad: tuple[int, ...] = (), block_rows: int = BLOCK_ROWS, **keys: Any) -> Feed:
        paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
        rows = [{"instruction": f"What is {n}?", "output": "" if n in bad else f"It is {n}."} for n in range(NUM_ROWS)]
        for path, some in zip(paths, (rows[:20], rows[20:]), strict=True):
            content = "".join(json.dumps(row) + "\n" for row in some)
            if not path.exists() or path.read_text() != content:
                path.write_text(content)
        config = Config(streaming=True, max_steps=99, shuffle_rows=block_rows, **keys)
        stream = open_stream(
            [Source(path) for path in paths], encoding="utf-8", seed=config.seed, block_rows=block_rows
        )
        return Feed(stream, Preparer(config, renderer))

    return build


def taken(feed: Feed, count: int, *, start: int = 0, batch_size: int = 4) -> list[tuple[float, list[Row]]]:
    """Some steps."""
    with closing(feed.steps(start, batch_size=batch_size)) as steps:
        return list(islice(steps, count))


def numbers(steps: list[tuple[float, list[Row]]]) -> list[int]:
    """The numbers of their rows in the run."""
    return [row.index for _, rows in steps for row in rows]


def test_every_row_comes_once_an_epoch_in_full_steps(make: Callable[..., Feed]) -> None:
    steps = taken(make(), 40)
    assert {len(rows) for _, rows in steps} == {4}
    found = numbers(steps)
    for epoch in range(3):
        some = found[epoch * NUM_ROWS : (epoch + 1) * NUM_ROWS]
        assert sorted(some) == list(range(epoch * NUM_ROWS, (epoch + 1) * NUM_ROWS))
    # Shuffled within blocks and not beyond; otherwise in each epoch.
    firsts, seconds = found[:BLOCK_ROWS], found[NUM_ROWS : NUM_ROWS + BLOCK_ROWS]
    assert sorted(firsts) == list(range(BLOCK_ROWS))
    assert firsts != sorted(firsts)
    assert [number - NUM_ROWS for number in seconds] != firsts
    assert numbers(taken(make(seed=7), 40)) != found
    epochs = [epoch for epoch, _ in steps]
    assert epochs == sorted(epochs)
    assert epochs[-1] == pytest.approx(160 / NUM_ROWS, abs=0.05)


def test_a_row_leads_back_to_its_line(make: Callable[..., Feed]) -> None:
    steps = taken(make(), 26)
    for _, rows in steps:
        for row in rows:
            name, _, line = row.where.rpartition(":")
            text = Path(name).read_text().splitlines()[int(line) - 1]
            assert json.loads(text)["output"] == row.answer
    assert len(numbers(steps)) == 104


def test_the_same_pairs_as_prepared(make: Callable[..., Feed], renderer: Renderer, tmp_path: Path) -> None:
    """Row for row what `prepare` makes of the same files."""
    from truetune.data.prepare import prepare

    steps = taken(make(), 13)
    config = Config(data=[str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")], eval_split=0)
    prepared = {row.index: row for row in prepare(config, renderer).train}
    rows = [row for _, rows in steps for row in rows]
    assert rows == [prepared[row.index] for row in rows]
    assert len(rows) == 52


@pytest.mark.parametrize("batch_size", [1, 4, 7, 64])
def test_from_any_position_the_same_steps_follow(batch_size: int, make: Callable[..., Feed]) -> None:
    count = 200 // batch_size
    feed = make()
    whole, positions = [], [feed.position_at(0)]
    with closing(feed.steps(0, batch_size=batch_size)) as steps:
        for number, step in enumerate(islice(steps, count), start=1):
            whole.append(step)
            positions.append(json.loads(json.dumps(feed.position_at(number))))
    for start in range(0, count, max(count // 15, 1)):
        again = make()
        again.go_to(positions[start])
        some = min(3, count - start)
        assert taken(again, some, start=start, batch_size=batch_size) == whole[start : start + some]
        # And resumed twice.
        position = again.position_at(min(start + 2, count))
        if start + 2 <= count:
            assert position == positions[start + 2]
    assert len({json.dumps(position) for position in positions}) == count + 1


def test_helpers_change_nothing(make: Callable[..., Feed], monkeypatch: pytest.MonkeyPatch) -> None:
    alone = taken(make(block_rows=600), 20)
    monkeypatch.setattr(crew, "MIN_HELPED_BYTES", 0)
    monkeypatch.setattr(crew, "_num_cores", lambda: 3)
    monkeypatch.setattr("truetune.data.feed.BATCH_ROWS", 7)
    assert taken(make(block_rows=600), 20) == alone


def test_rows_of_the_held_out_prompts_are_left_out(make: Callable[..., Feed]) -> None:
    feed = make()
    [block] = islice(feed._blocks(feed._start[0], threading.Event()), 1)
    hashes = block.rows.of_rows("prompt_hash")[:3]
    apart = {row.index for row in block.rows[:3]}
    told: list[RowError] = []
    own = frozenset({block.rows[0].where})
    apart_feed = replace(feed, kept_apart=frozenset(hashes.tolist()), held_out=own)
    apart_feed.on_left_out = lambda _, rows: told.extend(rows)
    found = numbers(taken(apart_feed, 25))
    # The held-out row itself is known; the other two are told in each epoch.
    assert {row.where for row in told} == {row.where for row in block.rows[1:3]}
    assert {row.key for row in told} == {"row_apart"}
    assert len(apart) == 3
    assert not apart & {number % NUM_ROWS for number in found}
    assert set(found[:50]) == set(range(NUM_ROWS)) - apart


def test_a_refused_row_ends_the_run_when_its_block_begins(make: Callable[..., Feed]) -> None:
    told: list[tuple[int, list[RowError]]] = []
    feed = make(bad=(25, 27))
    feed.on_left_out = lambda step, rows: told.append((step, rows))
    steps = feed.steps(0, batch_size=4)
    assert len(list(islice(steps, 5))) == 5
    with pytest.raises(UserErrors) as caught:
        next(steps)
    assert [error.where.rpartition("/")[2] for error in caught.value.errors] == ["b.jsonl:6", "b.jsonl:8", "step 6"]
    assert [(step, len(rows)) for step, rows in told] == [(6, 2)]


def test_refused_rows_may_be_skipped_and_are_told_once(make: Callable[..., Feed]) -> None:
    told: list[int] = []
    feed = make(bad=(3, 25, 27), invalid="skip")
    feed.on_left_out = lambda step, rows: told.append(step)
    found = numbers(taken(feed, 12))
    assert not {3, 25, 27} & set(found)
    assert told == [1, 5]
    # Resumed inside a block, what is refused of it was told before.
    again = make(bad=(3, 25, 27), invalid="skip")
    again.go_to(feed.position_at(6))
    again.on_left_out = lambda step, rows: told.append(step)
    assert numbers(taken(again, 4, start=6)) == found[24:40]
    assert told == [1, 5]


def test_a_stream_of_nothing_usable_ends(make: Callable[..., Feed]) -> None:
    with pytest.raises(UserError, match="no row"):
        taken(make(bad=tuple(range(NUM_ROWS)), invalid="skip"), 1)


def test_other_files_are_not_gone_on_with(make: Callable[..., Feed], tmp_path: Path) -> None:
    position = make().position_at(0)
    path = tmp_path / "b.jsonl"
    path.write_text(path.read_text() + "\n")
    feed = Feed(
        open_stream([Source(tmp_path / "a.jsonl"), Source(path)], encoding="utf-8", seed=42, block_rows=BLOCK_ROWS),
        make().preparer,
    )
    feed.stream.files[0].path.touch()
    with pytest.raises(UserError, match="others now"):
        feed.go_to(position | {"files": "x"})


def test_a_token_beyond_the_model_is_refused(make: Callable[..., Feed]) -> None:
    feed = make()
    feed.num_ids = 100
    with pytest.raises(UserError, match="100"):
        taken(feed, 1)


def test_the_first_rows_are_those_of_the_first_steps(make: Callable[..., Feed]) -> None:
    feed = make()
    trained = [row for _, rows in taken(feed, 6) for row in rows]
    assert feed.first(10, batch_size=4) == trained[:10]
    assert feed.first(24, batch_size=4) == trained
    resumed = make()
    resumed.go_to(feed.position_at(3))
    taken(resumed, 2, start=3)
    assert resumed.first(10, batch_size=4) == trained[:10]


def test_leaving_early_gives_up_what_is_prepared_ahead(
    make: Callable[..., Feed], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that Ctrl-C does not wait for the rest of a large block."""
    monkeypatch.setattr("truetune.data.feed.BATCH_ROWS", 1)
    real, ahead = Preparer.render, list[int]()

    def slow(self: Preparer, job: Any) -> Any:
        if job.first_index >= BLOCK_ROWS:
            ahead.append(job.first_index)
            time.sleep(0.05)
        return real(self, job)

    monkeypatch.setattr(Preparer, "render", slow)
    assert len(taken(make(), 1)) == 1
    assert len(ahead) < BLOCK_ROWS - 1


def test_a_bug_in_the_thread_comes_through(make: Callable[..., Feed], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(Preparer, "render", broken)
    with pytest.raises(ZeroDivisionError):
        taken(make(), 1)
