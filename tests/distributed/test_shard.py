"""A base spread over ranks: the same run as in one process, DTensors, less memory a rank. And dropout over ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from several import Told, apart, work
from worker import ADAM_EPS, SEED, rows_of, train

from truetune.engine.compare import use_kind
from truetune.engine.deal import deal
from truetune.engine.objective import Share, train_step
from truetune.engine.order import batches
from truetune.engine.shard import shard
from truetune.engine.step import Engine, make_forwards
from truetune.errors import UserError
from truetune.model import add_lora
from truetune.ranks import ALONE
from truetune.records import pairs_of

pytestmark = pytest.mark.slow

STEPS, ROWS_PER_STEP, TOLERANCE, LEARNING_RATE, DROPOUT = 10, 4, 1e-5, 3e-3, 0.1
CASES: list[dict[str, Any]] = [
    {"strategy": "shard"},
    {"strategy": "shard", "is_checkpointed": True},
    {"strategy": "shard", "kind": "padded"},
    {"strategy": "shard", "kind": "plain"},
    {"strategy": "replicate"},
    {"strategy": "replicate", "kind": "padded"},
    {"strategy": "replicate", "dropout": DROPOUT},
    {"strategy": "shard", "dropout": DROPOUT},
    {"strategy": "replicate", "dropout": DROPOUT, "plant": "other dropout seed"},
    {"strategy": "replicate", "dropout": DROPOUT, "plant": "one dropout for all ranks"},
    {"strategy": "shard", "plant": "mean instead of sum"},
    {"strategy": "shard", "plant": "a rank not summed"},
]


@pytest.fixture(scope="module")
def job(tiny_qwen: Path) -> dict[str, Any]:
    """Rows that share a prefix, of one to three pairs, and of unequal length, so that ranks get unequal work."""
    draw = torch.Generator().manual_seed(0)

    def some(number: int) -> list[int]:
        return torch.randint(1000, 1200, (number,), generator=draw).tolist()

    system = some(12)
    rows = []
    for number in range(STEPS * ROWS_PER_STEP):
        turn = some(3 + number % 7)
        # One way to answer, so that it is learned in a few steps.
        pairs = [(system + turn, list(range(1000, 1002 + number % 5)))]
        for _ in range(number % 3):
            pairs.append((pairs[-1][0] + pairs[-1][1] + some(4), [1000, 1001, 1002]))
        rows.append(pairs)
    sizes = {"steps": STEPS, "rows_per_step": ROWS_PER_STEP, "max_tokens": 64, "learning_rate": LEARNING_RATE}
    return {"model": str(tiny_qwen), "rows": rows, **sizes}


@pytest.fixture(scope="module")
def found(job: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Told, dict[str, Any]]]:
    """Every case, in two processes."""
    return work(tmp_path_factory.mktemp("two"), [job | case for case in CASES], num_ranks=2)


@pytest.fixture(scope="module")
def alone(job: dict[str, Any]) -> dict[str, Told]:
    """One process, by kind of forward."""
    return {kind: train(ALONE, job | {"kind": kind})[:2] for kind in ("trie", "padded", "plain")}


def by_hand(job: dict[str, Any]) -> Told:
    """Two ranks' shares computed one after the other in this process, and added: what ranks must come to."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    model = add_lora(model, r=8, alpha=16, dropout=DROPOUT, targets=["all-linear"], seed=SEED).train()
    engine = use_kind(Engine(model, "trie", 2, job["max_tokens"]))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, eps=ADAM_EPS, weight_decay=0)
    rows, events = rows_of(job["rows"]), []
    order = batches(len(rows), ROWS_PER_STEP, seed=SEED)
    for step in range(1, STEPS + 1):
        pairs = pairs_of([rows[number] for number in next(order)[1]])
        learned, loss = sum(len(pair.answer_ids) for pair in pairs), 0.0
        for rank, own in enumerate(deal(pairs, 2, is_shared=True)):
            part = train_step(
                engine,
                make_forwards(engine, own),
                seeds=(SEED, step),
                backward=lambda loss: loss.backward(),
                share=Share(learned, rank, 2),
            )
            loss += part.loss
        norm = float(torch.nn.utils.clip_grad_norm_(trained, 1.0))
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - (step - 1) / 40)
        optimizer.step()
        optimizer.zero_grad()
        events.append({"kind": "step", "loss": loss, "grad_norm": norm})
    return events, {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def test_every_case_equals_one_process(
    job: dict[str, Any], found: list[tuple[Told, dict[str, Any]]], alone: dict[str, Told]
) -> None:
    """Loss, grad norm, held-out loss and adapter within 1e-5; with dropout, as two shares computed by hand."""
    dropped = by_hand(job)
    num_right = num_planted = 0
    for case, (told, _) in zip(CASES, found, strict=True):
        wanted = alone[case.get("kind", "trie")]
        if "dropout" in case:
            told, wanted = ([event for event in told[0] if event["kind"] == "step"], told[1]), dropped
        figures = apart(told, wanted)
        if "plant" in case:
            num_planted += 1
            assert figures["adapter"] > 100 * TOLERANCE, (case, figures)
        else:
            num_right += 1
            assert all(value <= TOLERANCE for value in figures.values()), (case, figures)
    assert (num_right, num_planted) == (8, 4)
    assert dropped[0][-1]["loss"] != alone["trie"][0][-2]["loss"]


def test_weights_are_spread_and_memory_is_less(found: list[tuple[Told, dict[str, Any]]]) -> None:
    """Every frozen weight of the layers is a DTensor, of which a rank holds half; what is trained is whole."""
    facts = dict(zip((str(case) for case in CASES), (facts for _, facts in found), strict=True))
    whole, spread = facts[str(CASES[4])], facts[str(CASES[0])]
    assert whole["spread"] == []
    assert whole["most_held"] == whole["all"]
    assert len(spread["spread"]) == 2 * 11  # 7 projections and 4 norms a layer
    assert all(".layers." in name and "lora_" not in name for name in spread["spread"])
    num_layers = 2 * (32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 64 + 2 * 32 + 2 * 8)
    assert spread["most_held"] == whole["all"] - num_layers // 2


def test_loss_falls(alone: dict[str, Told]) -> None:
    losses = [event["loss"] for event in alone["trie"][0] if event["kind"] == "step"]
    assert len(losses) == STEPS
    assert losses[-1] < losses[0] - 0.02


def test_what_cannot_be_spread_is_refused() -> None:
    """No list of layers; or nothing frozen in them."""
    import types

    class Plain(torch.nn.Module):
        base_model = property(lambda self: self)

    with pytest.raises(UserError) as error:
        shard(Plain(), None)
    assert error.value.key == "shard_no_layers"
    model: Any = Plain()
    model.layers = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
    with pytest.raises(UserError) as error:
        shard(model, types.SimpleNamespace())  # type: ignore[arg-type]
    assert error.value.key == "shard_all_trained"
