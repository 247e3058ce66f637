"""The adapter folder works in plain PEFT and gives the same logits as our own loading."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from truetune.cli import run
from truetune.use import load


@pytest.fixture(scope="module")
def trained(tiny_qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run with a high learning rate, so that the adapter changes the logits."""
    folder = tmp_path_factory.mktemp("run")
    rows = [{"instruction": f"Number {n}", "input": "", "output": f"{n} it is"} for n in range(12)]
    (folder / "data.json").write_text(json.dumps(rows), encoding="utf-8")
    arguments = ["--model", str(tiny_qwen), "--max-steps", "3", "--learning-rate", "1e-2", "--batch-size", "4"]
    assert run(["train", str(folder / "data.json"), *arguments, "--output-dir", str(folder / "out")]) == 0
    return folder / "out"


def logits_of(model: Any, ids: list[int]) -> torch.Tensor:
    """The logits of one row."""
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


def test_plain_peft_gives_the_same_logits(trained: Path, tiny_qwen: Path) -> None:
    """Bit-equal to ours, and far from the base's, so the adapter is not trivial."""
    ours = load(trained)
    base = AutoModelForCausalLM.from_pretrained(str(tiny_qwen), dtype=ours.model.dtype)
    tokenizer = AutoTokenizer.from_pretrained(str(trained / "adapter"))
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "Number 3"}], add_generation_prompt=True)[
        "input_ids"
    ]
    assert ids == ours.renderer.prompt_ids([{"role": "user", "content": "Number 3"}])
    base_logits = logits_of(base, ids)
    plain = PeftModel.from_pretrained(base, str(trained / "adapter")).eval()
    assert torch.equal(logits_of(plain, ids), logits_of(ours.model, ids))
    assert (logits_of(plain, ids) - base_logits).abs().max() > 1e-2


def test_adapter_folder_is_peft_layout(trained: Path) -> None:
    """The files that other tools look for are there, and no pickle is."""
    names = {path.name for path in (trained / "adapter").iterdir()}
    needed = {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "chat_template.jinja", "README.md"}
    assert needed | {"truetune.json"} <= names
    assert not [path for path in trained.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl")]


def test_base_is_untouched(trained: Path, tiny_qwen: Path, write_json: Callable[..., Path]) -> None:
    """With the adapter off, our loaded run answers as the base does (E9)."""
    ours = load(trained)
    ids = ours.renderer.prompt_ids([{"role": "user", "content": "Number 3"}])
    with ours.model.disable_adapter():
        assert torch.equal(
            logits_of(ours.model, ids),
            logits_of(AutoModelForCausalLM.from_pretrained(str(tiny_qwen), dtype=ours.model.dtype), ids),
        )
