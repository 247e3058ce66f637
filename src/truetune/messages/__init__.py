"""One catalogue of every text shown: the files of both languages hold the same keys (a test asserts it)."""

from __future__ import annotations

from typing import Any

from truetune.messages.en import TEXTS as ENGLISH
from truetune.messages.en_faults import TEXTS as ENGLISH_FAULTS
from truetune.messages.en_report import TEXTS as ENGLISH_REPORT
from truetune.messages.en_stream import TEXTS as ENGLISH_STREAM
from truetune.messages.en_studio import TEXTS as ENGLISH_STUDIO
from truetune.messages.en_tune import TEXTS as ENGLISH_TUNE
from truetune.messages.zh import TEXTS as CHINESE
from truetune.messages.zh_faults import TEXTS as CHINESE_FAULTS
from truetune.messages.zh_report import TEXTS as CHINESE_REPORT
from truetune.messages.zh_stream import TEXTS as CHINESE_STREAM
from truetune.messages.zh_studio import TEXTS as CHINESE_STUDIO
from truetune.messages.zh_tune import TEXTS as CHINESE_TUNE

CATALOGUES = {
    "en": ENGLISH | ENGLISH_FAULTS | ENGLISH_REPORT | ENGLISH_STUDIO | ENGLISH_STREAM | ENGLISH_TUNE,
    "zh": CHINESE | CHINESE_FAULTS | CHINESE_REPORT | CHINESE_STUDIO | CHINESE_STREAM | CHINESE_TUNE,
}


def text(key: str, lang: str = "en", **values: Any) -> str:
    """Return the text of `key` in `lang` ("en" or "zh") with its braces filled.

    >>> text("label.rows_read", "en")
    'rows read'
    """
    return CATALOGUES[lang][key].format(**values)
