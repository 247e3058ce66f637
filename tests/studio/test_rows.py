"""Pages of rows, against the rows themselves; the text of every token, against the text of all of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from truetune.data.store import RecordBuilder, RowWriter, StoredRows
from truetune.errors import UserError
from truetune.records import Pair, Row
from truetune.rundir import RunDir
from truetune.studio.rows import Stores, refused, shown_row, token_texts

TEXTS = [
    "Hello, world!  Two spaces,\n\na\ttab.",
    "你是谁？我是守塔人。龘靐齉爩",
    "🙂👩‍👩‍👧‍👦🏴‍☠️ e\u0301 \u202eabc ﷽",
    "<script>alert(1)</script> <|im_end|> </s>",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 \U0001f9ff\U0001faf6 \ufffd end",
    "",
]


def sentencepiece() -> Tokenizer:
    """A tokenizer like Llama 2's: a space is a letter, unknown bytes are tokens, the first space is not written."""
    vocabulary = {"<unk>": 0, **{f"<0x{byte:02X}>": byte + 1 for byte in range(256)}}
    letters = sorted({*"▁abcdefghijklmnopqrstuvwxyzHTE,.!<>|_/()1你是谁"})
    vocabulary |= {letter: 257 + number for number, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", "first")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def metaspace() -> Tokenizer:
    """A tokenizer that was trained, with the Metaspace decoder."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>"]))
    return tokenizer


@pytest.fixture(scope="module")
def qwen(shared: Path) -> Tokenizer:
    """The real Qwen3 tokenizer."""
    return Tokenizer.from_file(str(shared / "assets" / "qwen3-tokenizer" / "tokenizer.json"))


def test_the_texts_of_tokens_are_the_text(qwen: Tokenizer) -> None:
    num_checked = num_split = 0
    for tokenizer in (qwen, sentencepiece(), metaspace()):
        for text in TEXTS:
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            texts = token_texts(ids, tokenizer)
            assert "".join(texts) == tokenizer.decode(ids, skip_special_tokens=False)
            assert len(texts) == len(ids)
            num_checked += bool(ids)
            num_split += texts.count("")
    assert num_checked == 15
    assert num_split > 20
    # Bytes that never become a character are shown as such, and nothing after them is lost.
    ids = [*qwen.encode("龘").ids[:1], *qwen.encode(" then").ids, *qwen.encode("🏴").ids[:1]]
    assert "".join(token_texts(ids, qwen)) == qwen.decode(ids, skip_special_tokens=False)


def test_a_page_is_the_rows_of_the_store(page: Any, home: Path, qwen: Tokenizer) -> None:
    store = home / "runs" / "one" / "data"
    num_seen = 0
    for side, name in (("train", "train.arrow"), ("eval", "eval.arrow")):
        rows = StoredRows(store / name)
        for start in range(0, len(rows), 7):
            told = page.get("rows", store=str(store), side=side, start=start, count=7)
            assert told["total"] == len(rows)
            for row, shown in zip(rows[start : start + 7], told["rows"], strict=True):
                (pair,), (seen,) = row.pairs, shown["pairs"]
                assert seen["ids"] == [*pair.prompt_ids, *pair.answer_ids]
                assert seen["ids"][seen["learned"] :] == list(pair.answer_ids)
                assert "".join(seen["texts"]) == qwen.decode(seen["ids"], skip_special_tokens=False)
                assert [seen["texts"][at] for at in seen["specials"]].count("<|im_start|>") == 3
                assert (shown["where"], shown["index"]) == (row.where, row.index)
                contents = [message["content"] for message in shown["messages"]]
                assert contents == [*(message["content"] for message in row.prompt), row.answer]
                assert [message["learned"] for message in shown["messages"]][-1]
                num_seen += 1
    assert num_seen == 40


def test_search_finds_what_a_plain_search_finds(page: Any, home: Path) -> None:
    store = home / "runs" / "one" / "data"
    rows = list(StoredRows(store / "train.arrow"))
    for text in ("1", "number 2", "🙂", "data.json:3", "IS 7 ", '"', "zzz", "\\"):
        expected = [
            row.index
            for row in rows
            if any(
                text.lower() in str(message["content"]).lower() for message in (*row.prompt, {"content": row.answer})
            )
            or text.lower() in row.where.lower()
        ]
        told = page.get("rows", store=str(store), search=text, count=100)
        found = [row["index"] for row in told["rows"]]
        # JSON's own marks are found, too: more is no harm, less would be.
        assert set(expected) <= set(found)
        assert found == expected or text in '"\\'
        assert told["total"] == len(found)


def test_the_rows_of_a_step(page: Any, home: Path) -> None:
    run = RunDir(home / "runs" / "one")
    lines = list(run.read_step_rows())
    for line in lines:
        told = page.get(f"runs/one/steps/{line['step']}")
        assert [row["index"] for row in told["rows"]] == line["rows"]
        event = next(event for event in run.read_events() if event["kind"] == "step" and event["step"] == line["step"])
        assert {key: told["event"][key] for key in event} == event
        learned = sum(len(pair["ids"]) - pair["learned"] for row in told["rows"] for pair in row["pairs"])
        assert learned == event["learned_tokens"]
    assert len(lines) == 6
    assert page.get("runs/one/steps/7", status=404)["error"]["key"] == "studio_step"


def test_lengths_count_every_pair(page: Any, home: Path) -> None:
    store = home / "runs" / "one" / "data"
    told = page.get("lengths", store=str(store))
    lengths = [
        len(pair) for name in ("train", "eval") for row in StoredRows(store / f"{name}.arrow") for pair in row.pairs
    ]
    for bar in told["bars"]:
        assert bar["count"] == sum(bar["from"] <= length < bar["to"] for length in lengths)
    assert sum(bar["count"] for bar in told["bars"]) == len(lengths) == told["pairs"] == 40
    assert told["longest"] == max(lengths)
    assert told["max_length"] == 2048


def test_which_turns_are_learned() -> None:
    tokenizer = metaspace()
    pairs = tuple(Pair((1, 2), (3, 4)) for _ in range(2))
    said = [{"role": role, "content": role} for role in ("system", "user", "assistant", "user")]
    learned = [message["learned"] for message in shown_row(Row(0, "w", pairs, tuple(said), "a"), tokenizer)["messages"]]
    assert learned == [False, False, True, False, True]
    # train_on last_turn: one pair; a turn that is only read; a preference pair; plain text.
    assert [m["learned"] for m in shown_row(Row(0, "w", pairs[:1], tuple(said), "a"), tokenizer)["messages"]][
        2
    ] is False
    said[2]["is_target"] = False  # type: ignore[assignment]
    assert [m["learned"] for m in shown_row(Row(0, "w", pairs[:1], tuple(said), "a"), tokenizer)["messages"]][
        2
    ] is False
    shown = shown_row(Row(0, "w", pairs[:1], tuple(said), "a", rejected=pairs[1:]), tokenizer)
    assert [pair.get("is_rejected", False) for pair in shown["pairs"]] == [False, True]
    shown = shown_row(Row(0, "w", (Pair((), (3, 4)),), (), "text"), tokenizer)
    assert shown["messages"] == [{"role": "text", "content": "text", "learned": True}]


def test_refused_rows_are_paged(tmp_path: Path) -> None:
    lines = [{"where": f"f:{n}", "reason": "<b>", "fix": "x"} for n in range(25)]
    (tmp_path / "refused.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert refused(tmp_path, start=20, count=10) == {"total": 25, "start": 20, "rows": lines[20:]}
    assert refused(tmp_path / "none", start=0, count=10)["total"] == 0


def test_rows_that_are_repeated_come_whole_and_say_where(page: Any, home: Path) -> None:
    rows = [{"instruction": f"Number {n % 30}?", "output": f"It is {n % 30}."} for n in range(44)]
    (home / "twice.json").write_text(json.dumps(rows), encoding="utf-8")
    words = [str(home / "twice.json"), "--model", page.get("runs/one")["model"]]
    job = page.job(page.post("jobs", {"command": "check", "words": words})["id"])
    assert job["state"] == "done", job["output"]
    seen: list[dict[str, Any]] = []
    for start in range(0, 20, 5):
        told = page.get("duplicates", store=job["store"], start=start, count=5)
        assert (told["total"], told["start"]) == (14, start)
        seen += told["rows"]
    assert [row["index"] for row in seen] == list(range(14))
    places = {row["index"]: row["where"] for side in ("train", "eval") for row in listed(page, job["store"], side)}
    assert len(places) == 44
    for row in seen:
        number = row["index"]
        assert row["again"] == {"count": 1, "others": [places[number + 30]]}
        assert row["where"] == places[number]
        assert row["messages"][-1]["content"] == rows[number]["output"]
        assert len(row["pairs"]) == 1
    assert job["result"]["exact_duplicates"] == 14
    # What was prepared before there was such a list has none.
    (Path(job["store"]) / "duplicates.jsonl").unlink()
    assert page.get("duplicates", store=job["store"])["total"] == 0


def listed(page: Any, store: str, side: str) -> list[dict[str, Any]]:
    """All rows of a side."""
    rows: list[dict[str, Any]] = page.get("rows", store=store, side=side, count=200)["rows"]
    return rows


def test_a_file_that_took_the_place_of_another_is_read_anew(tmp_path: Path, shared: Path) -> None:
    (tmp_path / "tokenizer.json").symlink_to(shared / "assets" / "qwen3-tokenizer" / "tokenizer.json")
    stores = Stores()
    for count in (3, 5):
        builder = RecordBuilder()
        for number in range(count):
            builder.add(Row(number, f"f:{number}", (Pair((1, 2), (3,)),), ({"role": "user", "content": "q"},), "a"))
        with RowWriter(tmp_path / "new.arrow") as writer:
            writer.write(builder.build())
        (tmp_path / "new.arrow").replace(tmp_path / "train.arrow")
        assert stores.page(tmp_path, "train", start=0, count=9)["total"] == count
        assert stores.page(tmp_path, "train", start=0, count=9, search="f:2")["total"] == 1
    with pytest.raises(UserError):
        stores.page(tmp_path, "../train.arrow", start=0, count=1)
    with pytest.raises(UserError):
        stores.page(tmp_path, "eval", start=0, count=1)
