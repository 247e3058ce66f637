"""One catalogue of every text shown: the files of both languages hold the same keys (a test asserts it)."""

from __future__ import annotations

from typing import Any

from truetune.messages.en import TEXTS as ENGLISH
from truetune.messages.en_faults import TEXTS as ENGLISH_FAULTS
from truetune.messages.en_preference import TEXTS as ENGLISH_PREFERENCE
from truetune.messages.en_report import TEXTS as ENGLISH_REPORT
from truetune.messages.en_studio import TEXTS as ENGLISH_STUDIO
from truetune.messages.zh import TEXTS as CHINESE
from truetune.messages.zh_faults import TEXTS as CHINESE_FAULTS
from truetune.messages.zh_preference import TEXTS as CHINESE_PREFERENCE
from truetune.messages.zh_report import TEXTS as CHINESE_REPORT
from truetune.messages.zh_studio import TEXTS as CHINESE_STUDIO

CATALOGUES = {
    "en": ENGLISH | ENGLISH_FAULTS | ENGLISH_PREFERENCE | ENGLISH_REPORT | ENGLISH_STUDIO,
    "zh": CHINESE | CHINESE_FAULTS | CHINESE_PREFERENCE | CHINESE_REPORT | CHINESE_STUDIO,
}


def text(key: str, lang: str = "en", **values: Any) -> str:
    """Return the text of `key` in `lang` ("en" or "zh") with its braces filled.

    >>> text("label.rows_read", "en")
    'rows read'
    """
    return CATALOGUES[lang][key].format(**values)
