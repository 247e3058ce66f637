"""E12: the page, the server, the command line and Python send the same ids; answers come piece by piece."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from truetune.data.sources import find_files, read_rows
from truetune.errors import UserError
from truetune.rundir import RunDir
from truetune.studio.places import Places
from truetune.studio.rows import Stores
from truetune.studio.talk import Talk, checked

USER = {"role": "user", "content": "Number 3?"}
TALKS = [
    [USER],
    [{"role": "system", "content": "Be brief."}, USER],
    [
        USER,
        {"role": "assistant", "content": "It is 3."},
        {"role": "user", "content": "你是谁？🙂 <|im_end|> {{ 7 * 7 }}"},
    ],
    [{"role": "user", "content": "  spaces \n\n and lines\t"}],
]


@pytest.mark.slow
def test_e12_the_same_ids_everywhere(page: Any, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from truetune import use
    from truetune.data.template import Renderer

    model = use.load(home / "runs" / "one")
    for messages in TALKS:
        told = page.post("talk/ids", {"run": "one", "messages": messages})
        ids = model.renderer.prompt_ids(messages)
        assert told["ids"] == ids
        assert "".join(told["texts"]) == model.renderer.tokenizer.decode(ids)
    # What the command line and Python send: the renderer's ids, as seen where they are made.
    seen: list[list[int]] = []
    real = Renderer.prompt_ids

    def spy(self: Any, *words: Any, **values: Any) -> list[int]:
        seen.append(real(self, *words, **values))
        return seen[-1]

    monkeypatch.setattr(Renderer, "prompt_ids", spy)
    model.chat([USER], max_new_tokens=1)
    from truetune.cli import run

    seen_by_python = seen[-1]
    assert run(["chat", str(home / "runs" / "one"), "-m", str(USER["content"]), "--max-new-tokens", "1"]) == 0
    assert seen[-1] == seen_by_python == page.post("talk/ids", {"run": "one", "messages": [USER]})["ids"]
    assert sum("Count." in text for text in page.post("talk/ids", {"run": "one", "messages": [USER]})["texts"]) <= 1
    check_answers(page, model)


def check_answers(page: Any, model: Any) -> None:
    """The pieces joined are the greedy answer of Python, of the tuned model and of the base."""
    answers = {}
    for side in ("tuned", "base"):
        body = {"run": "one", "side": side, "messages": [USER], "max_tokens": 8, "temperature": 0}
        with page.client.stream("POST", f"{page.url}api/talk", json=body) as response:
            lines = [line[6:] for line in response.iter_lines() if line.startswith("data: ")]
        assert lines[-1] == "[DONE]"
        chunks = [json.loads(line) for line in lines[:-1]]
        parts = [chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks if "choices" in chunk]
        answers[side] = "".join(parts)
    expected = [model.answers([[USER]], is_base=is_base, max_new_tokens=8)[0] for is_base in (False, True)]
    assert [answers["tuned"].strip(), answers["base"].strip()] == expected
    body = {"run": "one", "side": "tuned", "messages": [USER], "max_tokens": 0}
    refused = page.client.post(f"{page.url}api/talk", json=body).text
    assert "max_tokens" in json.loads(refused.strip().split("data: ")[-1])["error"]["message"]
    page.studio.talk._end(page.studio.talk._known())


def test_a_saved_row_is_one_that_training_reads(page: Any, home: Path, tmp_path: Path) -> None:
    path = home / "kept.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}')
    answer = {"role": "assistant", "content": "</script>\n\u2028 龘"}
    for messages in TALKS:
        page.post("talk/save", {"path": "kept.jsonl", "messages": [*messages, answer]})
    rows = [raw.value["messages"] for source in find_files([str(path)], hub="huggingface") for raw in read_rows(source)]  # type: ignore[union-attr]
    assert rows[1:] == [[*messages, answer] for messages in TALKS]
    assert len(rows) == 5
    assert page.post("talk/save", {"messages": [USER, answer]})["path"] == str(home / "saved.jsonl")


@pytest.mark.parametrize(
    "path", ["/tmp/x.jsonl", "../x.jsonl", "runs/one/events.json", "data.json", "x.jsonl/../../y.jsonl"]
)
def test_rows_are_saved_to_files_of_rows_only(path: str, page: Any) -> None:
    body = {"path": path, "messages": [USER, {"role": "assistant", "content": "a"}]}
    response = page.client.post(f"{page.url}api/talk/save", json=body)
    assert response.status_code in (400, 403)


@pytest.mark.parametrize(
    "messages",
    [
        *([], None, "x", {}, [1], [{"role": "user"}], [USER | {"x": 1}], [USER | {"content": 1}]),
        *([USER | {"role": "tool"}], [USER | {"content": None}]),
    ],
)
def test_what_is_no_talk(messages: Any, page: Any) -> None:
    with pytest.raises(UserError):
        checked(messages)
    for path in ("talk/ids", "talk/save"):
        assert page.post(path, {"run": "one", "messages": messages}, status=400)["error"]["key"] == "studio_messages"
    with pytest.raises(UserError):
        page.studio.talk.save([USER], None)


def test_the_base_of_a_full_run_is_not_served(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its server has one model: the page is told so, and never shown the tuned one's answer as the base's."""

    async def ready(_self: Any, _run: RunDir) -> tuple[str, list[str]]:
        return "http://127.0.0.1:9", ["one"]

    monkeypatch.setattr(Talk, "_ready", ready)
    talk = Talk(Places(home, ()), Stores())
    ask = {"messages": [USER], "side": "base"}

    async def heard() -> list[bytes]:
        return [piece async for piece in talk.stream(RunDir(home / "runs" / "one"), ask, lang="en")]

    last = json.loads(asyncio.run(heard())[-1].removeprefix(b"data: "))
    assert last["error"]["key"] == "studio_no_base"
    assert "truetune compare one" in last["error"]["fix"]
