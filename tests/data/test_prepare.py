"""From files to what is trained: every row is accounted for, and the report's numbers are those of a second count."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from truetune.config import Config
from truetune.data import prepare as prepare_module
from truetune.data.prepare import (
    MAX_HELD_OUT,
    MIN_HELD_OUT,
    MIN_ROWS_TO_HOLD_OUT,
    Prepared,
    hash_files,
    prepare,
    split,
)
from truetune.data.report import num_steps
from truetune.data.template import Renderer, build_renderer
from truetune.engine.order import batches
from truetune.engine.trie import count_trie_tokens
from truetune.errors import UserError
from truetune.messages import text
from truetune.records import Conversation, Pair, Row

STOP = "<|im_end|>"


@pytest.fixture(scope="module")
def renderer(qwen_tokenizer: Any) -> Renderer:
    """The renderer of the real Qwen3 tokenizer."""
    return build_renderer(qwen_tokenizer, [151645, 151643])


def _turns(*contents: str, **last: Any) -> dict[str, Any]:
    roles = ("user", "assistant")
    turns: list[dict[str, Any]] = [{"role": roles[n % 2], "content": content} for n, content in enumerate(contents)]
    turns[-1] |= last
    return {"messages": turns}


# --- the real data ---


@pytest.mark.slow
def test_huanhuan(shared: Path, renderer: Renderer) -> None:
    path = shared / "data" / "huanhuan.json"
    rows = json.loads(path.read_text(encoding="utf-8"))
    config = Config(data=[str(path)], per_device_train_batch_size=16, gradient_accumulation_steps=2)
    off = build_renderer(renderer.tokenizer, [151645, 151643], template_kwargs={"enable_thinking": False})
    prepared, without = prepare(config, renderer), prepare(config, off)
    for report in (prepared.report, without.report):
        assert (report.rows_read, report.rows_used, report.rows_refused, report.pairs) == (3729, 3729, 0, 3729)
        assert report.exact_duplicates == 112 == len(rows) - len({json.dumps(row) for row in rows})
        assert report.rows_held_out == len(prepared.held_out) == 186
        assert report.trie_tokens < report.total_tokens
    assert prepared.report.learned_tokens == 96280
    assert without.report.learned_tokens == 81364
    assert 96280 - 81364 == 3729 * 4
    assert prepared.report.learned_template_tokens - without.report.learned_template_tokens == 3729 * 4
    assert without.report.learned_template_tokens == 3729
    answers = renderer.tokenizer([row["output"] for row in rows], add_special_tokens=False)["input_ids"]
    assert without.report.learned_tokens == sum(map(len, answers)) + 3729
    # The empty think block stands in the prompt instead of in the answer.
    assert prepared.report.total_tokens == without.report.total_tokens
    assert prepared.data_hash != without.data_hash
    read = sorted([*prepared.train, *prepared.held_out], key=lambda row: row.index)
    assert [row.answer for row in read] == [row["output"] for row in rows]
    assert len({row.where for row in read}) == 3729
    assert prepared.report.steps == num_steps(config, 3729 - 186) == 333


# --- the report ---

MIXED: list[Any] = [
    {"instruction": "Hi", "output": "Hello."},
    {"instruction": "Hi", "output": "Hello.", "input": ""},
    {"instruction": "Hi", "output": "Good day.", "id": 3},
    {"instruction": "Hi"},
    {"instruction": "Bye", "output": "So long.", "history": [["Hi", "Hello."]]},
    {"instruction": "Bye", "output": "So long.", "history": [["Hi", "Hello."]], "id": 6, "label": "x"},
    17,
    {"instruction": "Count", "output": "one two three four " * 30},
    {"instruction": "你好", "output": "</think>"},
    {"system": "Be brief.", "instruction": "Hi", "output": "Yo.", "label": "y"},
    {"system": "Be brief.", "instruction": "Hi, you", "output": "Yo."},
    {"instruction": "Hi", "output": " "},
]
REFUSED = {
    3: "row_missing_key",
    6: "row_not_object",
    7: "row_too_long",
    8: "template_loses_text",
    11: "row_empty_text",
}

# What the braces of these texts are filled with.
NAMES = ("name", "found", "kind", "length", "prompt", "answer", "max_length", "rest")


def _line(number: int, value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n" * (1 + number % 2)


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """A file of good and bad rows, a blank line behind every second."""
    path = tmp_path / "mixed.jsonl"
    path.write_text("".join(_line(number, value) for number, value in enumerate(MIXED)), encoding="utf-8")
    return path


def _prepare(path: Path, renderer: Renderer, *, lang: str = "en", **config: Any) -> Prepared:
    return prepare(Config(data=[str(path)], **{"max_length": 60, **config}), renderer, lang=lang)


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_rows_add_up(lang: str, mixed: Path, renderer: Renderer) -> None:
    prepared = _prepare(mixed, renderer, lang=lang)
    report = prepared.report
    assert (report.rows_read, report.rows_used, report.rows_refused) == (12, 7, 5)
    assert report.rows_read == report.rows_used + report.rows_refused == len(MIXED)
    used = [*prepared.train, *prepared.held_out]
    assert [row.index for row in used] == [number for number in range(len(MIXED)) if number not in REFUSED]
    lines = {number: 1 + number + number // 2 for number in range(len(MIXED))}
    assert [row.where for row in used] == [f"{mixed}:{lines[row.index]}" for row in used]
    assert [refusal.where for refusal in report.refused] == [f"{mixed}:{lines[number]}" for number in REFUSED]
    for refusal, key in zip(report.refused, REFUSED.values(), strict=True):
        shape = text(f"error.{key}", lang, **dict.fromkeys(NAMES, "\0"))
        assert re.fullmatch(re.escape(shape).replace(re.escape("\0"), ".+"), refusal.reason)
        assert refusal.fix
    assert [json.loads(source) for source in mixed.read_text().split("\n") if source] == MIXED


def test_refusals_are_written_in_the_language(mixed: Path, renderer: Renderer) -> None:
    english, chinese = (_prepare(mixed, renderer, lang=lang).report for lang in ("en", "zh"))
    assert english.refused[0].reason == 'the key "output" is missing (found: instruction)'
    assert english.refused[0].fix == 'Add "output" to this row.'
    assert chinese.refused[0].reason == text("error.row_missing_key", "zh", name="output", found="instruction")
    assert [refusal.where for refusal in english.refused] == [refusal.where for refusal in chinese.refused]


def test_tokens_are_those_of_the_pairs(mixed: Path, renderer: Renderer) -> None:
    prepared = _prepare(mixed, renderer)
    report = prepared.report
    pairs = [pair for row in prepared.train for pair in row.pairs]
    tokenizer = renderer.tokenizer
    assert report.pairs == len(pairs) == 9
    assert report.learned_tokens == sum(len(pair.answer_ids) for pair in pairs)
    assert report.learned_template_tokens == 5 * 9
    assert report.total_tokens == sum(len(pair.prompt_ids) + len(pair.answer_ids) for pair in pairs)
    assert sum(len(pair) for row in prepared.train for pair in row.pairs) == report.total_tokens
    assert sum(len(pair.answer_ids) for row in prepared.train for pair in row.pairs) == report.learned_tokens
    lengths = sorted(map(len, pairs))
    assert report.longest == lengths[-1]
    assert report.quantiles == {f"p{q}": lengths[math.ceil(q / 100 * (len(lengths) - 1))] for q in (50, 90, 99)}
    learned = [tokenizer.decode(pair.answer_ids) for pair in pairs]
    assert learned[:3] == [f"<think>\n\n</think>\n\n{answer}{STOP}" for answer in ("Hello.", "Hello.", "Good day.")]


@pytest.mark.parametrize("num_rows", [1, 2, 10, 11, 31])
def test_quantiles_are_lengths_that_occur(num_rows: int, write_json: Callable[..., Path], renderer: Renderer) -> None:
    path = write_json([{"instruction": "a", "output": "x " * number} for number in range(num_rows, 0, -1)])
    prepared = prepare(Config(data=[str(path)]), renderer)
    lengths = sorted(len(pair) for row in prepared.train for pair in row.pairs)
    assert len(set(lengths)) == num_rows
    for quantile in (50, 90, 99):
        length = prepared.report.quantiles[f"p{quantile}"]
        # The shortest length that at most the rest of the other rows exceeds.
        num_longer = sum(other > length for other in lengths)
        assert num_longer == (num_rows - 1) * (100 - quantile) // 100
    assert prepared.report.longest == lengths[-1]


def test_last_turn_only(mixed: Path, renderer: Renderer) -> None:
    everything, last = (_prepare(mixed, renderer, train_on=train_on) for train_on in ("all_turns", "last_turn"))
    assert (everything.report.pairs, last.report.pairs) == (9, 7)
    assert [row.pairs for row in last.train] == [row.pairs[-1:] for row in everything.train]
    assert len(last.train) == 7


def test_prompt_and_answer_of_a_row(mixed: Path, renderer: Renderer) -> None:
    """What is kept to be asked again renders to the prompt that is trained."""
    rows = _prepare(mixed, renderer).train
    assert [row.answer for row in rows] == ["Hello.", "Hello.", "Good day.", "So long.", "So long.", "Yo.", "Yo."]
    assert [tuple(renderer.prompt_ids(row.prompt)) for row in rows] == [row.pairs[-1].prompt_ids for row in rows]


def test_exact_duplicates(mixed: Path, renderer: Renderer) -> None:
    prepared = _prepare(mixed, renderer)
    assert prepared.report.exact_duplicates == len(prepared.train) - len({row.pairs for row in prepared.train}) == 2
    assert text("diagnosis.duplicates", count=2) in prepared.report.diagnosis


def test_notes_for_ignored_keys(mixed: Path, renderer: Renderer) -> None:
    notes = _prepare(mixed, renderer).report.notes
    counts = {key: sum(key in value for value in MIXED if isinstance(value, dict)) for key in ("id", "label")}
    assert counts == {"id": 2, "label": 2}
    assert sorted(notes) == sorted(text("note.ignored_key", name=name, count=count) for name, count in counts.items())


def test_note_for_a_template_without_stop_token(
    mixed: Path, renderer: Renderer, small_tokenizer: Callable[..., Any]
) -> None:
    template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    tokenizer = small_tokenizer(template + "{% if add_generation_prompt %}[assistant]{% endif %}")
    note = text("note.appends_stop")
    assert note in _prepare(mixed, build_renderer(tokenizer, [])).report.notes
    assert note not in _prepare(mixed, renderer).report.notes


def _num_prefixes(prepared: Prepared, batch_size: int) -> int:
    """Distinct prefixes of each step of the first epoch and of the held-out rows, by writing out every one."""
    taken = itertools.islice(batches(len(prepared.train), batch_size, seed=42), -(-len(prepared.train) // batch_size))
    steps = [[prepared.train[number] for number in numbers] for _, numbers in taken]
    total = 0
    for rows in [*steps, prepared.held_out]:
        sequences = [pair.prompt_ids + pair.answer_ids for row in rows for pair in row.pairs]
        total += len({ids[:length] for ids in sequences for length in range(1, len(ids) + 1)})
    return total


def test_trie_tokens(mixed: Path, renderer: Renderer) -> None:
    counted = {}
    for batch_size in (1, 2, 3, 5, 7, 16):
        prepared = _prepare(mixed, renderer, batch_size=batch_size)
        counted[batch_size] = prepared.report.trie_tokens
        assert prepared.report.trie_tokens == _num_prefixes(prepared, batch_size)
        assert prepared.report.trie_tokens < prepared.report.total_tokens
    assert len(set(counted.values())) >= 4
    assert max(counted.values()) == counted[1]
    assert min(counted.values()) == counted[7] == counted[16]


def test_trie_tokens_of_rows_held_out(
    rows: list[dict[str, str]], write_json: Callable[..., Path], renderer: Renderer
) -> None:
    prepared = prepare(Config(data=[str(write_json(rows))]), renderer)
    assert (len(prepared.train), len(prepared.held_out)) == (32, 8)
    assert prepared.report.trie_tokens == _num_prefixes(prepared, 16)


def test_nothing_usable(write_json: Callable[..., Path], renderer: Renderer) -> None:
    report = _prepare(write_json([{"a": 1}, {"b": 2}]), renderer).report
    assert (report.rows_read, report.rows_used, report.rows_refused) == (2, 0, 2)
    assert (report.pairs, report.total_tokens, report.trie_tokens, report.longest, report.steps) == (0, 0, 0, 0, 0)


def test_file_that_cannot_be_read(write_json: Callable[..., Path], renderer: Renderer) -> None:
    path = write_json('[{"instruction": "a", "output": "b"},\n]')
    with pytest.raises(UserError) as caught:
        _prepare(path, renderer)
    assert (caught.value.key, caught.value.where) == ("data_not_json", f"{path}:2:1")


def test_eval_data_is_held_out_whole(
    rows: list[dict[str, str]], write_json: Callable[..., Path], renderer: Renderer
) -> None:
    train, held_out = write_json(rows, "train.json"), write_json([*rows[:3], {"x": 1}], "held_out.json")
    prepared = prepare(Config(data=[str(train)], eval_data=[str(held_out)]), renderer)
    assert (len(prepared.train), len(prepared.held_out)) == (40, 3)
    assert {row.where.rpartition(":")[0] for row in prepared.train} == {str(train)}
    assert {row.where.rpartition(":")[0] for row in prepared.held_out} == {str(held_out)}
    report = prepared.report
    assert (report.rows_read, report.rows_used, report.rows_refused, report.rows_held_out) == (44, 43, 1, 3)
    assert report.steps == num_steps(Config(), 40)
    # The same rows, all of them trained, are other data: what is computed differs.
    assert prepared.data_hash != prepare(Config(data=[str(train), str(held_out)], eval_split=0), renderer).data_hash
    indices = [row.index for row in [*prepared.train, *prepared.held_out]]
    assert len(set(indices)) == 43


def test_several_files_are_one_data_set(
    rows: list[dict[str, str]], write_json: Callable[..., Path], renderer: Renderer
) -> None:
    whole = write_json(rows, "whole.json")
    parts = [write_json(rows[:15], "part1.json"), write_json(rows[15:], "part2.json")]
    one, two = (prepare(Config(data=[str(file) for file in files]), renderer) for files in ([whole], parts))
    assert [(row.index, row.pairs) for row in one.train] == [(row.index, row.pairs) for row in two.train]
    assert [(row.index, row.pairs) for row in one.held_out] == [(row.index, row.pairs) for row in two.held_out]
    assert one.report == two.report


def test_config_reaches_the_rows(write_json: Callable[..., Path], renderer: Renderer) -> None:
    path = write_json([{"instruction": "a", "input": "b", "output": "c"}])
    prompts = [
        renderer.tokenizer.decode(_prepare(path, renderer, input_join=join).train[0].pairs[0].prompt_ids)
        for join in ("\n", " and ")
    ]
    assert prompts == [f"<|im_start|>user\n{text}{STOP}\n<|im_start|>assistant\n" for text in ("a\nb", "a and b")]
    limit = len(_prepare(path, renderer).train[0].pairs[0])
    used = [
        prepare(Config(data=[str(path)], max_length=max_length), renderer).report.rows_used
        for max_length in (limit - 1, limit)
    ]
    assert used == [0, 1]


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({}, {"few_steps"}),
        ({"num_train_epochs": 15}, set()),
        ({"num_train_epochs": 14}, {"few_steps"}),
        ({"num_train_epochs": 15, "learning_rate": 2e-5}, set()),
        ({"num_train_epochs": 15, "learning_rate": 1e-5}, {"learning_rate"}),
        ({"num_train_epochs": 15, "learning_rate": 0.01}, {"learning_rate"}),
        ({"num_train_epochs": 15, "eval_split": 0}, {"no_held_out"}),
        ({"max_steps": 5, "eval_split": 0}, {"few_steps", "no_held_out"}),
    ],
)
def test_diagnosis(
    config: dict[str, Any],
    found: set[str],
    rows: list[dict[str, str]],
    write_json: Callable[..., Path],
    renderer: Renderer,
) -> None:
    # Without the empty think block, which would be much of such short answers.
    off = build_renderer(renderer.tokenizer, [151645, 151643], template_kwargs={"enable_thinking": False})
    report = prepare(Config(data=[str(write_json(rows))], **config), off).report
    values = {"steps": report.steps, "rate": Config(**config).learning_rate, "count": 0}
    keys = ("few_steps", "learning_rate", "duplicates", "no_held_out")
    assert {key for key in keys if text(f"diagnosis.{key}", **values) in report.diagnosis} == found
    assert len(report.diagnosis) == len(found)


# --- what is held out ---


@pytest.mark.parametrize(
    ("num_rows", "fraction", "num_held_out"),
    [
        (0, 0.05, 0),
        (8, 0.5, 0),
        (31, 0.05, 0),
        (31, 0.9, 0),
        (32, 0.05, 8),
        (32, 0.001, 8),
        (100, 0.05, 8),
        (160, 0.05, 8),
        (200, 0.05, 10),
        (1000, 0.05, 50),
        (1000, 0, 0),
        (3729, 0.05, 186),
        (9999, 0.05, 500),
        (12000, 0.05, 500),
        (12000, 0.001, 12),
    ],
)
def test_how_many_are_held_out(num_rows: int, fraction: float, num_held_out: int) -> None:
    is_held_out = split(np.arange(num_rows, dtype=np.uint64), fraction=fraction, seed=42)
    assert (len(is_held_out), int(is_held_out.sum())) == (num_rows, num_held_out)
    assert not num_held_out or MIN_HELD_OUT <= num_held_out <= MAX_HELD_OUT
    assert not num_held_out or num_rows >= MIN_ROWS_TO_HOLD_OUT


@settings(max_examples=30, deadline=None)
@given(prompts=st.lists(st.integers(0, 30), min_size=32, max_size=120), seed=st.integers(0, 2**32))
def test_split_keeps_same_prompts_together(prompts: list[int], seed: int) -> None:
    hashes = np.array(prompts, np.uint64)
    is_held_out = split(hashes, fraction=0.1, seed=seed)
    assert not set(hashes[is_held_out].tolist()) & set(hashes[~is_held_out].tolist())
    assert is_held_out.sum() <= max(round(0.1 * len(prompts)), MIN_HELD_OUT)


def test_split_holds_out_whole_groups_to_the_wanted_number() -> None:
    prompts = np.arange(200) // 2
    is_held_out = split(prompts, fraction=0.1, seed=1)
    assert is_held_out.sum() == 20
    assert len(set(prompts[is_held_out].tolist())) == 10


def test_split_is_a_function_of_the_seed() -> None:
    prompts = np.arange(200)
    chosen = [tuple(np.flatnonzero(split(prompts, fraction=0.05, seed=seed))) for seed in (*range(20), *range(20))]
    assert chosen[:20] == chosen[20:]
    assert len(set(chosen)) == 20
    # Ten of 200 rows, twenty times: every row has the same chance, so no place in the file is spared.
    assert {index // 50 for indices in chosen for index in indices} == {0, 1, 2, 3}


def test_split_by_config(rows: list[dict[str, str]], write_json: Callable[..., Path], renderer: Renderer) -> None:
    path = str(write_json(rows))
    first, again, other, none = (
        prepare(Config(data=[path], **config), renderer)
        for config in ({"seed": 1}, {"seed": 1}, {"seed": 2}, {"eval_split": 0})
    )
    assert list(first.train) == list(again.train)
    assert list(first.held_out) == list(again.held_out)
    assert first.data_hash == again.data_hash
    assert list(first.held_out) != list(other.held_out)
    assert (len(first.held_out), len(none.held_out), len(none.train)) == (8, 0, 40)
    assert first.report.rows_held_out == 8
    assert sorted([*first.train, *first.held_out], key=lambda row: row.index) == list(none.train)


# --- steps ---


@pytest.mark.parametrize(
    ("num_rows", "config", "steps"),
    [
        (3729, {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 2}, 351),
        (3729, {"batch_size": 32}, 351),
        (3729, {}, 702),
        (3729, {"per_device_train_batch_size": 4}, 2799),
        (3729, {"gradient_accumulation_steps": 8}, 1401),
        (3729, {"batch_size": 32, "max_steps": 100}, 100),
        (3729, {"batch_size": 32, "max_steps": 351}, 351),
        (3729, {"batch_size": 32, "max_steps": 1000}, 351),
        (32, {"num_train_epochs": 1}, 2),
        (33, {"num_train_epochs": 1}, 3),
        (1, {"num_train_epochs": 1}, 1),
        (160, {"num_train_epochs": 0.5}, 5),
        (160, {"num_train_epochs": 0.51}, 6),
        (1, {"num_train_epochs": 0.01}, 1),
        (0, {}, 0),
        (0, {"max_steps": 5}, 0),
    ],
)
def test_num_steps(num_rows: int, config: dict[str, Any], steps: int) -> None:
    assert num_steps(Config(**config), num_rows) == steps


def test_num_steps_counts_the_batches_of_an_epoch() -> None:
    num_compared = 0
    for num_rows in range(1, 40):
        for batch_size in (1, 3, 16):
            for epochs in (1, 2, 5):
                batches = [start for _ in range(epochs) for start in range(0, num_rows, batch_size)]
                assert num_steps(Config(batch_size=batch_size, num_train_epochs=epochs), num_rows) == len(batches)
                num_compared += 1
    assert num_compared == 39 * 9


# --- files ---


def test_hash_files(tmp_path: Path) -> None:
    first, second, copy = (tmp_path / name for name in ("first", "second", "copy"))
    first.write_bytes(b"one two")
    second.write_bytes(b"three")
    copy.write_bytes(b"one two")
    assert hash_files([first]) == hash_files([copy])
    hashes = [hash_files(files) for files in ([], [first], [second], [first, second], [second, first], [first, first])]
    first.write_bytes(b"one twp")
    hashes += [hash_files([first]), hash_files([first, second])]
    # The same bytes, cut in another place.
    first.write_bytes(b"one twot")
    second.write_bytes(b"hree")
    hashes.append(hash_files([first, second]))
    assert len(set(hashes)) == len(hashes) == 9


def test_data_hash_follows_the_file(mixed: Path, renderer: Renderer) -> None:
    """White space changes nothing that is computed; one letter, another template value or another split does."""
    content = mixed.read_text(encoding="utf-8")
    before = _prepare(mixed, renderer)
    mixed.write_text(content + "\n", encoding="utf-8")
    assert _prepare(mixed, renderer).data_hash == before.data_hash
    output = before.train[0].answer
    mixed.write_text(content.replace(output, output + "!"), encoding="utf-8")
    hashes = {before.data_hash, _prepare(mixed, renderer).data_hash, _prepare(mixed, renderer, max_length=30).data_hash}
    off = build_renderer(renderer.tokenizer, [151645, 151643], template_kwargs={"enable_thinking": False})
    hashes |= {_prepare(mixed, off).data_hash}
    assert len(hashes) == 4


# --- what was prepared before ---


def _count_renders(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    counts: list[int] = []
    render = Renderer.render

    def counted(self: Renderer, conversations: Any, **more: Any) -> Any:
        counts.append(len(conversations))
        return render(self, conversations, **more)

    monkeypatch.setattr(Renderer, "render", counted)
    return counts


def test_prepared_rows_are_used_again(mixed: Path, renderer: Renderer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second time nothing is rendered, and report and rows are the same; in the other language, too."""
    counts = _count_renders(monkeypatch)
    some = build_renderer(renderer.tokenizer, [151645, 151643], system="once")
    first = _prepare(mixed, some)
    assert sum(counts) == 9
    again = _prepare(mixed, some, lang="en")
    chinese = _prepare(mixed, some, lang="zh")
    assert sum(counts) == 9
    assert list(first.train) == list(again.train)
    assert (first.report, first.data_hash) == (again.report, again.data_hash)
    assert [row.where for row in chinese.report.refused] == [row.where for row in first.report.refused]
    assert chinese.report.refused[0].reason != first.report.refused[0].reason


