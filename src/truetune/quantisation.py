"""Bases that bitsandbytes keeps in 4 or 8 bits: how transformers is told, whether it can run here, what it takes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from truetune.errors import UserError
from truetune.weights import matrices

BITS: dict[str, Callable[[Any], dict[str, Any]]] = {
    # As QLoRA does (arXiv:2305.14314): NormalFloat, the scales of blocks of 64 quantised once more.
    "4bit": lambda dtype: {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": dtype,
    },
    "8bit": lambda _dtype: {"load_in_8bit": True},
}
"""The values of `quantization` → what bitsandbytes is told."""

BLOCK = 64
"""Weights that share a scale in 4 bits. Where rows are no whole blocks, bitsandbytes 0.50 reads other weights back on a
CPU than it wrote: 27 % of a [64, 96] matrix's norm are wrong, against 9 % for rounding."""


def arguments(kind: str | None, *, dtype: Any) -> dict[str, Any]:
    """Return what from_pretrained is told for a base of `kind`; {} for None."""
    if kind is None:
        return {}
    from transformers import BitsAndBytesConfig

    return {"quantization_config": BitsAndBytesConfig(**BITS[kind](dtype))}


def require(kind: str, *, folder: Path, name: str) -> None:
    """Refuse what cannot run, before any weight is read. `folder`, `name`: of the base.

    Raises: UserError if bitsandbytes is missing or has no code for this machine, or the base is quantised already.
    """
    own = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config")
    if own is not None:
        method = own.get("quant_method", "?")
        raise UserError("quantised_twice", where=name, fix="quantised_twice", kind=kind, method=method)
    from truetune.engine.quiet import has_bitsandbytes

    if not has_bitsandbytes:
        raise UserError("extra_missing", where=f"quantization: {kind}", fix="extra_missing", extra="quant")
    import bitsandbytes
    from bitsandbytes.cextension import ErrorHandlerMockBNBNativeLibrary, lib

    if isinstance(lib, ErrorHandlerMockBNBNativeLibrary):
        values = {"version": bitsandbytes.__version__, "kind": kind}
        raise UserError("quantisation_machine", where=f"quantization: {kind}", fix="quantisation_machine", **values)
    for tensor, (_, width) in matrices(folder) if kind == "4bit" else ():
        if width % BLOCK:
            raise UserError("quantisation_width", where=name, fix="quantisation_width", name=tensor, width=width)
