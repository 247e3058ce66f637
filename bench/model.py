"""Model folders of random weights, and the rows of a round.

    python -m bench.model 0.6b      makes the folder of one shape, unless it exists, and prints its path

It is made once, in a process of its own: 4B needs 8 GB of memory and of disk for that moment.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.recipe import CACHE, DATA, ROOT, SHAPES, SYSTEM, TOKENIZER, Shape

SPARE_BYTES = 2 << 30
"""Disk to leave free."""


def model_folder(name: str) -> Path:
    """Return the folder of a shape's model; another process makes it if it is not there yet."""
    folder = CACHE / "models" / name
    if not folder.exists():
        sys.stderr.write(f"Making random weights of the {name} shape in {folder} (once)\n")
        subprocess.run([sys.executable, "-m", "bench.model", name], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    return folder


def machine_dtype() -> str:
    """Return the dtype in which this machine trains; asked in another process, so that this one never loads torch."""
    words = [sys.executable, "-c", "from truetune.model import choose_dtype; print(choose_dtype()[0])"]
    return subprocess.run(words, check=True, capture_output=True, text=True, env=on_the_cpu()).stdout.strip()


def on_the_cpu() -> dict[str, str]:
    """Return the variables of a process that is to see no GPU."""
    return os.environ | {"CUDA_VISIBLE_DEVICES": ""}


def build(shape: Shape, folder: Path) -> None:
    """Write configuration, weights in bf16 (normal, 0.02; norms 1) and tokenizer. The weights exist in memory once."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    _check_disk(shape, folder.parent)
    values = {key: value for key, value in vars(shape).items() if key in Qwen3Config().to_dict()}
    config = Qwen3Config(
        **values,
        tie_word_embeddings=True,
        dtype="bfloat16",
        bos_token_id=None,
        eos_token_id=151645,
        pad_token_id=151643,
    )
    with torch.device("meta"):
        model = Qwen3ForCausalLM(config).to(torch.bfloat16)
    model.to_empty(device="cpu")
    model.tie_weights()
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(1.0) if weight.dim() == 1 else weight.normal_(0, 0.02)
    staging = folder.with_name(f".{folder.name}-{id(folder)}")
    model.save_pretrained(staging, max_shard_size="2GB")
    for file in TOKENIZER.iterdir():
        shutil.copy(file, staging)
    staging.rename(folder)


def _check_disk(shape: Shape, parent: Path) -> None:
    parent.mkdir(parents=True, exist_ok=True)
    needed, free = 2 * (shape.layer_weights + shape.head_weights), shutil.disk_usage(parent).free
    if free < needed + SPARE_BYTES:
        sys.exit(f"{parent}: the weights take {needed / 1e9:.1f} GB, free are {free / 1e9:.1f} GB")


def ordered_rows(rows_per_step: int, num_steps: int, *, seed: int) -> list[dict[str, Any]]:
    """Return the rows of the first steps in the order in which truetune takes them."""
    from truetune.engine.order import epoch_batches

    rows = json.loads(DATA.read_text(encoding="utf-8"))
    steps = epoch_batches(len(rows), rows_per_step, seed=seed, epoch=0)[:num_steps]
    return [{"id": int(number), "system": SYSTEM, **rows[number]} for step in steps for number in step]


if __name__ == "__main__":
    path = CACHE / "models" / sys.argv[1]
    if not path.exists():
        build(SHAPES[sys.argv[1]], path)
    sys.stdout.write(f"{path}\n")
