"""An adapter's files: PEFT's own conversion, the same logits on the plain base, the same bits when read again."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from tests.equivalence.test_kinds import base_of, by_peft, ours
from tests.kinds import KINDS, STARTED
from truetune import trained
from truetune.lora_files import from_files, started, to_files
from truetune.model import add_lora
from truetune.trained import Adapter

BASE = {"name": "org/model", "revision": "main"}
IDS = torch.arange(5, 25)[None]


def logits(model: Any) -> torch.Tensor:
    """Of one row, without dropout."""
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("kind", KINDS)
def test_plain_peft_on_the_plain_base_says_the_same(kind: str, tmp_path: Path) -> None:
    """What was trained, read by peft.PeftModel alone; the base's own logits are far away."""
    plain = base_of("qwen3")
    model = ours(copy.deepcopy(plain), KINDS[kind])
    wanted = logits(model)
    Adapter(model, BASE).save(tmp_path)
    far = float((logits(plain) - wanted).abs().max())
    found = logits(PeftModel.from_pretrained(plain, str(tmp_path)))
    assert float((found - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())
    assert far > 1e-2


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", STARTED)
def test_the_files_are_peft_s_own_conversion(kind: str, tmp_path: Path) -> None:
    """The same tensors and settings as PEFT's `path_initial_model_for_weight_conversion` writes."""
    base = base_of("qwen3")
    theirs = by_peft(copy.deepcopy(base), KINDS[kind])
    tuned = {name: weight.clone() for name, weight in theirs.state_dict().items() if "lora_" in name}
    start = by_peft(copy.deepcopy(base), KINDS[kind])
    generator = torch.Generator().manual_seed(1)
    for parameter in start.parameters():
        if parameter.requires_grad:
            parameter.data -= 0.05 * torch.randn(parameter.shape, generator=generator)
    theirs.load_state_dict({k: v for k, v in start.state_dict().items() if "lora_" in k}, strict=False)
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(str(tmp_path / "start"))
    theirs.load_state_dict(tuned, strict=False)
    theirs.peft_config["default"].init_lora_weights = KINDS[kind]["init_lora_weights"]
    theirs.save_pretrained(str(tmp_path / "theirs"), path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    model = ours(copy.deepcopy(base), KINDS[kind])
    Adapter(model, BASE).save(tmp_path / "ours")
    found, wanted = (load_file(tmp_path / side / trained.ADAPTER) for side in ("ours", "theirs"))
    assert found.keys() == wanted.keys()
    assert len(found) == 2 * 3 * 7
    for name, tensor in wanted.items():
        # What PEFT is given back here as its start went through one sum more.
        assert torch.allclose(found[name], tensor, rtol=0, atol=1e-6), name
    values = [json.loads((tmp_path / side / "adapter_config.json").read_text()) for side in ("ours", "theirs")]
    for key in ("r", "lora_alpha", "init_lora_weights", "use_rslora", "target_modules"):
        ours_value, theirs_value = (sorted(v[key]) if key == "target_modules" else v[key] for v in values)
        assert ours_value == theirs_value, key
    assert values[0]["r"] == 8


@pytest.mark.parametrize("kind", KINDS)
def test_read_again_to_the_bit(kind: str) -> None:
    """Into a model that started elsewhere: another machine may find other factors of the same base."""
    model = ours(base_of("qwen3"), KINDS[kind])
    wanted = {name: tensor.clone() for name, tensor in to_files(model).items()}
    other = add_lora(base_of("qwen3"), r=4, alpha=8, dropout=0.0, targets=["all-linear"], seed=0, **KINDS[kind])
    for _, layer in started(other):
        layer.keep_start(layer.start_A * 2, layer.start_B / 3)
    from_files(wanted, other)
    found = to_files(other)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    assert torch.equal(logits(other), logits(model))
    assert len(list(started(other))) == (3 * 7 if kind in STARTED else 0)


def test_an_unconverted_pissa_adapter_would_be_another_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault: A and B as they are, on the plain base."""
    plain = base_of("qwen3")
    model = ours(copy.deepcopy(plain), KINDS["pissa"])
    wanted = logits(model)
    monkeypatch.setattr(trained, "started", lambda _: iter(()))
    monkeypatch.setattr(trained, "settings", lambda values, _: values | {"init_lora_weights": True})
    Adapter(model, BASE).save(tmp_path)
    found = logits(PeftModel.from_pretrained(plain, str(tmp_path)))
    assert float((found - wanted).abs().max()) > 1e-2 * float(wanted.abs().max())
