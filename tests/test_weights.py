"""Headers of weight files say what loading them says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from truetune.errors import MachineError, UserError
from truetune.weights import (
    OPTIMIZER,
    check_files,
    count_parameters,
    needed_bytes,
    num_embeddings,
    require_memory,
    weight_files,
)


def test_headers_say_what_is_loaded(tiny_qwen: Path) -> None:
    weights = load_file(tiny_qwen / "model.safetensors")
    check_files(tiny_qwen)
    assert needed_bytes(tiny_qwen, dtype="bfloat16") == 2 * sum(tensor.numel() for tensor in weights.values())
    assert num_embeddings(tiny_qwen) == len(weights["model.embed_tokens.weight"])


def test_embeddings_of_another_name(tmp_path: Path) -> None:
    save_file({"layers.0.weight": torch.zeros(3, 2)}, tmp_path / "model.safetensors")
    assert num_embeddings(tmp_path) is None


@pytest.mark.parametrize("length", [0, 7, 8, 100, -1, 1])
def test_a_file_of_another_length_is_damaged(length: int, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(30)}, path)
    check_files(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content + b"x" if length == 1 else content[:length])
    with pytest.raises(UserError) as caught:
        check_files(tmp_path)
    assert (caught.value.key, caught.value.where) == ("model_file_damaged", str(path))


def test_memory_is_compared_with_the_weights(tiny_qwen: Path) -> None:
    needed = needed_bytes(tiny_qwen, dtype="float32")
    assert needed_bytes(tiny_qwen, dtype="bfloat16") == needed // 2
    require_memory(needed, needed, name="m", dtype="float32")
    with pytest.raises(MachineError) as caught:
        require_memory(needed, needed - 1, name="m", dtype="float32")
    assert caught.value.values["needed"] == needed / 1e9


@pytest.mark.parametrize(("dtype", "each"), [("float32", 16), ("bfloat16", 18)])
def test_full_fine_tuning_needs_more_than_the_weights(dtype: str, each: int, tiny_qwen: Path) -> None:
    """Weight, gradient and two moments in fp32, and the copy in bf16; refused with the numbers."""
    needed = each * count_parameters(tiny_qwen)
    assert needed_bytes(tiny_qwen, dtype=dtype, is_full=True) == needed
    require_memory(needed, needed, name="m", dtype=dtype, is_full=True)
    with pytest.raises(MachineError) as caught:
        require_memory(needed, needed - 1, name="m", dtype=dtype, is_full=True)
    assert (caught.value.key, caught.value.values["each"]) == ("full_too_large", each)
    assert caught.value.values["needed"] == needed / 1e9


def test_a_checkpoints_optimizer_is_no_weights(tmp_path: Path) -> None:
    """Nor is a file that the index does not name."""
    for name in ("model.safetensors", OPTIMIZER):
        save_file({"a": torch.zeros(30)}, tmp_path / name)
    assert [path.name for path in weight_files(tmp_path)] == ["model.safetensors"]
    assert count_parameters(tmp_path) == 30
    index = {"metadata": {}, "weight_map": {"a": "model.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"b": torch.zeros(5)}, tmp_path / "other.safetensors")
    assert [path.name for path in weight_files(tmp_path)] == ["model.safetensors"]
