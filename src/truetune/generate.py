"""Messages → stream of text, or answers to many prompts at once, rendered by the module that rendered training."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from truetune.cores import give_back_workers
from truetune.data.template import CLOSE_THINKING, OPEN_THINKING, Renderer
from truetune.model import pad_id
from truetune.records import Message

EMPTY_THINKING = f"{OPEN_THINKING}\n{CLOSE_THINKING}"
"""What Qwen3's template writes before an answer without reasoning; learned, and not shown."""

NO_DISTORTION = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_p": None, "typical_p": 1.0, "num_beams": 1}
"""What a model's generation_config.json may bring along (Qwen2.5: a repetition penalty), so that greedy is greedy."""


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn: greedy at temperature 0, so that the same question gets the same answer.

    `top_p`: only the likeliest tokens that together have this probability. `seed`: the same seed, the same answer.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments for transformers' `generate`; the model's own defaults are overridden."""
        if self.temperature == 0:
            drawn: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        else:
            drawn = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        return {"max_new_tokens": self.max_new_tokens, **drawn, **NO_DISTORTION}


@dataclass(frozen=True)
class Reply:
    """An answer as it is shown. `token_ids`: what was generated, the stop token included.

    `is_ended`: the model ended its turn itself; False where `max_new_tokens` did.
    """

    text: str
    token_ids: tuple[int, ...]
    is_ended: bool


def answers(
    model: Any, renderer: Renderer, *, prompts: Sequence[Sequence[Message]], sampling: Sampling, batch_size: int = 8
) -> list[str]:
    """Return the answer to each of `prompts` (lists of messages)."""
    rows = [renderer.prompt_ids(messages) for messages in prompts]
    some = replies(model, renderer, prompts=rows, sampling=sampling, batch_size=batch_size)
    return [reply.text for reply in some]


def replies(
    model: Any, renderer: Renderer, *, prompts: Sequence[Sequence[int]], sampling: Sampling, batch_size: int = 8
) -> list[Reply]:
    """Return the reply to each of `prompts` (their ids), computed in batches padded on the left."""
    found: list[Reply] = []
    for start in range(0, len(prompts), batch_size):
        rows = prompts[start : start + batch_size]
        width = max(map(len, rows))
        ids_BT = torch.full((len(rows), width), pad_id(renderer.tokenizer))
        for number, row in enumerate(rows):
            ids_BT[number, width - len(row) :] = torch.tensor(row)
        is_token_BT = torch.tensor([[n >= width - len(row) for n in range(width)] for row in rows])
        output_BT = _generate(model, renderer, ids_BT, is_token_BT, sampling)
        found += [_reply(renderer, ids) for ids in output_BT[:, width:].tolist()]
    return found


def _reply(renderer: Renderer, ids: list[int]) -> Reply:
    """Return what was generated, without the padding behind its stop token."""
    end = min((ids.index(stop) for stop in renderer.stop_ids if stop in ids), default=None)
    kept = ids if end is None else ids[: end + 1]
    return Reply(_shown(renderer.tokenizer.decode(kept, skip_special_tokens=True)), tuple(kept), end is not None)


@contextmanager
def base_only(model: Any, *, is_on: bool = True) -> Iterator[None]:
    """Let a model with an adapter answer as its base inside the block; a model without one is its base."""
    with model.disable_adapter() if is_on and hasattr(model, "disable_adapter") else nullcontext():
        yield


def both_replies(
    model: Any, renderer: Renderer, *, prompts: Sequence[Sequence[int]], sampling: Sampling
) -> tuple[list[Reply], list[Reply]]:
    """Return the replies of the base and those of the tuned model to the same prompts."""
    with base_only(model):
        base = replies(model, renderer, prompts=prompts, sampling=sampling)
    return base, replies(model, renderer, prompts=prompts, sampling=sampling)


def stream(model: Any, renderer: Renderer, *, messages: Sequence[Message], sampling: Sampling) -> Iterator[str]:
    """Yield the answer to `messages` piece by piece; an empty thinking block at its start is left out.

    Closing the iterator (Ctrl-C) stops the model at its next token.
    """
    ids_BT = torch.tensor([renderer.prompt_ids(messages)])
    streamer = TextIteratorStreamer(renderer.tokenizer, skip_prompt=True, skip_special_tokens=True)
    is_closed = threading.Event()

    def work() -> None:
        is_token_BT = torch.ones_like(ids_BT, dtype=torch.bool)
        stop = StoppingCriteriaList([_StopWhen(is_closed)])
        try:
            _generate(model, renderer, ids_BT, is_token_BT, sampling, streamer=streamer, stopping_criteria=stop)
        finally:
            streamer.end()

    give_back_workers()
    with ThreadPoolExecutor(max_workers=1) as pool:
        future = pool.submit(work)
        try:
            # A generator, since a streamer that has ended waits for ever when it is asked again.
            yield from _without_empty_thinking(piece for piece in streamer)
            future.result()
        finally:
            is_closed.set()


class _StopWhen(StoppingCriteria):  # type: ignore[misc]
    """Stops every row once an event is set."""

    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.event.is_set(), device=input_ids.device)


@torch.inference_mode()  # type: ignore[untyped-decorator]
def _generate(
    model: Any, renderer: Renderer, ids_BT: torch.Tensor, is_token_BT: torch.Tensor, sampling: Sampling, **extra: Any
) -> torch.Tensor:
    device = next(model.parameters()).device
    # transformers draws from torch's own generator, which is put back as it was.
    with torch.random.fork_rng(enabled=sampling.seed is not None):
        if sampling.seed is not None:
            torch.manual_seed(sampling.seed)
        output_BT: torch.Tensor = model.generate(
            input_ids=ids_BT.to(device),
            attention_mask=is_token_BT.long().to(device),
            eos_token_id=list(renderer.stop_ids),
            pad_token_id=pad_id(renderer.tokenizer),
            **sampling.arguments(),
            **extra,
        )
    return output_BT


def _shown(text: str) -> str:
    return text.removeprefix(EMPTY_THINKING).strip()


def _without_empty_thinking(pieces: Iterator[str]) -> Iterator[str]:
    """Hold the start back until it is, or is not, an empty thinking block."""
    held = ""
    for piece in pieces:
        held += piece
        if held.startswith(EMPTY_THINKING):
            held = held.removeprefix(EMPTY_THINKING)
        elif EMPTY_THINKING.startswith(held):
            continue
        break
    if held:
        yield held
    yield from pieces
