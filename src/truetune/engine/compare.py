"""The comparison before step 1: does the engine compute what the model itself computes?

Two pairs, or two preference rows, run through both, loss and gradient are compared, and the fastest way that agrees is
taken: tries, else padded rows, else the model's and PEFT's own code alone. That is the rule, not a list of model names:
it finds layers that are neither attention nor a state that branches (Mamba 1, attention sinks), unknown heads, scales
and caps.

All trained weights are compared, those of full fine-tuning, too: of a large gradient G [out, in] its product with a few
random signs [in, 8] is kept, whose norm is that of G in expectation (Johnson-Lindenstrauss), and the gradient is freed
as soon as it is there. So no gradient of the whole model exists at any time, and none is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from truetune.engine.attention import UnsupportedError
from truetune.engine.fused import use_fused
from truetune.engine.objective import Imitation, Objective, train_step, whole
from truetune.engine.step import Engine, Kind
from truetune.engine.trie import num_common
from truetune.records import Pair, Row

MAX_TOKENS = 512
"""Of the two pairs together, where the data has such pairs: the comparison is to take seconds."""

MAX_WHOLE = 1 << 20
"""Numbers of a gradient that is kept as it is; LoRA's are smaller."""
NUM_SIGNS = 8
"""Random directions in which a larger one is looked at: its norm is then right to a few thousandths for a layer, and
to a third where only one row of it is wrong, which is far past any tolerance."""

# Relative differences, of loss and gradient, up to which two ways count as one. In bf16 two correct programs differ by
# 2 to 3 % in the gradient (docs/log.md); a wrong mask, position or scale moves it by tens.
TOLERANCES = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (1e-2, 1e-1)}


@dataclass(frozen=True)
class Comparison:
    """How far a kind is from plain: relative differences of loss and of the whole gradient, or why it cannot run."""

    kind: Kind
    loss: float = 0.0
    gradient: float = 0.0
    problem: str = ""
    is_same: bool = False


@dataclass(frozen=True)
class Choice:
    """The engine to train with, and what was compared to find it."""

    engine: Engine
    comparisons: Sequence[Comparison]


@dataclass(frozen=True)
class Trial:
    """What is compared: a step over `rows`, whose loss is the objective's."""

    rows: Sequence[Row]
    objective: Objective


def choose_engine(
    engine: Engine, pairs: Sequence[Pair], *, kinds: Sequence[Kind] = ("trie", "padded"), trial: Trial | None = None
) -> Choice:
    """Return the engine with the first of `kinds` that agrees with plain, else with plain.

    `trial`: what to compare; else two of the pairs, imitated.
    """
    trial = trial or Trial([Row(0, "", tuple(comparison_pairs(pairs)))], Imitation())
    results: list[Comparison] = []
    with _moved_adapter(engine.model):
        wanted = _loss_and_gradient(replace(engine, kind="plain"), trial)
        for kind in kinds:
            candidate = replace(engine, kind=kind)
            results.append(_compare(candidate, trial, wanted))
            if results[-1].is_same:
                return Choice(use_kind(candidate), results)
    return Choice(use_kind(replace(engine, kind="plain")), results)


def use_kind(engine: Engine) -> Engine:
    """Switch the model's fused layers on, or off for plain, and return the engine."""
    use_fused(engine.model, is_fused=engine.kind != "plain")
    return engine


def comparison_pairs(pairs: Sequence[Pair]) -> list[Pair]:
    """Return two short pairs that share as long a prefix as any neighbours do and then part.

    They must part: a pair that only continues another is one path, which layers without branches compute rightly, too.
    """
    distinct = sorted({pair.prompt_ids + pair.answer_ids: pair for pair in pairs}.items())

    def rank(number: int) -> tuple[bool, bool, int, int]:
        (a, _), (b, _) = distinct[number : number + 2]
        num_shared = num_common(a, b)
        does_part = num_shared < min(len(a), len(b)) - 1
        return not does_part, len(a) + len(b) > MAX_TOKENS, -num_shared, len(a) + len(b)

    first = min(range(len(distinct) - 1), key=rank, default=0)
    return [pair for _, pair in distinct[first : first + 2]]


