"""What a model still says to questions that were not trained: its own answers of before, scored again.

A base answers a few general questions; then both models are asked how likely each token of those answers is. What
was forgotten is the loss that the tuned one has more. No answer has to be judged, and no data set is needed.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, replace

from truetune.data.template import Renderer
from truetune.engine.score import mean_loss, score
from truetune.engine.step import Engine, evaluating
from truetune.generate import Sampling, base_only, replies
from truetune.records import Pair

QUESTIONS = {
    "en": (
        "Why does ice float on water?",
        "Write one sentence about a walk in autumn.",
        "What is the difference between a list and a tuple in Python?",
        "How do I make a pot of tea?",
        "Name three countries in South America.",
        "What is 15 percent of 80?",
        "Explain in simple words what a vaccine does.",
        "Give me two tips for sleeping better.",
    ),
    "zh": (
        "冰为什么会浮在水面上？",
        "用一句话描写秋天的散步。",
        "Python 里的列表和元组有什么区别？",
        "怎样泡一壶茶？",
        "请说出三个南美洲国家。",
        "80 的百分之十五是多少？",
        "用简单的话解释疫苗的作用。",
        "给我两条睡得更好的建议。",
    ),
}
"""Everyday questions that any chat model answers; our own text."""

MAX_NEW_TOKENS = 32


@dataclass(frozen=True)
class Forgetting:
    """Mean losses (nats a token) of the base's own answers, by the base and by the tuned model."""

    before: float
    after: float
    num_questions: int
    num_tokens: int


def check_forgetting(engine: Engine, renderer: Renderer, *, lang: str) -> Forgetting:
    """Return what the engine's adapter made the base forget. Asked without the run's system prompt."""
    plain, model = replace(renderer, system=None), engine.model
    prompts = [plain.prompt_ids([{"role": "user", "content": question}]) for question in QUESTIONS[lang]]
    with evaluating(model), base_only(model):
        own = replies(model, plain, prompts=prompts, sampling=Sampling(MAX_NEW_TOKENS))
        pairs = [Pair(tuple(prompt), reply.token_ids) for prompt, reply in zip(prompts, own, strict=True)]
        before = mean_loss(score(engine, pairs))
    after = mean_loss(score(engine, pairs))
    return Forgetting(before, after, len(pairs), sum(len(pair.answer_ids) for pair in pairs))


def language_of(texts: Iterable[str]) -> str:
    """Return the language of QUESTIONS nearest to some texts.

    >>> language_of(["我是甄嬛。"]), language_of(["I am Ebba.", "是"])
    ('zh', 'en')
    """
    letters = [char for text in texts for char in text if char.isalpha()]
    num_han = sum(unicodedata.name(char, "").startswith("CJK") for char in letters)
    return "zh" if 2 * num_han > len(letters) else "en"
