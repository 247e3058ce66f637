"""One catalogue of every text shown: the files of both languages hold the same keys (a test asserts it)."""

from __future__ import annotations

from importlib import import_module
from typing import Any

LANGUAGES = ("en", "zh")
PARTS = ("", "_faults", "_full", "_kinds", "_preference", "_ranks", "_report", "_stream", "_studio", "_tune")
"""The files of each language: the screen's, and one for each larger part."""


def _texts(lang: str) -> dict[str, str]:
    """Return all texts of a language."""
    files = [import_module(f"{__name__}.{lang}{part}") for part in PARTS]
    return {key: value for file in files for key, value in file.TEXTS.items()}


CATALOGUES = {lang: _texts(lang) for lang in LANGUAGES}


def text(key: str, lang: str = "en", **values: Any) -> str:
    """Return the text of `key` in `lang` ("en" or "zh") with its braces filled.

    >>> text("label.rows_read", "en")
    'rows read'
    """
    return CATALOGUES[lang][key].format(**values)
