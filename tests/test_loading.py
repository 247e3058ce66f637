"""The model to train: LoRA or all weights, a base that is loaded already, and what is refused before loading."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from truetune import loading
from truetune.config import resolve
from truetune.console import Console
from truetune.errors import MachineError
from truetune.loading import load_bare, load_model
from truetune.model import count_parameters
from truetune.preflight import Preflight, preflight
from truetune.weights import needed_bytes

QUIET = Console(quiet=True)


@pytest.fixture
def begin(write_json: Callable[..., Path], tiny_base: Path) -> Callable[..., tuple[Any, Preflight]]:
    """Settings and preflight of a run on the small base."""
    rows = [{"instruction": f"What is {n}?", "output": f"It is {n}."} for n in range(12)]

    def make(**keys: Any) -> tuple[Any, Preflight]:
        settings = resolve({"data": [str(write_json(rows))], "model": str(tiny_base), "eval_split": 0, **keys})
        return settings, preflight(settings.config, QUIET)

    return make


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lora_trains_little_and_full_all(dtype: str, begin: Callable[..., Any]) -> None:
    """LoRA's weights are fp32 on a base in the dtype; whole models are fp32: they are the optimizer's weights."""
    settings, model = load_model(*begin(dtype=dtype), console=QUIET)
    trained, total = count_parameters(model)
    assert settings.config.dtype == dtype
    assert 0 < trained < total
    assert {str(p.dtype) for p in model.parameters() if p.requires_grad} == {"torch.float32"}
    assert model.get_input_embeddings().weight.dtype == getattr(torch, dtype)
    settings, model = load_model(*begin(dtype=dtype, finetuning="full"), console=QUIET)
    trained, total = count_parameters(model)
    assert trained == total
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_base_that_is_there_is_not_loaded_again(begin: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    settings, flight = begin(dtype="float32")
    settings, bare = load_bare(settings, flight, console=QUIET)
    monkeypatch.setattr(loading, "load_base", lambda *_: pytest.fail("loaded twice"))
    _, model = load_model(settings, replace(flight, bare_model=bare), console=QUIET)
    assert model.get_base_model() is bare


@pytest.mark.parametrize(("keys", "key"), [({}, "base_too_large"), ({"finetuning": "full"}, "full_too_large")])
def test_what_does_not_fit_is_refused_before_loading(
    keys: dict[str, Any], key: str, begin: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two processes side by side, each has half."""
    settings, flight = begin(dtype="float32", **keys)
    needed = needed_bytes(flight.base.folder, dtype="float32", is_full=bool(keys))
    memory = psutil.virtual_memory()
    monkeypatch.setattr(loading.psutil, "virtual_memory", lambda: memory._replace(available=2 * needed - 2))
    monkeypatch.setattr(loading, "free_bytes", lambda _: 2 * needed - 2)
    load_bare(settings, flight, console=QUIET)
    monkeypatch.setattr(loading, "load_base", lambda *_: pytest.fail("loaded"))
    with pytest.raises(MachineError) as caught:
        load_bare(settings, flight, console=QUIET, num_sharing=2)
    assert caught.value.key == key