def comparison_rows(rows: Sequence[Row]) -> list[Row]:
    """Return two preference rows whose chosen answers are such pairs."""
    two = comparison_pairs([row.pairs[0] for row in rows])
    return [next(row for row in rows if row.pairs[0] == pair) for pair in two]


def _compare(engine: Engine, trial: Trial, wanted: tuple[float, torch.Tensor]) -> Comparison:
    try:
        loss, gradient = _loss_and_gradient(engine, trial)
    except (UnsupportedError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        return Comparison(engine.kind, problem=f"{type(error).__name__}: {error}")
    loss_difference = abs(loss / wanted[0] - 1)
    gradient_difference = float((gradient - wanted[1]).norm() / wanted[1].norm())
    dtype = engine.transformer.get_input_embeddings().weight.dtype
    max_loss, max_gradient = TOLERANCES.get(dtype, TOLERANCES[torch.bfloat16])
    is_same = loss_difference <= max_loss and gradient_difference <= max_gradient
    return Comparison(engine.kind, loss_difference, gradient_difference, is_same=is_same)


def _loss_and_gradient(engine: Engine, trial: Trial) -> tuple[float, torch.Tensor]:
    """Return the loss of a trial and what is told of its gradient for all trained weights; nothing is left behind."""
    use_kind(engine)
    parameters = [parameter for parameter in engine.model.parameters() if parameter.requires_grad]
    told: dict[int, torch.Tensor] = {}

    def tell(parameter: torch.Tensor) -> None:
        number, gradient = numbers[id(parameter)], parameter.grad
        parameter.grad = None
        if gradient is not None:
            some = _told(gradient, number)
            told[number] = told[number] + some if number in told else some

    numbers = {id(parameter): number for number, parameter in enumerate(parameters)}
    hooks = [parameter.register_post_accumulate_grad_hook(tell) for parameter in parameters]
    try:
        result = train_step(
            engine,
            trial.objective.forwards(engine, trial.rows),
            seeds=(0, 0),
            backward=lambda loss: loss.backward(),
            objective=trial.objective,
            share=whole(engine, trial.rows, objective=trial.objective),
        )
        parts = [
            told[number] if number in told else _told(torch.zeros_like(parameter), number)
            for number, parameter in enumerate(parameters)
        ]
        return result.loss, torch.cat(parts)
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in parameters:
            parameter.grad = None


def _told(gradient: torch.Tensor, seed: int) -> torch.Tensor:
    """Return what is kept of a weight's gradient, in fp32: all of it, or its product with random signs."""
    if gradient.ndim < 2 or gradient.numel() <= MAX_WHOLE:
        return gradient.flatten().float()
    generator = torch.Generator().manual_seed(seed)
    signs_IK = torch.randint(0, 2, (gradient.shape[-1], NUM_SIGNS), generator=generator) * 2.0 - 1
    rows_RI = gradient.flatten(0, -2)
    # Row block by row block, so that no fp32 copy of a large gradient is made.
    signs_IK = signs_IK.to(gradient.device) / NUM_SIGNS**0.5
    return torch.cat([(block.float() @ signs_IK).flatten() for block in rows_RI.split(1 << 14)])


@contextmanager
def _moved_adapter(model: Any) -> Iterator[None]:
    """Inside the block, LoRA's B is not 0 (or A would get no gradient) and nothing is dropped."""
    was_training = model.training
    weights = [parameter for name, parameter in model.named_parameters() if "lora_B" in name]
    saved = [weight.detach().clone() for weight in weights]
    generator = torch.Generator().manual_seed(0)
    model.train()
    for layer in model.modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.eval()
    with torch.no_grad():
        for weight in weights:
            # Added: PiSSA's and OLoRA's B begins at a part of the base.
            weight.add_((torch.randn(weight.shape, generator=generator) * 0.02).to(weight.device))
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, before in zip(weights, saved, strict=True):
                weight.copy_(before)
        model.train(was_training)