def test_what_matters_is_rendered_again(mixed: Path, renderer: Renderer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data, keys and template: each of them changed makes prepared rows of before useless."""
    counts = _count_renders(monkeypatch)

    def other(**more: Any) -> Renderer:
        return build_renderer(renderer.tokenizer, more.pop("stops", [151645, 151643]), **more)

    off = other(template_kwargs={"enable_thinking": False}, system="a")
    runs: list[tuple[Renderer, dict[str, Any]]] = [(other(system="a"), {}), (other(system="b"), {}), (off, {})]
    runs += [(other(system="a", stops=[151643]), {}), (other(system="a"), {"input_join": "+"})]
    runs += [(other(system="a"), {"train_on": "last_turn"}), (other(system="a"), {"overlong": "cut_prompt"})]
    for some, keys in runs:
        before = len(counts)
        _prepare(mixed, some, **keys)
        assert len(counts) > before, keys
    mixed.write_text(mixed.read_text(encoding="utf-8").replace("Yo.", "Ya."), encoding="utf-8")
    before = len(counts)
    _prepare(mixed, other(system="a"))
    assert len(counts) > before


@pytest.mark.parametrize("size", [1, 3, 512])
def test_batches_change_nothing(size: int, mixed: Path, renderer: Renderer, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = _prepare(mixed, renderer)
    monkeypatch.setattr(prepare_module, "BATCH_ROWS", size)
    monkeypatch.setattr(prepare_module, "STORE_VERSION", -size)
    parts = _prepare(mixed, renderer)
    assert list(parts.train) == list(whole.train)
    assert parts.report == whole.report


def test_progress_counts_the_rows(mixed: Path, renderer: Renderer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_module, "BATCH_ROWS", 2)
    counts: list[int] = []
    some = build_renderer(renderer.tokenizer, [151645, 151643], system="progress")
    prepare(Config(data=[str(mixed)], max_length=60), some, on_progress=counts.append)
    assert counts == sorted(counts)
    assert counts[-1] == 12
    assert len(counts) >= 4


def test_nothing_unfinished_stays(mixed: Path, renderer: Renderer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of a preparation that was interrupted, nor, after a day, of one that was killed."""
    folder = prepare_module.cache_dir() / "prepared"
    some = build_renderer(renderer.tokenizer, [151645, 151643], system="unfinished")
    killed, running = folder / "a.1.unfinished", folder / "b.2.unfinished"
    folder.mkdir(parents=True, exist_ok=True)
    for path in (killed, running):
        path.write_bytes(b"x")
    os.utime(killed, (0, time.time() - prepare_module.UNFINISHED_S - 60))

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(Config(data=[str(mixed)], max_length=60), some, on_progress=interrupt)
    assert set(folder.glob("*.unfinished")) == {killed, running}
    _prepare(mixed, some)
    assert set(folder.glob("*.unfinished")) == {running}
    running.unlink()


# --- shapes and lengths ---


def test_one_file_has_one_shape(write_json: Callable[..., Path], renderer: Renderer) -> None:
    alpaca, turns = {"instruction": "Hi", "output": "Yo."}, _turns("Hi", "Hello.")
    mixed = write_json([alpaca, turns, alpaca, {"text": "x"}, turns], "mixed.json")
    report = _prepare(mixed, renderer).report
    assert (report.rows_used, report.rows_refused, report.formats) == (2, 3, {"alpaca": 2})
    assert report.refused[0].reason == text("error.row_other_shape", found="messages", first="alpaca")
    files = [str(write_json([row] * 2, f"{number}.json")) for number, row in enumerate((alpaca, turns, {"text": "x"}))]
    several = prepare(Config(data=files), renderer).report
    assert (several.rows_used, several.formats) == (6, {"alpaca": 2, "messages": 2, "text": 2})


def test_oldest_turns_are_cut(write_json: Callable[..., Path], renderer: Renderer) -> None:
    """Whole exchanges go, system message and answer stay; each pair is what the shorter conversation gives."""
    turns = [content for number in range(6) for content in (f"question {number} " * 3, f"answer {number}")]
    messages = [{"role": "system", "content": "S"}, *_turns(*turns)["messages"]]
    path = write_json([{"messages": messages}])
    refused = prepare(Config(data=[str(path)], max_length=60), renderer).report
    assert refused.rows_refused == 1
    cut = prepare(Config(data=[str(path)], max_length=60, overlong="cut_prompt"), renderer)
    assert (cut.report.rows_used, cut.report.rows_cut, cut.report.longest <= 60) == (1, 1, True)
    assert text("note.cut", count=1) in cut.report.notes
    (row,) = cut.train
    assert len(row.pairs) == 6
    for number, pair in enumerate(row.pairs):
        kept = [
            start
            for start in range(number + 1)
            if len(_pair_of(renderer, [messages[0], *messages[1 + 2 * start : 3 + 2 * number]])) <= 60
        ]
        assert pair == _pair_of(renderer, [messages[0], *messages[1 + 2 * kept[0] : 3 + 2 * number]])
    too_long = write_json([_turns("a", "b", "c", "long " * 100)], "long.json")
    report = prepare(Config(data=[str(too_long)], max_length=60, overlong="cut_prompt"), renderer).report
    assert (report.rows_used, report.rows_refused) == (0, 1)


def _pair_of(renderer: Renderer, messages: list[dict[str, Any]]) -> Pair:
    return renderer.pairs(Conversation("x:1", tuple(messages)))[-1]


def test_preference_rows_learn_the_chosen_answer(write_json: Callable[..., Path], renderer: Renderer) -> None:
    path = write_json([{"prompt": "Hi", "chosen": "Yes.", "rejected": "No, never."}])
    prepared = _prepare(path, renderer)
    (row,) = prepared.train
    assert row.pairs[0].prompt_ids == row.rejected[0].prompt_ids
    decoded = [renderer.tokenizer.decode(pair.answer_ids) for pair in (*row.pairs, *row.rejected)]
    assert decoded == [f"<think>\n\n</think>\n\n{answer}{STOP}" for answer in ("Yes.", "No, never.")]
    assert prepared.report.learned_tokens == len(row.pairs[0].answer_ids)
    assert text("note.preference", count=1) in prepared.report.notes


def test_preference_losses_count_both_answers(write_json: Callable[..., Path], renderer: Renderer) -> None:
    """Tokens, pairs and the longest one; only the last turn of a conversation; other rows than with loss sft."""
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "So?"},
    ]
    path = write_json([{"prompt": turns, "chosen": "Yes.", "rejected": "No, never at all."}])
    imitated, compared = _prepare(path, renderer), _prepare(path, renderer, loss="dpo")
    assert (len(imitated.train[0].pairs), len(compared.train[0].pairs)) == (2, 1)
    (row,) = compared.train
    pairs = [*row.pairs, *row.rejected]
    assert pairs[0] == imitated.train[0].pairs[1]
    assert pairs[1] == imitated.train[0].rejected[0]
    report = compared.report
    assert report.pairs == 2
    assert report.total_tokens == sum(map(len, pairs))
    assert report.learned_tokens == sum(len(pair.answer_ids) for pair in pairs)
    assert report.longest == max(map(len, pairs)) == compared.train.longest_pairs()[0]
    assert report.trie_tokens == count_trie_tokens(pairs) < report.total_tokens
    assert text("note.compared", count=1, loss="dpo") in report.notes
    assert compared.train[:1].is_compared
    assert not imitated.train.is_compared


