"""Rows a second of hybrid models: tries, where the state branches, against padded rows of the same pairs.

    python -m bench.hybrid                      a third of Qwen3.5-0.8B's layers, huanhuan's rows: a few minutes
    python -m bench.hybrid --shape lfm2         half of LFM2-350M's
    python -m bench.hybrid --profile trie       where the time of a step goes

Both ways run in one process, on one model of random weights, on the same rows, taking turns step by step. Layers that a
model has more of are the same again, so a few of each kind are enough.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import replace
from typing import Any

import torch
import transformers

from bench.recipe import DATA, LEARNING_RATE, LORA, SYSTEM, TOKENIZER
from bench.report import describe_machine
from bench.scaling import timed_step
from truetune.config import Config
from truetune.data.prepare import prepare
from truetune.data.template import build_renderer
from truetune.engine.compare import use_kind
from truetune.engine.order import epoch_batches
from truetune.engine.step import Engine, make_forwards
from truetune.model import add_lora, choose_dtype, eos_ids, load_tokenizer
from truetune.records import Pair, pairs_of

ROWS_PER_STEP, MAX_TOKENS = 32, 2048
KINDS = ("trie", "padded")
QWEN = {
    "hidden_size": 1024,
    "intermediate_size": 3584,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 16,
    "layer_types": [*["linear_attention"] * 3, "full_attention"] * 2,
    "num_hidden_layers": 8,
}
LFM = {
    "hidden_size": 1024,
    "intermediate_size": 6656,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "layer_types": ["conv", "conv", "full_attention", "conv"] * 2,
    "num_hidden_layers": 8,
}
GRANITE = {
    "hidden_size": 768,
    "shared_intermediate_size": 2048,
    "num_local_experts": 0,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "mamba_n_heads": 48,
    "mamba_d_head": 32,
    "mamba_d_state": 128,
    "layer_types": ["mamba", "mamba", "mamba", "attention"] * 2,
    "num_hidden_layers": 8,
}
SHAPES = {
    "qwen3.5": ("Qwen3_5TextConfig", QWEN),
    "lfm2": ("Lfm2Config", LFM),
    "granite4": ("GraniteMoeHybridConfig", GRANITE),
}


def load_engine(shape: str) -> tuple[Engine, torch.optim.Optimizer]:
    """Return an engine with a model of random weights, and its optimizer."""
    kind, values = SHAPES[shape]
    torch.manual_seed(0)
    config = getattr(transformers, kind)(vocab_size=151936, tie_word_embeddings=True, **values)
    base = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, choose_dtype()[0]))
    lora = {"r": LORA["r"], "alpha": LORA["lora_alpha"], "dropout": LORA["lora_dropout"]}
    model = add_lora(base, **lora, targets=["all-linear"], seed=42).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    return Engine(model, "trie", 0, MAX_TOKENS), optimizer


def steps_of_pairs(num_steps: int) -> list[list[Pair]]:
    """Return the pairs of the first steps on huanhuan's rows, as a run takes them."""
    renderer = build_renderer(load_tokenizer(TOKENIZER), eos_ids(TOKENIZER))
    rows = prepare(Config(data=[str(DATA)], system=SYSTEM, input_join="", eval_split=0), renderer).train
    batches = epoch_batches(len(rows), ROWS_PER_STEP, seed=42, epoch=0)[:num_steps]
    return [pairs_of([rows[int(number)] for number in batch]) for batch in batches]


def measure(shape: str, num_steps: int) -> str:
    """Return a Markdown table of both ways; the first step of each is not counted."""
    engine, optimizer = load_engine(shape)
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    tokens: dict[str, int] = dict.fromkeys(KINDS, 0)
    for step, pairs in enumerate(steps_of_pairs(num_steps + 1)):
        for kind in KINDS:
            one = use_kind(replace(engine, kind=kind))
            forwards = make_forwards(one, pairs)
            took = timed_step(one, optimizer, forwards, step)
            sys.stderr.write(f"step {step}, {kind}: {took:.2f} s\n")
            if step:
                seconds[kind].append(took)
                tokens[kind] += sum(forward.num_tokens for forward in forwards)
    machine = describe_machine()
    lines = [
        f"{machine['date']}, {machine['processor']}, {machine['cores']} cores, load {machine.get('load', '?')}, "
        f"{choose_dtype()[0]}. {shape}, {SHAPES[shape][1]['num_hidden_layers']} layers, {ROWS_PER_STEP} rows a step of "
        f"huanhuan, LoRA r {LORA['r']} on all linear layers, dropout {LORA['lora_dropout']}; medians of {num_steps}.",
        "",
        "| | rows/s | range | tokens a step, padding included |",
        "|---|---|---|---|",
    ]
    for kind in KINDS:
        rates = sorted(ROWS_PER_STEP / took for took in seconds[kind])
        middle = f"{statistics.median(rates):.2f} | {rates[0]:.2f}-{rates[-1]:.2f}"
        lines.append(f"| {kind} | {middle} | {tokens[kind] / num_steps:,.0f} |")
    return "\n".join([*lines, ""])


def profile(shape: str, kind: Any) -> str:
    """Return where the time of one step goes, by operation."""
    engine, optimizer = load_engine(shape)
    engine = use_kind(replace(engine, kind=kind))
    first, second = (make_forwards(engine, pairs) for pairs in steps_of_pairs(2))
    timed_step(engine, optimizer, first, 0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        timed_step(engine, optimizer, second, 1)
    table: str = found.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=60)
    return table


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m bench.hybrid", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="qwen3.5")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--profile", choices=KINDS)
    options = parser.parse_args()
    text = profile(options.shape, options.profile) if options.profile else measure(options.shape, options.steps)
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
