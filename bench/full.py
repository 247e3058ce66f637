"""Full fine-tuning: rows a second and peak memory beside transformers' Trainer, on real SmolLM2 weights.

    python -m bench.full                three minutes on two cores

Every way trains the same rows in the same order, 16 a step, each round in a process of its own, taking turns:

    truetune        tries, learned positions only, fp32 masters behind a bf16 copy
    trainer         transformers.Trainer: padding, whole logits, fp32 weights under autocast (bf16=True)
    copy, autocast  the same plain padded rows by the model's own code, to compare the two ways to compute in bf16 alone

In fp32 hardware all of them compute in fp32; the last two are then one.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from bench.recipe import RESULTS, ROOT
from bench.report import describe_machine

ROWS_PER_STEP, WARM_STEPS, LEARNING_RATE = 16, 1, 1e-5


def prepared(num_steps: int, **keys: Any) -> tuple[Any, Any]:
    """Return settings and preflight of the run: the bundled rows, real weights, nothing held out."""
    from truetune.commands.demo import demo_model
    from truetune.config import resolve
    from truetune.console import Console
    from truetune.preflight import preflight

    data = str(ROOT / "examples" / "lighthouse.json")
    flags = {"data": [data], "model": demo_model(), "finetuning": "full", "eval_split": 0, "sample_prompts": "none"}
    settings = resolve({**flags, "max_steps": num_steps, "lr_scheduler_type": "constant", "warmup_ratio": 0, **keys})
    return settings, preflight(settings.config, Console(quiet=True))


def by_truetune(num_steps: int) -> list[float]:
    """Return the seconds of each step of our own loop, nothing chosen by hand."""
    from truetune.assembly import assemble
    from truetune.console import Console

    settings, flight = prepared(num_steps)
    with tempfile.TemporaryDirectory() as folder:
        assembly = assemble(settings, flight, folder=Path(folder), console=Console(quiet=True))
        events = list(assembly.loop.run(flight.prepared.train))
    return [event["seconds"] for event in events if event["kind"] == "step"]


def ordered(flight: Any, num_steps: int) -> Iterator[list[Any]]:
    """Yield the pairs of each step, in the order in which we train."""
    from truetune.engine.order import batches
    from truetune.records import pairs_of

    rows = flight.prepared.train
    for _, (_, numbers) in zip(range(num_steps), batches(len(rows), ROWS_PER_STEP, seed=42), strict=False):
        yield pairs_of([rows[int(number)] for number in numbers])


def by_trainer(num_steps: int) -> list[float]:
    """Return the seconds of each step of transformers' Trainer, its defaults but for the recipe's numbers."""
    from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

    from truetune.model import choose_dtype

    _, flight = prepared(num_steps)
    rows = [
        {"input_ids": [*p.prompt_ids, *p.answer_ids], "labels": [*[-100] * len(p.prompt_ids), *p.answer_ids]}
        for pairs in ordered(flight, num_steps)
        for p in pairs
    ]
    seconds: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            seconds.append(-time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds[-1] += time.perf_counter()

    class InOrder(Trainer):  # type: ignore[misc]
        def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
            from torch.utils.data import SequentialSampler

            return SequentialSampler(rows)

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=ROWS_PER_STEP,
            max_steps=num_steps,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            bf16=choose_dtype()[0] == "bfloat16",
            use_cpu=True,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        model = AutoModelForCausalLM.from_pretrained(str(flight.base.folder), dtype="float32")
        collate = DataCollatorForSeq2Seq(flight.renderer.tokenizer, padding=True)
        InOrder(model, arguments, train_dataset=rows, data_collator=collate, callbacks=[Clock()]).train()
    return seconds


def by_hand(num_steps: int, *, is_copy: bool) -> list[float]:
    """Return the seconds of each step of padded rows by the model's own code, on a bf16 copy or under autocast."""
    import torch

    from truetune.engine.compare import use_kind
    from truetune.engine.master import keep_masters
    from truetune.engine.objective import train_step
    from truetune.engine.step import Engine, make_forwards
    from truetune.model import choose_dtype, load_base, train_all

    _, flight = prepared(num_steps)
    dtype = getattr(torch, choose_dtype()[0])
    model = train_all(load_base(flight.base, "float32"))
    masters = keep_masters(model, dtype if is_copy else torch.float32)
    masters.gather()
    optimizer = torch.optim.AdamW(masters.weights, lr=LEARNING_RATE, fused=True)
    optimizer.register_step_post_hook(masters.refresh)
    engine = use_kind(Engine(model, "plain", 0, 2048))
    seconds = []
    is_auto = not is_copy and dtype != torch.float32
    for number, pairs in enumerate(ordered(flight, num_steps)):
        began = time.perf_counter()
        with torch.autocast("cpu", dtype) if is_auto else nullcontext():
            train_step(engine, make_forwards(engine, pairs), seeds=(0, number), backward=lambda loss: loss.backward())
        torch.nn.utils.clip_grad_norm_(masters.weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - began)
    return seconds


WAYS: dict[str, Callable[[int], list[float]]] = {
    "truetune": by_truetune,
    "trainer": by_trainer,
    "copy": lambda num_steps: by_hand(num_steps, is_copy=True),
    "autocast": lambda num_steps: by_hand(num_steps, is_copy=False),
}


def measured(name: str, num_steps: int) -> dict[str, Any]:
    """Return the seconds and the peak memory of a way, from a process of its own."""
    words = [sys.executable, "-m", "bench.full", "--only", name, "--steps", str(num_steps)]
    told = subprocess.run(words, check=True, capture_output=True, text=True, cwd=ROOT).stdout.splitlines()[-1]
    found: dict[str, Any] = json.loads(told)
    return found


def main() -> None:
    """Measure, print the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=WAYS)
    parser.add_argument("--steps", type=int, default=4, help="measured steps a round")
    parser.add_argument("--rounds", type=int, default=2)
    asked = parser.parse_args()
    if asked.only:
        seconds = WAYS[asked.only](asked.steps + WARM_STEPS)[WARM_STEPS:]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        sys.stdout.write(json.dumps({"seconds": seconds, "peak_bytes": peak}) + "\n")
        return
    machine = describe_machine()
    rounds = [{name: measured(name, asked.steps) for name in WAYS} for _ in range(asked.rounds)]
    lines = [
        "# Full fine-tuning",
        "",
        f"{machine['date']}, {machine['processor']}, {machine['cores']} cores. SmolLM2-135M, {ROWS_PER_STEP} rows of "
        f"the bundled data a step; median of {asked.steps * asked.rounds} steps, and their range.",
        "",
        "| | rows/s | seconds a step | peak memory |",
        "|---|---|---|---|",
    ]
    for name in WAYS:
        seconds = sorted(one for some in rounds for one in some[name]["seconds"])
        median, peak = statistics.median(seconds), max(some[name]["peak_bytes"] for some in rounds)
        times = f"{median:.2f} ({seconds[0]:.2f} to {seconds[-1]:.2f})"
        lines.append(f"| {name} | {ROWS_PER_STEP / median:.1f} | {times} | {peak / 1e9:.1f} GB |")
    text = "\n".join(lines) + "\n"
    sys.stdout.write(text)
    (RESULTS / "full.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
