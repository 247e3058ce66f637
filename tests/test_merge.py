"""Merging: the folder says what base and adapter said, whatever is tied, adapted or stored (E4, C8, C12, F3)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.faults.layer import Killed, Layer, _save_file, faults
from tests.small import small_model
from truetune import merge as module
from truetune.disk import damage
from truetune.drift import MAX_ROWS, answer_logits, compare, model_logits
from truetune.errors import UserError
from truetune.identity import stop_ids
from truetune.merge import load_with_reference, merge
from truetune.source import find

EXACT = 1e-4
PROMPT = "What is 3 plus 3?"


@pytest.fixture
def bases(tmp_path: Path) -> Callable[[bool], Path]:
    """A small model with a tied head, or with one of its own."""
    return lambda is_tied: small_model(tmp_path / "base", is_tied=is_tied)


def adapter(base: Path, folder: Path, *, scale: float = 0.3, **options: Any) -> Path:
    """A plain PEFT folder with random weights: nothing of ours in it."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    model = peft.get_peft_model(model, peft.LoraConfig(**{**settings, **options}))
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += scale * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


def apart(folder: Path, base: Path, merged: Path) -> tuple[float, bool]:
    """Return the largest difference of a logit, and whether the greedy text is the same; with plain libraries."""
    tokenizer = AutoTokenizer.from_pretrained(merged)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    ours = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder)
    theirs = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    with torch.no_grad():
        logits = [model.eval()(ids).logits for model in (ours, theirs)]
        texts = [model.generate(input_ids=ids, max_new_tokens=8, do_sample=False).tolist() for model in (ours, theirs)]
    return float((logits[0] - logits[1]).abs().max()), texts[0] == texts[1]


KINDS: dict[str, dict[str, Any]] = {
    "linear": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "head saved": {"modules_to_save": ["lm_head"]},
    "embedding saved": {"modules_to_save": ["embed_tokens"]},
    "both saved": {"modules_to_save": ["embed_tokens", "lm_head"]},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_tied", [True, False])
def test_merged_is_base_and_adapter(is_tied: bool, kind: str, bases: Callable[[bool], Path], tmp_path: Path) -> None:
    """E4, rows 19 and 20: tied and untied, with whatever is adapted; read back by plain transformers."""
    base = bases(is_tied)
    folder = adapter(base, tmp_path / "adapter", **KINDS[kind])
    done = merge(find(str(folder)), output=tmp_path / "out")
    largest, is_same = apart(folder, base, tmp_path / "out")
    assert largest <= EXACT
    assert is_same
    assert done.drift.largest <= EXACT
    assert done.drift.num_pairs == 3
    assert done.learned > 1e-3
    assert damage(tmp_path / "out") is None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("is_tied", [True, False])
def test_bfloat16_storage_is_told_and_close(is_tied: bool, bases: Callable[[bool], Path], tmp_path: Path) -> None:
    folder = adapter(bases(is_tied), tmp_path / "adapter")
    done = merge(find(str(folder)), output=tmp_path / "out", dtype="bfloat16")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert 0 < done.lost < 0.2
    assert done.drift.largest > EXACT
    assert done.drift.kl < module.LIMITS["bfloat16"][0]


@pytest.mark.filterwarnings("ignore")
def test_a_change_that_bfloat16_loses_is_refused(bases: Callable[[bool], Path], tmp_path: Path) -> None:
    """Row 18: what was trained is a thousandth of the weights, less than bfloat16 can tell."""
    folder = adapter(bases(True), tmp_path / "adapter", scale=0.0005)
    with pytest.raises(UserError) as caught:
        merge(find(str(folder)), output=tmp_path / "out", dtype="bfloat16")
    assert caught.value.key == "merge_lost"
    assert caught.value.values["lost"] > 0.5
    assert not (tmp_path / "out").exists()
    assert merge(find(str(folder)), output=tmp_path / "out", dtype="float32").lost == 0


@pytest.mark.filterwarnings("ignore")
def test_another_model_read_back_is_refused(
    bases: Callable[[bool], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The adapter is lost on the way: the comparison sees it, and nothing is left."""
    folder = adapter(bases(True), tmp_path / "adapter", scale=0.5)
    monkeypatch.setattr(module, "merge_weights", lambda model, _: (model.unload(), 0.0))
    with pytest.raises(UserError) as caught:
        merge(find(str(folder)), output=tmp_path / "out")
    assert caught.value.key == "too_far"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["bitsandbytes", "gptq"])
def test_a_quantised_base_is_refused(method: str, bases: Callable[[bool], Path], tmp_path: Path) -> None:
    """C12, before any weight is read."""
    base = bases(True)
    folder = adapter(base, tmp_path / "adapter")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": method}}))
    with pytest.raises(UserError) as caught:
        merge(find(str(folder)), output=tmp_path / "out")
    assert (caught.value.key, caught.value.values["kind"]) == ("merge_quantised", method)


@pytest.mark.filterwarnings("ignore")
def test_new_tokens_are_refused(bases: Callable[[bool], Path], tmp_path: Path) -> None:
    """Row 16: the tokenizer beside the adapter has tokens that no weight belongs to."""
    base = bases(True)
    folder = adapter(base, tmp_path / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError) as caught:
        merge(find(str(folder)), output=tmp_path / "out")
    assert caught.value.key == "vocab_grown"


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_of_another_shape_is_refused(bases: Callable[[bool], Path], tmp_path: Path) -> None:
    """C8 without probes: PEFT's own size error, in words."""
    base = bases(True)
    folder = adapter(base, tmp_path / "adapter")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"r": 5}))
    with pytest.raises(UserError) as caught:
        merge(find(str(folder)), output=tmp_path / "out")
    assert caught.value.key == "adapter_no_fit"
    assert "size mismatch" in str(caught.value)


