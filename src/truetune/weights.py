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

EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
HEADS = ("lm_head.weight", "embed_out.weight", "output.weight")
BYTES: dict[str, float] = {"float32": 4, "bfloat16": 2, "4bit": 0.52, "8bit": 1.01}
"""Of a weight; of a quantised one with its share of the scales (docs/lora.md)."""


def check_files(folder: Path) -> None:
    """Refuse weight files that are cut, and an index that names files which are not there, or not in this folder.

    Raises: UserError naming the file.
    """
    _check_index(folder)
    for path in sorted(folder.glob("*.safetensors")):
        _tensors(path)


def num_embeddings(folder: Path) -> int | None:
    """Return the rows of the model's embedding matrix: token ids are below it. None if it is not found by name."""
    for path in folder.glob("*.safetensors"):
        for name, tensor in _tensors(path).items():
            if name.endswith(EMBEDDINGS):
                return int(tensor["shape"][0])
    return None


def needed_bytes(folder: Path, *, dtype: str, quantization: str | None = None) -> int:
    """Return what the weights take in memory: matrices but for embeddings and head quantised, the rest in `dtype`."""
    headers = [_tensors(path) for path in folder.glob("*.safetensors")]
    total = sum(math.prod(tensor["shape"]) for header in headers for tensor in header.values())
    quantised = sum(math.prod(shape) for _, shape in matrices(folder)) if quantization else 0
    return int((total - quantised) * BYTES[dtype] + quantised * BYTES[quantization or dtype])


def matrices(folder: Path) -> Iterator[tuple[str, list[int]]]:
    """Yield name and shape [out, in] of what quantisation takes: matrices but for embeddings and head."""
    for path in folder.glob("*.safetensors"):
        for name, tensor in _tensors(path).items():
            if len(tensor["shape"]) == 2 and not name.endswith(EMBEDDINGS + HEADS):
                yield name, tensor["shape"]


def require_memory(folder: Path, *, name: str, dtype: str, free_bytes: int, quantization: str | None = None) -> None:
    """Raise MachineError, with the numbers, if the weights alone would not fit into what is free."""
    needed = needed_bytes(folder, dtype=dtype, quantization=quantization)
    if needed > free_bytes:
        values = {"needed": needed / 1e9, "free": free_bytes / 1e9, "dtype": quantization or dtype}
        raise MachineError("base_too_large", where=name, fix="base_too_large", **values)


def _check_index(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, LookupError, AttributeError, TypeError):
        raise UserError("model_file_damaged", where=str(index), fix="model_broken") from None
    for name in sorted(names):
        if Path(name).name != name or not (folder / name).is_file():
            raise UserError("model_shard_missing", where=str(index), fix="model_broken", name=name)


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
