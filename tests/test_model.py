"""Finding and loading bases, LoRA, dtypes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from truetune import model as module
from truetune.errors import UserError
from truetune.model import Base, add_lora, choose_dtype, count_parameters, eos_ids, find_base, load_base, pad_id


def test_fingerprint_changes_with_weights_and_configuration(tiny_qwen: Path, tmp_path: Path) -> None:
    """The same files give the same fingerprint wherever they lie; one changed byte gives another."""
    copy = tmp_path / "copy"
    shutil.copytree(tiny_qwen, copy)
    original = find_base(str(tiny_qwen)).fingerprint
    assert find_base(str(copy)).fingerprint == original
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert find_base(str(copy)).fingerprint != original


@pytest.mark.parametrize(
    ("files", "key"),
    [
        ({}, "model_no_config"),
        ({"config.json": "{}"}, "model_no_weights"),
        ({"config.json": "{}", "pytorch_model.bin": ""}, "model_pickle"),
    ],
)
def test_folders_that_are_no_model(tmp_path: Path, files: dict[str, str], key: str) -> None:
    """Each is refused for what it lacks."""
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError) as caught:
        find_base(str(tmp_path))
    assert caught.value.key == key


@pytest.mark.parametrize("name", ["./nothing", "/nothing/here", "nothing", "a/b/c", "weights.gguf"])
def test_a_path_never_touches_the_network(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What looks like a path and does not exist is missing; the hub is not asked."""
    monkeypatch.setattr(module, "fetch", lambda *a, **k: pytest.fail("asked the hub"))
    with pytest.raises(UserError) as caught:
        find_base(name)
    assert caught.value.key == "model_missing"


def test_missing_weights_are_an_error(tiny_qwen: Path, tmp_path: Path) -> None:
    """A shard too few must not become random weights (transformers only warns)."""
    from safetensors.torch import load_file, save_file

    copy = tmp_path / "copy"
    shutil.copytree(tiny_qwen, copy)
    tensors = load_file(str(copy / "model.safetensors"))
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, str(copy / "model.safetensors"), metadata={"format": "pt"})
    with pytest.raises(UserError) as caught:
        load_base(find_base(str(copy)), "float32")
    assert caught.value.key == "model_missing_weights"
    assert caught.value.values["name"] == "model.layers.1.mlp.up_proj.weight"


def test_cut_weights_are_an_error(tiny_qwen: Path, tmp_path: Path) -> None:
    """A file cut in half is named before any training."""
    copy = tmp_path / "copy"
    shutil.copytree(tiny_qwen, copy)
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    with pytest.raises(UserError) as caught:
        find_base(str(copy))
    assert (caught.value.key, caught.value.where) == ("model_file_damaged", str(weights))


def lora(folder: Path, dtype: str = "float32", targets: tuple[str, ...] = ("all-linear",), seed: int = 0) -> Any:
    """The tiny model with LoRA."""
    return add_lora(load_base(find_base(str(folder)), dtype), r=4, alpha=8, dropout=0.0, targets=targets, seed=seed)


def test_lora_is_on_every_linear_layer_but_the_head(tiny_qwen: Path) -> None:
    """Seven projections in each of two layers; the same seed gives the same start."""
    model = lora(tiny_qwen)
    names = {name.split(".lora_A")[0].rsplit(".", 1)[-1] for name, _ in model.named_parameters() if "lora_A" in name}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    trainable, total = count_parameters(model)
    assert trainable == sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    assert total > trainable
    starts = [next(p for n, p in lora(tiny_qwen, seed=s).named_parameters() if "lora_A" in n) for s in (0, 0, 1)]
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])


def test_trainable_weights_are_fp32_on_a_bf16_base(tiny_qwen: Path) -> None:
    """bf16 would round small updates away (1.0 + 1e-3 is 1.0 there)."""
    model = lora(tiny_qwen, "bfloat16")
    dtypes = {("lora_" in name, p.dtype) for name, p in model.named_parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}


