"""Pages: text is escaped, and in plain text it is not."""

from __future__ import annotations

import pytest

from truetune.templates import render


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_pages_are_whole_and_escaped(lang: str) -> None:
    values = {"data": ["<b>"], "model": "<i>", "title": "&", "lines": [("<u>", "<s>")], "words": {}, "bars": []}
    page = render("check.html", lang, **values)
    assert page.startswith("<!doctype html>")
    assert page.rstrip().endswith("</html>")
    assert "color-scheme" in page
    assert f'lang="{"zh-CN" if lang == "zh" else "en"}"' in page
    for tag in ("<b>", "<i>", "<u>", "<s>"):
        assert tag not in page
        assert tag.replace("<", "&lt;").replace(">", "&gt;") in page
