"""A run of a hybrid model by its recipe: tries are chosen, and what was trained is what plain PEFT computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from truetune.cli import run
from truetune.config import examples_folder
from truetune.engine.fused import fuse
from truetune.model import find_base, load_adapter, load_base
from truetune.rundir import RunDir

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("short_answers")]

LAYERS = ["linear_attention", "linear_attention", "linear_attention", "full_attention"]


@pytest.fixture(scope="module")
def tiny_hybrid(qwen_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Qwen3.5 of 4 layers, hidden size 32, and a real tokenizer."""
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    folder = tmp_path_factory.mktemp("models") / "tiny-qwen3.5"
    torch.manual_seed(0)
    config = Qwen3_5TextConfig(
        vocab_size=len(qwen_tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        layer_types=LAYERS,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        tie_word_embeddings=True,
        eos_token_id=151645,
        pad_token_id=151643,
    )
    Qwen3_5ForCausalLM(config).save_pretrained(folder)
    qwen_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def hybrid_run(tiny_hybrid: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of examples/qwen3.5.yaml, in fp32."""
    out = tmp_path_factory.mktemp("hybrid") / "run"
    words = ["--config", str(examples_folder() / "qwen3.5.yaml"), "--model", str(tiny_hybrid), "--dtype", "float32"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(examples_folder().parent)
        assert run(["train", *words, "--max-steps", "2", "--output-dir", str(out)]) == 0
    return out


def test_tries_are_chosen(hybrid_run: Path) -> None:
    """The comparison before step 1 takes tries, and a step computes fewer tokens than its rows have."""
    events = list(RunDir(hybrid_run).read_events())
    (compared,) = [event for event in events if event["kind"] == "comparison"]
    assert (compared["attention"], compared["is_same"]) == ("trie", True)
    steps = [event for event in events if event["kind"] == "step"]
    assert [event["step"] for event in steps] == [1, 2]


def test_plain_peft_computes_what_was_trained(hybrid_run: Path, tiny_hybrid: Path) -> None:
    """The adapter in plain PEFT on plain transformers gives the same logits, and both generate the same by a cache."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = load_base(find_base(str(tiny_hybrid)), "float32")
    assert fuse(base) > 3 * 2
    ours = load_adapter(base, hybrid_run / "adapter").eval()
    base = AutoModelForCausalLM.from_pretrained(tiny_hybrid, dtype=torch.float32)
    plain = PeftModel.from_pretrained(base, hybrid_run / "adapter").eval()
    moved = [value for name, value in plain.named_parameters() if "lora_B" in name and float(value.abs().max()) > 0]
    assert len(moved) >= 3 * 5 + 4
    ids = torch.arange(100, 120)[None]
    with torch.no_grad():
        assert torch.allclose(ours(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-5)
        tokens = [model.generate(input_ids=ids, max_new_tokens=8, do_sample=False) for model in (ours, plain)]
    assert torch.equal(*tokens)
