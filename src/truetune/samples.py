"""Answers to a few fixed prompts by base and current model, at evaluations: one sees what is learned as it happens."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from truetune.data.template import Renderer
from truetune.engine.step import evaluating
from truetune.generate import Reply, Sampling, base_only, replies
from truetune.records import Row

Event = dict[str, Any]

NUM_PROMPTS = 4

MAX_SHARE = 0.01
"""Samples take about this share of a run's time at most, but for the shortest ones before and after it."""

DECODE_TOKENS = 64
"""Tokens that are trained in the time of one decoding step of a small batch: the weights are read for a few tokens."""

MIN_NEW_TOKENS, MAX_NEW_TOKENS = 24, 128


@dataclass(frozen=True)
class SamplePlan:
    """After which steps (0: before the first) samples are taken, and how long an answer may be, in tokens."""

    steps: tuple[int, ...]
    max_new_tokens: int


def plan_samples(num_steps: int, *, eval_steps: int, num_trained_tokens: int) -> SamplePlan:
    """Return what MAX_SHARE of a run pays for: before it and after it at least, shorter answers rather than fewer.

    A function of the run's plan alone and not of the clock, so that a resumed run takes the same samples.
    """
    due = sorted({*range(0, num_steps, eval_steps), num_steps})
    affordable = int(MAX_SHARE * num_trained_tokens / DECODE_TOKENS)
    num_times = min(max(affordable // MIN_NEW_TOKENS, 2), len(due))
    last = len(due) - 1
    steps = tuple(sorted({due[round(number * last / (num_times - 1))] for number in range(num_times)}))
    # The base's own answers are computed once, before step 1.
    return SamplePlan(steps, min(max(affordable // len(steps), MIN_NEW_TOKENS), MAX_NEW_TOKENS))


@dataclass(frozen=True)
class Prompt:
    """What is asked: the text to show, and the exact ids; of a row those that were trained, tools and all."""

    text: str
    ids: tuple[int, ...]


def choose_prompts(rows: Sequence[Row], texts: Sequence[str] | None, *, renderer: Renderer) -> list[Prompt]:
    """Return the prompts: what the user gave, else those of the first rows that differ."""
    if texts is not None:
        return [Prompt(text, tuple(renderer.prompt_ids([{"role": "user", "content": text}]))) for text in texts]
    chosen = [prompt_of(row) for row in rows if row.prompt]
    return list(dict.fromkeys(chosen))[:NUM_PROMPTS]


def prompt_of(row: Row) -> Prompt:
    """Return what a row asks last."""
    return Prompt(str(row.prompt[-1]["content"]), row.pairs[-1].prompt_ids)


@dataclass
class Sampler:
    """Takes the samples of a run. `waits_for`: the kind of event after which they are due."""

    model: Any
    renderer: Renderer
    prompts: Sequence[Prompt]
    plan: SamplePlan
    waits_for: str
    _base: list[Reply] = field(default_factory=list)

    def see(self, event: Event) -> Iterator[Event]:
        """Yield a "sample" event for each prompt, if samples are due after this event."""
        if event["kind"] == self.waits_for and event["step"] in self.plan.steps:
            yield from self.take(event["step"])

    def begin(self) -> Iterator[Event]:
        """Yield the samples before step 1, where no evaluation comes before it."""
        if self.waits_for != "eval":
            yield from self.take(0)

    def take(self, step: int) -> Iterator[Event]:
        """Yield an event for each prompt: the base's answer and the current one."""
        if not self.prompts:
            return
        began = time.perf_counter()
        # Again after a resume; else once.
        self._base = self._base or self._answers(is_base=True)
        current = self._base if step == 0 else self._answers(is_base=False)
        seconds = (time.perf_counter() - began) / len(self.prompts)
        for number, prompt in enumerate(self.prompts):
            yield {
                "kind": "sample",
                "step": step,
                "number": number,
                "prompt": prompt.text,
                "base": self._base[number].text,
                "answer": current[number].text,
                "is_ended": current[number].is_ended,
                "seconds": seconds,
            }

    def _answers(self, *, is_base: bool) -> list[Reply]:
        sampling = Sampling(self.plan.max_new_tokens)
        with evaluating(self.model), base_only(self.model, is_on=is_base):
            return replies(
                self.model, self.renderer, prompts=[prompt.ids for prompt in self.prompts], sampling=sampling
            )
