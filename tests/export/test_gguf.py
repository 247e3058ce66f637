"""Five families as GGUF, read back by transformers: the same logits, every tensor in its place."""

from __future__ import annotations

from pathlib import Path

import gguf as package
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.small import FAMILIES, small_model
from truetune.drift import answer_logits, compare, model_logits
from truetune.errors import UserError
from truetune.export import gguf, llama
from truetune.export.proven import export_gguf
from truetune.source import find


@pytest.fixture(autouse=True)
def _without_llama(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama, "is_installed", lambda: False)


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_read_back_exactly(family: str, is_tied: bool, tmp_path: Path) -> None:
    """F32: bit for bit the same weights, so the same logits."""
    folder = small_model(tmp_path / "base", family, is_tied=is_tied)
    done = export_gguf(find(str(folder)), output=tmp_path / "x.gguf", kind="F32")
    assert done.by_transformers is not None
    assert done.by_transformers.largest <= 1e-5
    assert done.by_transformers.num_pairs == 3
    assert done.by_llama is None
    reader = package.GGUFReader(tmp_path / "x.gguf")
    names = {tensor.name for tensor in reader.tensors}
    assert ("output.weight" in names) is not is_tied
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert sum(int(t.n_elements) for t in reader.tensors) == sum(p.numel() for p in model.parameters())
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tokenizer = find(str(folder)).renderer.tokenizer
    assert fields["general.architecture"] == gguf.ARCHITECTURES[model.config.model_type]
    assert fields["tokenizer.chat_template"] == tokenizer.chat_template
    end = {"gemma3": "<end_of_turn>", "llama": "<|eot_id|>", "mistral": "</s>"}.get(family, "<|im_end|>")
    assert tokenizer.convert_ids_to_tokens(fields["tokenizer.ggml.eot_token_id"]) == end
    assert fields["tokenizer.ggml.add_bos_token"] is (tokenizer.bos_token is not None)


@pytest.mark.parametrize(("kind", "largest"), [("F16", 3e-3), ("BF16", 3e-2), ("Q8_0", 8e-2)])
def test_types_round_as_much_as_they_may(kind: str, largest: float, tmp_path: Path) -> None:
    folder = small_model(tmp_path / "base", "qwen3")
    done = export_gguf(find(str(folder)), output=tmp_path / "x.gguf", kind=kind)
    assert done.by_transformers is not None
    assert 0 < done.by_transformers.largest < largest
    stored = {tensor.tensor_type.name for tensor in package.GGUFReader(tmp_path / "x.gguf").tensors}
    assert stored == {"F32", kind}


def test_q4_0_keeps_embeddings_finer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model is not what four bits are for: the limit is left out."""
    monkeypatch.setattr("truetune.export.proven._refuse", lambda *_, **__: None)
    folder = small_model(tmp_path / "base", "qwen3")
    export_gguf(find(str(folder)), output=tmp_path / "x.gguf", kind="Q4_0")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in package.GGUFReader(tmp_path / "x.gguf").tensors}
    assert kinds["token_embd.weight"] == "Q8_0"
    assert kinds["blk.0.attn_q.weight"] == "Q4_0"
    assert kinds["blk.0.attn_norm.weight"] == "F32"


def test_heads_are_interleaved() -> None:
    """As the drawing says, and back by transformers' own reader (tested above on whole models)."""
    rows = np.arange(8)[:, None] * np.ones((1, 3))
    assert gguf.interleaved(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_llama3_rope_becomes_factors(tmp_path: Path) -> None:
    """Against the frequencies that transformers computes."""
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    folder = small_model(tmp_path / "base", "llama", rope_parameters=rope)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    (name, factors) = next(gguf.tensors(model))
    assert name == "rope_freqs.weight"
    plain = 10000.0 ** -(torch.arange(0, 16, 2) / 16)
    assert torch.allclose(plain / torch.from_numpy(factors), model.model.rotary_emb.inv_freq, rtol=1e-5)
    assert len(set(factors.tolist())) > 2


def test_planted_faults_are_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of q not interleaved: the file is read back, is another model, and gets no name (row 38)."""
    folder = small_model(tmp_path / "base", "llama")
    monkeypatch.setattr(gguf, "interleaved", lambda weight, _: weight)
    with pytest.raises(UserError) as caught:
        export_gguf(find(str(folder)), output=tmp_path / "x.gguf", kind="F32")
    assert caught.value.key == "too_far"
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [({"query_pre_attn_scalar": 32}, "query_pre_attn_scalar"), ({"final_logit_softcapping": 30.0}, "softcapping")],
)
def test_what_llama_does_not_compute_is_refused(changes: dict[str, float], problem: str, tmp_path: Path) -> None:
    folder = small_model(tmp_path / "base", "gemma3", **changes)
    with pytest.raises(UserError) as caught:
        export_gguf(find(str(folder)), output=tmp_path / "x.gguf", kind="F32")
    assert caught.value.key == "gguf_family"
    assert problem in str(caught.value)


def test_k_types_need_llama(tmp_path: Path) -> None:
    """Refused with the command that installs it, before weights are read."""
    folder = small_model(tmp_path / "base")
    with pytest.raises(UserError) as caught:
        export_gguf(find(str(folder)), output=tmp_path / "x.gguf", kind="Q4_K_M")
    assert caught.value.key == "llama_missing"
    assert "pip install llama-cpp-python" in str(caught.value)


def test_a_file_of_others_is_read_by_the_same_path(tmp_path: Path) -> None:
    """compare of a model with itself through two files: F32 and F16."""
    source = find(str(small_model(tmp_path / "base")))
    export_gguf(source, output=tmp_path / "x.gguf", kind="F16")
    from truetune.merge import load_with_reference
    from truetune.model import load_gguf

    _, reference = load_with_reference(source)
    again = load_gguf(tmp_path / "x.gguf", source.base).eval()
    drift = compare(reference.logits, answer_logits(reference.pairs, of=model_logits(again)))
    assert drift.same_best > 0.95