@pytest.mark.filterwarnings("ignore")
def test_a_folder_in_the_way(bases: Callable[[bool], Path], tmp_path: Path) -> None:
    """Other files are refused, an earlier merge is replaced; a model has nothing to merge."""
    base = bases(True)
    source = find(str(adapter(base, tmp_path / "adapter")))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    for output, key in ((tmp_path / "out", "merge_not_empty"), (tmp_path / "out" / "mine.txt", "output_is_file")):
        with pytest.raises(UserError) as caught:
            merge(source, output=output)
        assert caught.value.key == key
    (tmp_path / "out" / "mine.txt").unlink()
    for dtype in ("float32", "bfloat16"):
        merge(source, output=tmp_path / "out", dtype=dtype)
        assert json.loads((tmp_path / "out" / "manifest.json").read_text())["dtype"] == dtype
    with pytest.raises(UserError) as caught:
        merge(find(str(base)), output=tmp_path / "new")
    assert caught.value.key == "merge_no_adapter"


@pytest.mark.filterwarnings("ignore")
def test_the_token_that_ends_a_turn_comes_first(bases: Callable[[bool], Path], tmp_path: Path) -> None:
    """Row 38: whatever the base's generation_config.json says first, the answers of training end with <|im_end|>."""
    source = find(str(adapter(bases(True), tmp_path / "adapter")))
    end = source.renderer.tokenizer.convert_tokens_to_ids("<|im_end|>")
    other = source.renderer.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    object.__setattr__(source.renderer, "stop_ids", (other, end))
    assert stop_ids(source.renderer) == [end, other]
    merge(source, output=tmp_path / "out")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == [end, other]


@pytest.mark.filterwarnings("ignore")
def test_rows_of_the_run_are_compared(bases: Callable[[bool], Path], tmp_path: Path) -> None:
    """Without a run: the base's own answers, each with the prompt that inference sends."""
    source = find(str(adapter(bases(True), tmp_path / "adapter")))
    model, reference = load_with_reference(source)
    assert [pair.prompt_ids[0] for pair in reference.pairs] == [
        source.renderer.tokenizer.convert_tokens_to_ids("<|im_start|>")
    ] * 3
    assert all(0 < len(pair.answer_ids) <= 32 for pair in reference.pairs)
    assert compare(reference.logits, answer_logits(reference.pairs, of=model_logits(model))).largest == 0
    assert MAX_ROWS == 20


NUM_SAMPLED = 4


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "is_every_place", [pytest.param(False, marks=pytest.mark.slow), pytest.param(True, marks=pytest.mark.faults)]
)
def test_killed_anywhere_the_target_is_absent_or_complete(
    is_every_place: bool, bases: Callable[[bool], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F3: killed before the k-th operation on files; then absent or complete, and the next try succeeds."""
    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", _save_file)
    source = find(str(adapter(bases(True), tmp_path / "adapter")))
    places = tmp_path / "places"
    places.mkdir()
    with faults(Layer(places)) as layer:
        merge(source, output=places / "whole")
    count = len(layer.log)
    assert count > 20
    step = 1 if is_every_place else count // NUM_SAMPLED
    killed = 0
    for at in range(1, count + 1, step):
        target = places / f"out-{at}"
        with pytest.raises(Killed), faults(Layer(places, at=at)):
            merge(source, output=target)
        assert not target.exists() or damage(target) is None
        merge(source, output=target)
        killed += 1
        assert damage(target) is None
        assert sorted(path.name for path in places.iterdir()) == sorted([target.name, "whole"])
        for name in ("model.safetensors", "generation_config.json"):
            assert (target / name).read_bytes() == (places / "whole" / name).read_bytes()
        shutil.rmtree(target)
    assert killed >= (count if is_every_place else NUM_SAMPLED)
