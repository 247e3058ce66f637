"""Twenty steps on real SmolLM2 weights equal a plain transformers + PEFT loop over the same ids, dropout on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from truetune.config import resolve
from truetune.data.prepare import prepare
from truetune.data.template import build_renderer
from truetune.engine import step
from truetune.loop import Loop, Plan
from truetune.records import Pair, Row

pytestmark = pytest.mark.real

STEPS, ROWS_PER_STEP, MAX_TOKENS, SEED, LEARNING_RATE, DROPOUT = 20, 2, 136, 7, 2e-4, 0.1
TOLERANCE = 1e-5
FAULT_STEPS = 3


@pytest.fixture(scope="module")
def rows(smol_tokenizer: Any) -> Sequence[Row]:
    """Every sixth row of the bundled data by length, rendered by the real template: short ones and long ones."""
    path = Path(__file__).resolve().parents[2] / "examples" / "lighthouse.json"
    config = resolve({"data": [str(path)], "eval_split": 0}).config
    prepared = prepare(config, build_renderer(smol_tokenizer, [2]))
    return sorted(prepared.train, key=lambda row: len(row.pairs[0]))[::6][: STEPS * ROWS_PER_STEP]


def make_model(folder: Path) -> Any:
    """Real weights with LoRA on all linear layers, by PEFT alone."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    torch.manual_seed(SEED)
    config = LoraConfig(r=8, lora_alpha=16, lora_dropout=DROPOUT, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config).train()


def adapter_of(model: Any) -> dict[str, torch.Tensor]:
    """The trainable weights, copied."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def run_ours(
    folder: Path,
    rows: Sequence[Row],
    steps: int,
    *,
    seed: int = SEED,
    wrap: Callable[[Callable[[torch.Tensor], None]], Callable[[torch.Tensor], None]] = lambda backward: backward,
) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """Our loop: events of `steps` steps, and the adapter. `wrap` plants a fault into the backward."""
    model = make_model(folder)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE, weight_decay=0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    plan = Plan(steps, ROWS_PER_STEP, seed, MAX_TOKENS, 2, 1.0, steps, steps)
    loop = Loop(model, optimizer, scheduler, plan, wrap(lambda loss: loss.backward()))
    return list(loop.run(rows)), adapter_of(model)


def run_plain(folder: Path, rows: Sequence[Row], events: list[dict[str, Any]]) -> tuple[list[Any], dict[str, Any]]:
    """The plain loop: attention mask, full logits, labels of -100, AdamW; rows and forward sizes as in `events`."""
    model = make_model(folder)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0)
    by_index = {row.index: row for row in rows}
    figures = []
    for event in events:
        pairs = sorted((p for index in event["row_ids"] for p in by_index[index].pairs), key=len)
        num_learned = sum(len(pair.answer_ids) for pair in pairs)
        loss_sum = 0.0
        for number, forward in enumerate(in_forwards(pairs)):
            seed = np.random.SeedSequence([SEED, event["step"], number]).generate_state(1, np.uint64)[0] >> 1
            torch.manual_seed(int(seed))
            width = max(len(pair) for pair in forward)
            ids = torch.tensor([[*p.prompt_ids, *p.answer_ids, *[2] * (width - len(p))] for p in forward])
            is_token = torch.tensor([[n < len(p) for n in range(width)] for p in forward])
            is_answer = torch.tensor([[len(p.prompt_ids) <= n < len(p) for n in range(width)] for p in forward])
            labels = torch.where(is_answer, ids, -100)
            logits = model(input_ids=ids[:, :-1], attention_mask=is_token[:, :-1].long()).logits
            # Flat, as transformers' own loss: over a strided vocabulary torch's fp32 sum is off by 3e-5.
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
            )
            (loss / num_learned).backward()
            loss_sum += loss.item()
        norm = math.sqrt(sum(float((p.grad.double() ** 2).sum()) for p in parameters))
        for parameter in parameters:
            parameter.grad *= min(1.0, 1.0 / norm)
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - (event["step"] - 1) / STEPS)
        optimizer.step()
        optimizer.zero_grad()
        figures.append((loss_sum / num_learned, norm))
    return figures, adapter_of(model)


def in_forwards(pairs: Sequence[Pair]) -> list[list[Pair]]:
    """Split sorted pairs so that rows times the longest is at most MAX_TOKENS."""
    forwards: list[list[Pair]] = [[]]
    for pair in pairs:
        if forwards[-1] and (len(forwards[-1]) + 1) * len(pair) > MAX_TOKENS:
            forwards.append([])
        forwards[-1].append(pair)
    return forwards


def differences(ours: tuple[Any, Any], plain: tuple[Any, Any]) -> dict[str, float]:
    """The largest relative difference of losses and grad norms, and of the adapter by norm."""
    (events, adapter), (figures, plain_adapter) = ours, plain
    apart = torch.cat([(adapter[name] - plain_adapter[name]).flatten() for name in plain_adapter])
    whole = torch.cat([tensor.flatten() for tensor in plain_adapter.values()])
    return {
        "loss": max(abs(e["loss"] / loss - 1) for e, (loss, _) in zip(events, figures, strict=True)),
        "grad_norm": max(abs(e["grad_norm"] / norm - 1) for e, (_, norm) in zip(events, figures, strict=True)),
        "adapter": float(apart.norm() / whole.norm()),
    }


def steps_of(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The step events."""
    return [event for event in events if event["kind"] == "step"]


