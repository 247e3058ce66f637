"""What cannot be quantised is refused before weights are read, with what to do."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.small import small_model
from truetune import quantisation
from truetune.config import Config
from truetune.engine import quiet
from truetune.errors import UserError
from truetune.model import find_base, load_base


def test_every_value_of_the_key_is_known() -> None:
    field = Config.model_json_schema()["properties"]["quantization"]["anyOf"][0]
    assert field["enum"] == [*quantisation.BITS]
    for kind in quantisation.BITS:
        assert quantisation.arguments(kind, dtype=torch.float32)["quantization_config"].load_in_4bit == (kind == "4bit")
    assert quantisation.arguments(None, dtype=torch.float32) == {}


def test_a_base_that_is_quantised_already(tmp_path: Path) -> None:
    base = small_model(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(UserError) as caught:
        load_base(find_base(str(base), quantization="4bit"), "float32")
    assert (caught.value.key, caught.value.values["method"]) == ("quantised_twice", "gptq")


def test_without_bitsandbytes_the_install_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quiet, "has_bitsandbytes", False)
    base = find_base(str(small_model(tmp_path / "base")), quantization="8bit")
    with pytest.raises(UserError) as caught:
        quantisation.require("8bit", folder=base.folder, name=base.title)
    assert (caught.value.key, caught.value.values) == ("extra_missing", {"extra": "quant"})


def test_a_machine_that_it_has_no_code_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bitsandbytes import cextension

    mock = object.__new__(cextension.ErrorHandlerMockBNBNativeLibrary)
    monkeypatch.setattr(cextension, "lib", mock)
    with pytest.raises(UserError) as caught:
        quantisation.require("4bit", folder=small_model(tmp_path / "base"), name="base")
    assert (caught.value.key, caught.value.values["kind"]) == ("quantisation_machine", "4bit")


def test_rows_that_bitsandbytes_reads_back_wrongly(tmp_path: Path) -> None:
    """Rows of 96 in 4 bits: refused; in 8 bits fine."""
    base = find_base(str(small_model(tmp_path / "base")), quantization="4bit")
    with pytest.raises(UserError) as caught:
        load_base(base, "float32")
    assert (caught.value.key, caught.value.values["width"]) == ("quantisation_width", 96)
    assert "down_proj" in caught.value.values["name"]
    assert load_base(replace(base, quantization="8bit"), "float32").model.layers[0].mlp.down_proj.dense is not None
