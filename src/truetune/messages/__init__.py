"""One catalogue of every text shown: `en.py` and `zh.py` hold the same keys (a test asserts it)."""

from __future__ import annotations

from typing import Any

from truetune.messages.en import TEXTS as ENGLISH
from truetune.messages.zh import TEXTS as CHINESE

CATALOGUES = {"en": ENGLISH, "zh": CHINESE}


def text(key: str, lang: str = "en", **values: Any) -> str:
    """Return the text of `key` in `lang` ("en" or "zh") with its braces filled.

    >>> text("label.rows_read", "en")
    'rows read'
    """
    return CATALOGUES[lang][key].format(**values)