def test_preference_rows_are_equal_if_both_answers_are(write_json: Callable[..., Path], renderer: Renderer) -> None:
    """Two rejected answers to one chosen one are two rows for dpo, and one answer learned twice for sft."""
    path = write_json([{"prompt": "Hi", "chosen": "Yes.", "rejected": answer} for answer in ("No.", "Never.", "No.")])
    assert _prepare(path, renderer).report.exact_duplicates == 2
    assert _prepare(path, renderer, loss="dpo").report.exact_duplicates == 1


@pytest.mark.parametrize(("chosen", "rejected"), [("Yes.", "No " * 20), ("Yes " * 20, "No."), ("Yes.", "No.")])
def test_preference_rows_are_cut_for_both_answers(
    chosen: str, rejected: str, write_json: Callable[..., Path], renderer: Renderer
) -> None:
    """The longer answer decides, and both keep one prompt: the one that a row without the oldest exchange has."""
    before = [{"role": "system", "content": "Short."}, *_turns("first " * 12, "a", "Last?")["messages"]]
    answers = [[{"role": "assistant", "content": answer}] for answer in (chosen, rejected)]
    path = write_json([{"prompt": before, "chosen": answers[0], "rejected": answers[1]}])
    assert _prepare(path, renderer, max_length=58).report.rows_used == (max(len(chosen), len(rejected)) < 20)
    prepared = _prepare(path, renderer, max_length=58, overlong="cut_prompt")
    (row,) = prepared.train
    is_cut = max(len(chosen), len(rejected)) > 20
    assert prepared.report.rows_cut == is_cut
    left = [before[0], before[-1]] if is_cut else before
    assert row.pairs[-1] == _pair_of(renderer, [*left, *answers[0]])
    assert row.rejected == (_pair_of(renderer, [*left, *answers[1]]),)
    assert row.pairs[-1].prompt_ids == row.rejected[0].prompt_ids


