"""What weight files say of themselves, read from their headers: no tensor is loaded.

model.safetensors    8 bytes of length | header: {name: {dtype, shape, data_offsets}} | tensors
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from truetune.errors import MachineError, UserError

INDEX = "model.safetensors.index.json"
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
HEADS = ("lm_head.weight", "embed_out.weight", "output.weight")
BYTES: dict[str, float] = {"float32": 4, "bfloat16": 2, "4bit": 0.52, "8bit": 1.01}
"""Of a weight; of a quantised one with its share of the scales (docs/lora.md)."""

OPTIMIZER = "optimizer.safetensors"
"""The other large file of a checkpoint: no weights of a model."""

FULL_BYTES = {"float32": 16, "bfloat16": 18}
"""Of one weight in full fine-tuning: weight, gradient and AdamW's two moments, each in fp32; and a copy to compute
with, where that is in bf16."""


def weight_files(folder: Path) -> list[Path]:
    """Return the files that hold the weights of a model: those that its index names, else all there are."""
    index = folder / INDEX
    if index.is_file():
        return [folder / name for name in _shards(index)]
    return sorted(path for path in folder.glob("*.safetensors") if path.name != OPTIMIZER)


def check_files(folder: Path) -> None:
    """Refuse weight files that are cut, and an index that names files which are not there, or not in this folder.

    Raises: UserError naming the file.
    """
    _check_index(folder)
    for path in weight_files(folder):
        _tensors(path)


def count_parameters(folder: Path) -> int:
    """Return the parameters in the weight files of a model."""
    headers = [_tensors(path) for path in weight_files(folder)]
    return sum(math.prod(tensor["shape"]) for header in headers for tensor in header.values())


def num_embeddings(folder: Path) -> int | None:
    """Return the rows of the model's embedding matrix: token ids are below it. None if it is not found by name."""
    for path in weight_files(folder):
        for name, tensor in _tensors(path).items():
            if name.endswith(EMBEDDINGS):
                return int(tensor["shape"][0])
    return None


def needed_bytes(folder: Path, *, dtype: str, quantization: str | None = None, is_full: bool = False) -> int:
    """Return what no setting makes smaller: the weights; of full fine-tuning also their gradients and moments.

    `quantization`: of matrices but for embeddings and head; the rest is in `dtype`.
    """
    total = count_parameters(folder)
    if is_full:
        return total * FULL_BYTES[dtype]
    quantised = sum(math.prod(shape) for _, shape in matrices(folder)) if quantization else 0
    return int((total - quantised) * BYTES[dtype] + quantised * BYTES[quantization or dtype])


def matrices(folder: Path) -> Iterator[tuple[str, list[int]]]:
    """Yield name and shape [out, in] of what quantisation takes: matrices but for embeddings and head."""
    for path in weight_files(folder):
        for name, tensor in _tensors(path).items():
            if len(tensor["shape"]) == 2 and not name.endswith(EMBEDDINGS + HEADS):
                yield name, tensor["shape"]


def require_memory(needed: int, free: int, *, name: str, dtype: str, is_full: bool = False) -> None:
    """Raise MachineError, with the numbers, if the needed bytes of a base would not fit into the free ones."""
    if needed > free:
        values = {"needed": needed / 1e9, "free": free / 1e9, "dtype": dtype}
        if is_full:
            raise MachineError("full_too_large", where=name, fix="full_too_large", each=FULL_BYTES[dtype], **values)
        raise MachineError("base_too_large", where=name, fix="base_too_large", **values)


def _check_index(folder: Path) -> None:
    index = folder / INDEX
    if not index.is_file():
        return
    for name in _shards(index):
        if Path(name).name != name or not (folder / name).is_file():
            raise UserError("model_shard_missing", where=str(index), fix="model_broken", name=name)


def _shards(index: Path) -> list[str]:
    """Return the names of the files that an index names."""
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, LookupError, AttributeError, TypeError):
        raise UserError("model_file_damaged", where=str(index), fix="model_broken") from None


def _tensors(path: Path) -> dict[str, Any]:
    """Return the header of a file, whose end must be the end of its last tensor."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            size = path.stat().st_size - 8 - length
            header: dict[str, Any] = json.loads(file.read(length)) if size >= 0 else {}
        header.pop("__metadata__", None)
        is_whole = max((tensor["data_offsets"][1] for tensor in header.values()), default=-1) == size
    except (ValueError, LookupError, AttributeError, TypeError):
        is_whole = False
    if not is_whole:
        raise UserError("model_file_damaged", where=str(path), fix="model_broken")
    return header
