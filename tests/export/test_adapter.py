"""The adapter alone as GGUF: names, scale and shapes; what llama.cpp makes of it is in test_llama.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf as package
import pytest

from tests.small import small_model
from tests.test_merge import adapter
from truetune.errors import UserError
from truetune.export import llama
from truetune.export.adapter import export_adapter
from truetune.source import find

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def _without_llama(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama, "is_installed", lambda: False)


@pytest.mark.parametrize(("is_scaled", "alpha"), [(False, 8.0), (True, 16.0)])
def test_names_and_scale(is_scaled: bool, alpha: float, tmp_path: Path) -> None:
    """alpha / r, and alpha / √r for rank-stabilised LoRA: r is 4."""
    folder = adapter(small_model(tmp_path / "base"), tmp_path / "adapter", use_rslora=is_scaled)
    export_adapter(find(str(folder)), output=tmp_path / "x.gguf")
    reader = package.GGUFReader(tmp_path / "x.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.type"] == "adapter"
    assert fields["adapter.type"] == "lora"
    assert fields["adapter.lora.alpha"] == alpha
    shapes = {tensor.name: tensor.shape.tolist() for tensor in reader.tensors}
    assert len(shapes) == 3 * 2 * 2
    assert shapes["blk.0.attn_q.weight.lora_a"] == [64, 4]
    assert shapes["blk.2.ffn_down.weight.lora_b"] == [4, 64]


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["lm_head"]},
    ],
)
def test_kinds_that_llama_does_not_have_are_refused(options: dict[str, Any], tmp_path: Path) -> None:
    folder = adapter(small_model(tmp_path / "base"), tmp_path / "adapter", **options)
    with pytest.raises(UserError) as caught:
        export_adapter(find(str(folder)), output=tmp_path / "x.gguf")
    assert caught.value.key == "gguf_adapter"
    assert not (tmp_path / "x.gguf").exists()


def test_a_model_has_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        export_adapter(find(str(small_model(tmp_path / "base"))), output=tmp_path / "x.gguf")
    assert caught.value.key == "merge_no_adapter"
