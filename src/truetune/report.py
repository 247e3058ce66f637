"""The report card as files: report.md, report.html (one page that needs nothing else), report.json (its numbers)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from truetune.console import Console
from truetune.disk import to_json, write_atomic
from truetune.messages import text
from truetune.rundir import RunDir
from truetune.templates import render

CARD, MARKDOWN, PAGE = "report.json", "report.md", "report.html"

MAX_POINTS = 400
"""Points of a curve in the page; of more steps, means are drawn."""

KINDS = {"best": "card.kind_best", "worst": "card.kind_worst", "random": "card.kind_random"}

METRICS = ("loss", "answer_loss", "perplexity", "template_loss", "token_accuracy", "stop_accuracy")

Values = dict[str, Any]
"""A card as report.json holds it: see card.Card; `findings`: see diagnosis.Finding."""


def write(run: Path, card: Values, *, lang: str) -> None:
    """Write the card's three files into a run's folder, in `lang`."""
    write_atomic(run / CARD, to_json(card, indent=1) + "\n")
    write_atomic(run / MARKDOWN, _render("report.md", card, lang))
    write_atomic(run / PAGE, _render("report.html", card, lang))


def read(run: Path) -> Values | None:
    """Return a run's card, or None if it has none."""
    path = run / CARD
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def show(run: Path, console: Console) -> None:
    """Print a run's card in short: what it says, and where result and card are."""
    card = read(run)
    if card is not None:
        for sentence in sentences(card, console.lang):
            console.write(sentence)
        console.blank()
        console.say("card.path", path=run / PAGE)
    console.say("train.done", path=RunDir(run).result)


def sentences(card: Values, lang: str) -> list[str]:
    """Return what the card says in a few plain sentences: what changed first, then how it talks, then what is wrong."""
    change, *others = card["findings"]
    return [_sentence(change, card, lang), _manners(card, lang), *(_sentence(one, card, lang) for one in others)]


def _sentence(finding: Values, card: Values, lang: str) -> str:
    known = {"rows": card["base"]["num_rows"], "base": card["base"], "tuned": card["tuned"]}
    known |= {"never_seen": text("card.never_seen", lang) if card["is_held_out"] else ""}
    return text(f"card.{finding['name']}", lang, **(known | finding["values"]))


def _manners(card: Values, lang: str) -> str:
    talk, forgetting = card["talk"], card["forgetting"]
    key = "card.manners" if talk["num_answers"] else "card.manners_forgetting"
    return text(key, lang, **talk, num_ended=round(talk["tuned_ended"] * talk["num_answers"]), **forgetting)


def learned_lines(card: Values, lang: str) -> list[tuple[str, str]]:
    """Return what was trained as (label, value)."""
    values = {
        "trained": text("card.trained_value", lang, **card),
        "steps": text("card.steps_value", lang, **card, minutes=card["train_seconds"] / 60),
        "result": text("card.result_value", lang, **card),
        "overhead": text("card.overhead_value", lang, **card),
    }
    return [(text(f"card.{name}", lang), value) for name, value in values.items()]


def metric_lines(card: Values, lang: str) -> list[tuple[str, ...]]:
    """Return the metrics as (label, base, tuned, tuned on trained rows or "")."""
    sides = [card["base"], card["tuned"], card["trained"]]
    talk, forgetting = card["talk"], card["forgetting"]
    answers = {
        "ended": [f"{talk[f'{side}_ended']:.0%}" for side in ("base", "tuned")],
        "repeated": [f"{talk[f'{side}_repeated']:.0%}" for side in ("base", "tuned")],
    }
    of_talk = answers if talk["num_answers"] else {}
    of_base = {"general_loss": [f"{forgetting[side]:.3f}" for side in ("before", "after")]}
    return [
        *((text(f"card.{name}", lang), *(metric(name, side) for side in sides)) for name in METRICS),
        *((text(f"card.{name}", lang), *values, "") for name, values in (_compared(card) | of_talk | of_base).items()),
    ]


def _compared(card: Values) -> dict[str, list[str]]:
    """Return how often the chosen answer is the likelier one, for base and tuned; {} of a loss that compares none."""
    preferred = card.get("preferred")
    if preferred is None:
        return {}
    return {
        "chosen_likelier": [f"{preferred[f'{side}_likelier']:.0%}" for side in ("base", "tuned")],
        "chosen_gained": ["", f"{preferred['gained']:.0%}"],
    }


def metric(name: str, side: Values | None) -> str:
    """Return one of METRICS of a side as it is shown; "" of a side that was not measured."""
    if side is None:
        return ""
    value = side[name]
    if name.endswith("accuracy"):
        return f"{value:.1%}"
    return f"{value:,.1f}" if name == "perplexity" else f"{value:.3f}"


def _render(name: str, card: Values, lang: str) -> str:
    words = ("base", "tuned", "expected", "question", "answers", "learned_title", "metrics_title", "curve_title")
    rows = "card.rows_held_out" if card["is_held_out"] else "card.rows_trained"
    return render(
        name,
        lang,
        card=card,
        title=text("card.title", lang, name=card["name"]),
        sentences=sentences(card, lang),
        learned=learned_lines(card, lang),
        metrics=metric_lines(card, lang),
        word={name: text(f"card.{name}", lang) for name in words},
        rows=text(rows, lang, count=card["base"]["num_rows"]),
        has_trained=card["trained"] is not None,
        trained_rows=text("card.rows_trained_too", lang),
        answers=[_shown_answer(answer, lang) for answer in card["answers"]],
        legend=text("card.legend", lang),
        plot=_plot(card["losses"], card["held_out_losses"]),
    )


def _shown_answer(answer: Values, lang: str) -> Values:
    kind = text(KINDS[answer["kind"]], lang)
    return answer | {"kind": kind, "title": text("card.answer_title", lang, **(answer | {"kind": kind}))}


def _plot(losses: Sequence[Sequence[float]], held_out: Sequence[Sequence[float]]) -> Values:
    """Return the curves' points in a square of 100, y downwards: the highest loss at 4, zero at 100."""
    shown = list(_means(losses))
    most_loss = max((loss for _, loss in [*shown, *held_out]), default=1.0) or 1.0
    last = max((step for step, _ in [*losses, *held_out]), default=1)

    def at(step: float, loss: float) -> tuple[float, float]:
        return round(100 * step / last, 2), round(100 - 96 * loss / most_loss, 2)

    line = [at(step, loss) for step, loss in shown]
    points = [at(step, loss) for step, loss in held_out]
    return {"line": line, "points": points, "last": int(last), "most": f"{most_loss:.2f}"}


def _means(losses: Sequence[Sequence[float]]) -> Iterator[tuple[float, float]]:
    """Yield at most MAX_POINTS (step, loss), each the mean of as many neighbours.

    >>> list(_means([(1, 4.0), (2, 2.0)]))
    [(1.0, 4.0), (2.0, 2.0)]
    """
    size = -(-len(losses) // MAX_POINTS) or 1
    for start in range(0, len(losses), size):
        some = losses[start : start + size]
        yield sum(step for step, _ in some) / len(some), sum(loss for _, loss in some) / len(some)
