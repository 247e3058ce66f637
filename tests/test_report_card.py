"""The card as files: nothing from a row is read as markup, nothing is fetched, both languages are whole."""

from __future__ import annotations

import copy
import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from truetune import report

ATTACK = '<script>alert("1")</script><img src=x onerror=y> & `code` **bold** {{ 7 * 7 }}'


@pytest.fixture(scope="module")
def card() -> dict[str, Any]:
    """A card with an attack in every text."""
    side = {
        **dict.fromkeys(report.METRICS, 0.5),
        "num_rows": 9,
        "num_tokens": 90,
        "num_template_tokens": 9,
    }
    answer = {
        **dict.fromkeys(("where", "prompt", "expected", "base", "tuned"), ATTACK),
        "kind": "best",
        "base_loss": 2.0,
        "tuned_loss": 1.0,
        "is_ended": True,
    }
    return {
        "name": ATTACK,
        "model": ATTACK,
        "data": [ATTACK],
        "num_rows": 30,
        "num_epochs": 3.0,
        "num_learned_tokens": 1234567,
        "num_steps": 900,
        "step": 800,
        "learning_rate": 2e-4,
        "is_held_out": True,
        "base": side,
        "tuned": side,
        "trained": side,
        "answers": [answer],
        "talk": {"num_answers": 6, "tuned_ended": 0.5, "base_ended": 1.0, "tuned_repeated": 0.0, "base_repeated": 0.0},
        "forgetting": {"before": 0.5, "after": 2.0, "num_questions": 8, "num_tokens": 99},
        "losses": [[step, 3.0 - step / 900] for step in range(1, 901)],
        "held_out_losses": [[0, 3.0], [900, 2.0]],
        "train_seconds": 61.0,
        "overhead_share": 0.04,
        "findings": [{"name": "learned", "values": {"before": 3.0, "after": 2.0}, "is_good": True}],
    }


class Tags(HTMLParser):
    """Collects tags, attributes and text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note a tag."""
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        """Note a text."""
        self.text += data


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_text_of_rows_stays_text(lang: str, card: dict[str, Any], tmp_path: Path) -> None:
    report.write(tmp_path, card, lang=lang)
    page = Tags()
    page.feed((tmp_path / report.PAGE).read_text(encoding="utf-8"))
    assert "script" not in page.tags
    assert "img" not in page.tags
    assert not {name for name, _ in page.attributes} & {"src", "href", "onerror"}
    assert page.text.count(ATTACK) == 9
    # In Markdown a row's text stands indented: a block of code.
    lines = (tmp_path / report.MARKDOWN).read_text(encoding="utf-8").splitlines()
    assert lines.count(f"    {ATTACK}") == 4
    assert json.loads((tmp_path / report.CARD).read_text(encoding="utf-8")) == card == report.read(tmp_path)


def test_nothing_is_fetched(card: dict[str, Any], tmp_path: Path) -> None:
    report.write(tmp_path, card, lang="en")
    page = (tmp_path / report.PAGE).read_text(encoding="utf-8")
    assert not re.search(r"https?:|url\(|@import|<link", page)
    assert len(page) < 60_000


def test_curves_are_drawn_to_scale(card: dict[str, Any]) -> None:
    """Many steps become few points, the first and last held-out loss stand where they belong."""
    plot = report._plot(card["losses"], card["held_out_losses"])
    assert 300 <= len(plot["line"]) <= report.MAX_POINTS
    assert plot["points"] == [(0.0, 4.0), (100.0, 36.0)]
    assert all(0 <= x <= 100 and 0 <= y <= 100 for x, y in plot["line"])


def test_both_languages_say_the_same_numbers(card: dict[str, Any]) -> None:
    for name in ("learned", "worse"):
        other = copy.deepcopy(card)
        other["findings"][0]["name"] = name
        said = [report.sentences(other, lang) for lang in ("en", "zh")]
        assert [len(sentences) for sentences in said] == [2, 2]
        first, second = ([sorted(re.findall(r"\d+\.\d+", sentence)) for sentence in sentences] for sentences in said)
        assert first[0][:2] == second[0][:2]
        assert first[1] == second[1]


def test_no_card(tmp_path: Path) -> None:
    assert report.read(tmp_path) is None


def test_the_title_is_escaped_too(card: dict[str, Any], tmp_path: Path) -> None:
    report.write(tmp_path, card, lang="en")
    assert html.escape("<script>", quote=False) in (tmp_path / report.PAGE).read_text(encoding="utf-8")