@pytest.fixture(scope="module")
def ours(smol: Path, rows: Sequence[Row]) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """Step events and adapter of our run."""
    events, adapter = run_ours(smol, rows, STEPS)
    return steps_of(events), adapter


@pytest.fixture(scope="module")
def plain(smol: Path, rows: Sequence[Row], ours: tuple[Any, Any]) -> tuple[list[Any], dict[str, torch.Tensor]]:
    """Losses, grad norms and adapter of the plain loop over the same rows."""
    return run_plain(smol, rows, ours[0])


def test_twenty_steps_equal_a_plain_loop(rows: Sequence[Row], ours: tuple[Any, Any], plain: tuple[Any, Any]) -> None:
    """Loss, grad norm and final adapter within 1e-5; the loss falls, so that this says something."""
    events = ours[0]
    found = differences(ours, plain)
    print(found)
    assert len(events) == STEPS
    by_index = {row.index: row for row in rows}
    num_forwards = [len(in_forwards(sorted((by_index[i].pairs[0] for i in e["row_ids"]), key=len))) for e in events]
    assert set(num_forwards) == {1, 2}
    thirds = [sum(event["loss"] for event in events[at : at + 7]) / 7 for at in (0, 13)]
    assert thirds[1] < thirds[0] - 0.2
    assert all(value <= TOLERANCE for value in found.values()), found


def lose_every_second(backward: Callable[[torch.Tensor], None]) -> Callable[[torch.Tensor], None]:
    """Plant: every second forward's gradient is lost."""
    calls = iter(range(10**6))
    return lambda loss: backward(loss) if next(calls) % 2 == 0 else None


def unmask(row: Row) -> Row:
    """Plant: the prompt is learned, too."""
    pairs = tuple(Pair(p.prompt_ids[:1], p.prompt_ids[1:] + p.answer_ids) for p in row.pairs)
    return Row(row.index, row.where, pairs)


FAULTS: dict[str, dict[str, Any]] = {
    "gradient doubled": {"wrap": lambda backward: lambda loss: backward(2 * loss)},
    "half the gradient lost": {"wrap": lose_every_second},
    "prompt not masked": {"change": unmask},
    "other dropout seed": {"dropout_seed": SEED + 1},
}


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_seen(
    name: str, smol: Path, rows: Sequence[Row], plain: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each fault moves the loss or the grad norm far past the tolerance within a few steps."""
    fault = dict(FAULTS[name])
    change = fault.pop("change", lambda row: row)
    if "dropout_seed" in fault:
        other, right = fault.pop("dropout_seed"), step.dropout_seed
        monkeypatch.setattr(step, "dropout_seed", lambda _seed, at, *, forward: right(other, at, forward=forward))
    events, _ = run_ours(smol, [change(row) for row in rows], FAULT_STEPS, **fault)
    figures = plain[0][:FAULT_STEPS]
    found = [
        max(abs(event["loss"] / loss - 1), abs(event["grad_norm"] / norm - 1))
        for event, (loss, norm) in zip(steps_of(events), figures, strict=True)
    ]
    assert max(found) > 10 * TOLERANCE, found