def test_text_rows_learn_all_of_it(write_json: Callable[..., Path], renderer: Renderer) -> None:
    (row,) = _prepare(write_json([{"text": "Some <|im_end|> text."}]), renderer).train
    (pair,) = row.pairs
    assert renderer.tokenizer.decode(pair.prompt_ids + pair.answer_ids) == "Some <|im_end|> text." + STOP
    assert len(pair.prompt_ids) == 1
    assert 151645 not in pair.prompt_ids + pair.answer_ids[:-1]


def test_texts_are_told_apart(write_json: Callable[..., Path], renderer: Renderer) -> None:
    """They have no prompt: what they begin with makes no group, so some are held out and none answers another."""
    path = write_json([{"text": f"The same beginning, and the end is {number}."} for number in range(60)])
    prepared = prepare(Config(data=[str(path)]), renderer)
    assert (len(prepared.train), len(prepared.held_out)) == (52, 8)
    assert (prepared.report.other_answers, prepared.report.exact_duplicates) == (0, 0)
    long = write_json([{"text": "word " * 500}], "long.json")
    assert prepare(Config(data=[str(long)], max_length=60, overlong="cut_prompt"), renderer).report.rows_refused == 0


def test_a_long_text_is_split_into_rows(write_json: Callable[..., Path], renderer: Renderer) -> None:
    """Every token of every text is learned once, in order; rows are numbered on; nothing of a text is on both sides."""
    texts = [" ".join(f"word{n} is {number}" for n in range(5 + 40 * (number % 3))) for number in range(40)]
    path = write_json([{"text": some} for some in texts])
    prepared = prepare(Config(data=[str(path)], max_length=64, eval_split=0.2), renderer)
    report = prepared.report
    assert (report.rows_read, report.rows_refused) == (40, 0)
    assert report.rows_used == len(prepared.train) + len(prepared.held_out) > 100
    assert report.longest == 64
    rows = sorted([*prepared.train, *prepared.held_out], key=lambda row: row.index)
    assert [row.index for row in rows] == [*range(len(rows))]
    of_text: dict[str, list[Row]] = {}
    for row in rows:
        of_text.setdefault(row.where.partition(" (")[0], []).append(row)
    assert len(of_text) == 40
    for some, pieces in zip(texts, of_text.values(), strict=True):
        learned = [token for piece in pieces for token in piece.pairs[0].answer_ids]
        assert renderer.tokenizer.decode([*pieces[0].pairs[0].prompt_ids, *learned]) == some + STOP
        assert [piece.pairs[0].num_template_tokens for piece in pieces] == [0] * (len(pieces) - 1) + [1]
        if len(pieces) > 1:
            assert pieces[-1].where.endswith(f" ({len(pieces)}/{len(pieces)})")
        assert "".join(piece.answer for piece in pieces).endswith(STOP if len(pieces) > 1 else some)
    assert report.learned_tokens == sum(len(row.pairs[0].answer_ids) for row in rows)
    assert report.learned_template_tokens == 40
    assert report.other_answers == 0
    sides = [{row.where.partition(" (")[0] for row in side} for side in (prepared.train, prepared.held_out)]
    assert sides[0] & sides[1] == set()
    assert len(sides[1]) >= 3
    values = {"texts": 26, "pieces": len(rows) - 14, "max_length": 64, "overlap": 8}
    assert text("note.pieces", **values) in report.notes
    assert text("note.texts", count=40, stop=STOP) in report.notes


def test_pieces_are_numbered_over_batches(
    write_json: Callable[..., Path], renderer: Renderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a batch adds moves the rows of all that follow: the same rows whatever the batches are."""
    path = write_json([{"text": f"{number} and on " * (1 + 20 * (number % 2))} for number in range(9)])
    config = Config(data=[str(path)], max_length=32, eval_split=0)
    whole = [*prepare(config, renderer).train]
    assert len(whole) > 9
    monkeypatch.setattr(prepare_module, "BATCH_ROWS", 2)
    monkeypatch.setattr(prepare_module, "STORE_VERSION", -1)
    assert [*prepare(config, renderer).train] == whole


def test_weights_that_leave_nothing(write_json: Callable[..., Path], renderer: Renderer) -> None:
    path = write_json([{"instruction": f"q {number}", "output": "a"} for number in range(10)])
    with pytest.raises(UserError) as caught:
        prepare(Config(data=[str(path)], data_weights=[0.02]), renderer)
    assert caught.value.key == "no_rows"
    with pytest.raises(UserError) as caught:
        prepare(Config(data=[str(path)], data_weights=[1, 1]), renderer)
    assert caught.value.key == "data_weights"
