"""Run by torchrun in every rank: our loop on given rows, once for each job; rank 0 writes what came out.

    torchrun --nproc-per-node N worker.py JOBS.json

A job: `model` (folder), `rows` (lists of pairs of ids), and the keys of `train`. `plant` is a fault, see PLANTS.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from truetune.engine import objective
from truetune.engine.compare import use_kind
from truetune.engine.memory import peak_of, set_checkpointing
from truetune.engine.shard import make_mesh, shard
from truetune.engine.step import Engine
from truetune.evaluate import loss_evaluator
from truetune.loop import Loop, Plan
from truetune.model import add_lora
from truetune.ranks import ALONE, Ranks, connected
from truetune.records import Pair, Row

SEED, LEARNING_RATE, ADAM_EPS = 7, 2e-4, 1e-6
"""AdamW's own eps of 1e-8 makes whole updates of gradients that are 0 but for rounding (docs/log.md)."""

Event = dict[str, Any]


def rows_of(ids: Sequence[Any]) -> list[Row]:
    """Rows of lists of (prompt ids, answer ids)."""
    return [
        Row(number, f"row {number}", tuple(Pair(tuple(prompt), tuple(answer)) for prompt, answer in pairs))
        for number, pairs in enumerate(ids)
    ]


def train(ranks: Ranks, job: dict[str, Any]) -> tuple[list[Event], dict[str, torch.Tensor], dict[str, Any]]:
    """Take the steps of a job; return events, adapter and facts of the weights."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    model = add_lora(model, r=8, alpha=16, dropout=job.get("dropout", 0.0), targets=["all-linear"], seed=SEED).train()
    is_sharded = job.get("strategy") == "shard"
    if is_sharded:
        model = shard(model, make_mesh(ranks.size))
    trained = [p for p in model.parameters() if p.requires_grad]
    rate = job.get("learning_rate", LEARNING_RATE)
    optimizer = torch.optim.AdamW(trained, lr=rate, eps=ADAM_EPS, weight_decay=0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 40)
    engine = use_kind(Engine(model, job.get("kind", "trie"), 2, job["max_tokens"], is_sharded=is_sharded))
    set_checkpointing(engine, is_on=job.get("is_checkpointed", False))
    plan = Plan(job["steps"], job["rows_per_step"], SEED, 1.0, 10, 1000)
    rows = rows_of(job["rows"])
    loop = Loop(engine, optimizer, scheduler, plan, lambda loss: loss.backward(), ranks=ranks)
    with planted(job.get("plant"), ranks, rows) as seen, peak_of(engine.device) as peak:
        events = list(loop.run(seen, evaluate=loss_evaluator(engine, rows[:5], ranks=ranks)))
    adapter = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    return events, adapter, facts(model) | {"peak": peak()}


def facts(model: Any) -> dict[str, Any]:
    """How much of the weights this rank holds, and which of them are spread."""
    held = {name: p.to_local().numel() if isinstance(p, DTensor) else p.numel() for name, p in model.named_parameters()}
    spread = sorted(name for name, p in model.named_parameters() if isinstance(p, DTensor))
    return {"held": sum(held.values()), "all": sum(p.numel() for p in model.parameters()), "spread": spread}


# --- faults ---


def _scaled(right: Any, factor: Callable[[Ranks], float]) -> Any:
    def wrong(self: Ranks, parameters: Any, numbers: Any) -> list[float]:
        parts = [p for p in parameters if p.requires_grad]
        told: list[float] = right(self, parts, numbers)
        for part in parts:
            part.grad *= factor(self)
        return told

    return wrong


def _one_lost(right: Any) -> Any:
    def wrong(self: Ranks, parameters: Any, numbers: Any) -> list[float]:
        parts = [p for p in parameters if p.requires_grad]
        for part in parts if self.rank == 1 else ():
            part.grad = None
        told: list[float] = right(self, parts, numbers)
        return told

    return wrong


def unmasked(rows: Sequence[Row]) -> list[Row]:
    """The prompt is learned, too."""
    return [
        Row(r.index, r.where, tuple(Pair(p.prompt_ids[:1], p.prompt_ids[1:] + p.answer_ids) for p in r.pairs))
        for r in rows
    ]


SUMS = {
    "sum of sums": lambda right: _scaled(right, lambda ranks: ranks.size),
    "mean instead of sum": lambda right: _scaled(right, lambda ranks: 1 / ranks.size),
    "a rank not summed": _one_lost,
}
PLANTS = (*SUMS, "prompt not masked", "other dropout seed", "one dropout for all ranks")


@contextlib.contextmanager
def planted(plant: str | None, ranks: Ranks, rows: Sequence[Row]) -> Iterator[Sequence[Row]]:
    """Give the rows to train, with a fault planted inside the block."""
    right_sum, right_seed = Ranks.sum_gradients, objective.dropout_seed
    if plant in SUMS:
        Ranks.sum_gradients = SUMS[plant](right_sum)  # type: ignore[method-assign]
    if plant == "other dropout seed":
        objective.dropout_seed = lambda _, at, *, forward: right_seed(SEED + 1, at, forward=forward)
    if plant == "one dropout for all ranks":
        objective.dropout_seed = lambda seed, at, *, forward: right_seed(seed, at, forward=forward // ranks.size)
    try:
        yield unmasked(rows) if plant == "prompt not masked" else rows
    finally:
        Ranks.sum_gradients, objective.dropout_seed = right_sum, right_seed  # type: ignore[method-assign]


def main(path: Path) -> None:
    """Run every job of a file."""
    with connected() as ranks:
        for number, job in enumerate(json.loads(path.read_text())):
            events, adapter, held = train(ranks, job)
            held |= {"most_held": ranks.most(held["held"]), "most_peak": ranks.most(held["peak"])}
            if ranks.is_main:
                save_file(adapter, path.with_name(f"{ranks.size}-{number}.safetensors"))
                told = json.dumps({"events": events, "facts": held, "alone": ranks == ALONE})
                path.with_name(f"{ranks.size}-{number}.json").write_text(told)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    # As the command line does, see cli.py.
    sys.stdout.flush()
    os._exit(0)
