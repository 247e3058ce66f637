"""check.html: the preflight as one page that needs nothing else: no network, no script."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from truetune.config import Config
from truetune.disk import write_atomic
from truetune.messages import text
from truetune.preflight import Preflight, report_lines
from truetune.templates import render

NUM_ROWS, MAX_REFUSED, NUM_BARS = 20, 200, 60
MAX_SHOWN_CHARS = 4000


def write_page(path: Path, flight: Preflight, *, config: Config, lang: str) -> None:
    """Write the page of a preflight, in `lang`."""
    report = flight.prepared.report
    lengths = np.concatenate([side.lengths(0, 1) for side in (flight.prepared.train, flight.prepared.held_out)])
    most = max(int(lengths.max(initial=1)), 2)
    hidden = report.rows_refused - MAX_REFUSED
    words = {
        "remarks": text("page.remarks", lang),
        "lengths": text("page.lengths", lang),
        "most": text("page.most", lang, tokens=most, max_length=config.max_length),
        "refused": text("page.refused", lang, count=report.rows_refused, hidden=max(hidden, 0)),
        "rows": text("page.rows", lang),
        "legend": text("page.legend", lang),
    }
    html = render(
        "check.html",
        lang,
        title=text("page.title", lang),
        data=config.data,
        model=flight.base.title,
        lines=[(text(label, lang), value) for label, value in report_lines(report, lang)],
        remarks=[*report.diagnosis, *report.notes],
        bars=list(_bars(lengths, most)),
        limit=100 * config.max_length / most if config.max_length <= most else None,
        refused=report.refused[:MAX_REFUSED],
        pairs=list(_pairs(flight)),
        words=words,
    )
    write_atomic(path, html)


def _bars(lengths: np.ndarray, most: int) -> Iterator[tuple[float, float, float]]:
    """Yield (x, width, height) of a histogram's bars in a square of 100; the highest reaches the top."""
    counts, _ = np.histogram(lengths, bins=min(NUM_BARS, most), range=(0, most))
    width = 100 / len(counts)
    for number, count in enumerate(counts):
        if count:
            # Few long rows must be seen, too: at least 1 % high.
            yield round(number * width, 3), round(width * 0.9, 3), round(max(100 * count / counts.max(), 1), 2)


def _pairs(flight: Preflight) -> Iterator[dict[str, Any]]:
    """Yield what the first rows and the longest one show, the learned part apart."""
    train, decode = flight.prepared.train, flight.renderer.tokenizer.decode
    longest = [train[int(train.longest_pairs().argmax())]] if len(train) > NUM_ROWS else []
    for row in [*train[:NUM_ROWS], *longest]:
        for pair in row.pairs:
            prompt, answer = decode(pair.prompt_ids), decode(pair.answer_ids)
            yield {"where": row.where, "prompt": _shortened(prompt), "answer": _shortened(answer)}


def _shortened(shown: str) -> str:
    """Return a text, or its two ends."""
    half = MAX_SHOWN_CHARS // 2
    return shown if len(shown) <= MAX_SHOWN_CHARS else f"{shown[:half]} … {shown[-half:]}"
