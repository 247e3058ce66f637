"""check.html: one file, nothing loaded from elsewhere, the report's numbers, and rows as text whatever they hold."""

from __future__ import annotations

import re
from collections.abc import Callable
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from truetune.cli import run
from truetune.messages import text

ATTACK = "<script>alert(1)</script> & <b>bold</b> \"'"


class _Reader(HTMLParser):
    """Collects tags, and the text inside marks."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.marked: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attributes
        if tag == "mark":
            self.marked.append("")

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] == "mark" and self.marked:
            self.marked[-1] += data


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_page(lang: str, write_json: Callable[..., Path], tiny_qwen: Path, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"instruction": f"问 {number}", "output": "答 " * number} for number in range(1, 40)]
    rows += [{"instruction": ATTACK, "output": ATTACK}, {"instruction": "no answer"}]
    page = tmp_path / "check.html"
    words = ["check", str(write_json(rows)), "--model", str(tiny_qwen), "--html", str(page), "--lang", lang]
    assert run(words) == 2
    source = page.read_text(encoding="utf-8")
    reader = _Reader()
    reader.feed(source)
    assert not {"script", "link", "img", "iframe"} & set(reader.tags)
    assert not [value for name, value in reader.attributes if name in ("src", "href")]
    assert "http" not in source.replace("http-equiv", "")
    assert ("lang", "zh-CN" if lang == "zh" else "en") in reader.attributes
    assert text("page.title", lang) in source
    for key in ("label.rows_read", "label.learned_tokens", "label.steps"):
        assert text(key, lang) in unescape(source)
    # Twenty rows and the longest; the bars of the lengths; the refused row with its advice.
    assert len(reader.marked) == 21
    assert reader.tags.count("rect") >= 10
    assert len(re.findall(r"<td>[^<]*data.json:\d+</td>", source)) == 1
    assert text("fix.row_missing_key", lang, name="output") in unescape(source)
    assert all("<think>" in marked for marked in reader.marked)


def test_rows_are_text(write_json: Callable[..., Path], tiny_qwen: Path, tmp_path: Path) -> None:
    page = tmp_path / "check.html"
    path = write_json([{"instruction": ATTACK, "output": ATTACK}])
    assert run(["check", str(path), "--model", str(tiny_qwen), "--html", str(page)]) == 0
    source = page.read_text(encoding="utf-8")
    assert "<script" not in source
    assert unescape(source).count(ATTACK) == 2


def test_folder_that_is_not_there(write_json: Callable[..., Path], tiny_qwen: Path, tmp_path: Path) -> None:
    path = write_json([{"instruction": "a", "output": "b"}])
    page = tmp_path / "none" / "check.html"
    assert run(["check", str(path), "--model", str(tiny_qwen), "--html", str(page)]) == 2
    assert not page.parent.exists()