def test_unknown_lora_target_lists_the_real_names(tiny_qwen: Path) -> None:
    """The error helps to find the right name."""
    with pytest.raises(UserError) as caught:
        lora(tiny_qwen, targets=("query_proj",))
    assert "q_proj" in caught.value.values["names"]
    with pytest.raises(UserError) as caught:
        lora(tiny_qwen, targets=("q_proj", "v_porj"))
    assert caught.value.values["name"] == "v_porj"


def test_reference_finds_the_base_again(tiny_qwen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative path becomes absolute; a hub id keeps its revision and hub."""
    monkeypatch.chdir(tiny_qwen.parent)
    base = find_base(tiny_qwen.name + "/.")
    assert base.reference() == {
        "name": str(tiny_qwen.resolve()),
        "revision": "main",
        "hub": "huggingface",
        "fingerprint": base.fingerprint,
    }
    monkeypatch.setattr(module, "fetch", lambda name, *, revision, hub: tiny_qwen)
    remote = find_base("org/model", revision="v2", hub="modelscope").reference()
    assert (remote["name"], remote["revision"], remote["hub"]) == ("org/model", "v2", "modelscope")


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer.json"])
def test_broken_files_of_a_model_are_named(tiny_qwen: Path, tmp_path: Path, name: str) -> None:
    """No traceback: the folder or file, and what to do."""
    copy = tmp_path / "copy"
    shutil.copytree(tiny_qwen, copy)
    (copy / name).write_text("{")
    reader = eos_ids if name == "generation_config.json" else module.load_tokenizer
    with pytest.raises(UserError) as caught:
        reader(copy)
    assert caught.value.key == "model_broken"


@pytest.mark.slow
def test_broken_gguf_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that only has the name of a GGUF."""
    monkeypatch.setenv("TRUETUNE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "x.gguf").write_bytes(b"no GGUF at all")
    with pytest.raises(UserError) as caught:
        module.prepare_base(find_base(str(tmp_path / "x.gguf")))
    assert caught.value.key == "model_broken"


def test_dtype_follows_the_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for, AMX, AVX512-BF16, nothing: each with its reason."""
    assert choose_dtype("bfloat16") == ("bfloat16", "asked")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for amx, avx512, expected in [
        (True, True, ("bfloat16", "amx")),
        (False, True, ("bfloat16", "avx512")),
        (False, False, ("float32", "none")),
    ]:
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda avx512=avx512: avx512)
        assert choose_dtype() == expected


def test_eos_ids_come_from_generation_config_first(tmp_path: Path) -> None:
    """A list or a number; config.json only where the other says nothing."""
    assert eos_ids(tmp_path) == []
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 5}))
    assert eos_ids(tmp_path) == [5]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8]}))
    assert eos_ids(tmp_path) == [7, 8]


def test_pad_id_of_tokenizers_without_one() -> None:
    """Padding, else end token, else 0; id 0 counts as an id."""

    class Tokenizer:
        def __init__(self, pad: int | None, eos: int | None) -> None:
            self.pad_token_id, self.eos_token_id = pad, eos

    assert [pad_id(Tokenizer(*ids)) for ids in ((0, 3), (None, 3), (None, None))] == [0, 3, 0]


@pytest.mark.real
def test_gguf_is_unpacked_once_and_answers(smol: Path) -> None:
    """The real SmolLM2 from its GGUF file: weights as this machine chooses, and the capital of France."""
    from truetune.commands.demo import demo_model
    from truetune.use import load

    base = find_base(demo_model())
    assert base.folder == smol
    assert base.title == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert isinstance(base, Base)
    model = load(demo_model())
    assert next(model.model.parameters()).dtype == getattr(torch, choose_dtype()[0])
    assert "Paris" in model.chat("What is the capital of France?", max_new_tokens=12)
