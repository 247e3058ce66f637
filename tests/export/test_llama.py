"""llama.cpp itself: five families, every type, adapters, and files that say something else.

Marked `llama`: built from source, in `make test-llama`. Not skipped there: without the package these tests fail.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.small import FAMILIES, small_model
from truetune.cli import run
from truetune.drift import MAX_ROWS, answer_logits, chosen, compare
from truetune.errors import UserError
from truetune.export import llama, proven
from truetune.export.adapter import export_adapter
from truetune.export.proven import check_in_llama, ending, export_gguf
from truetune.merge import load_with_reference
from truetune.source import find

pytestmark = [pytest.mark.llama, pytest.mark.filterwarnings("ignore")]

BOUND = 0.1
"""Logits: where the likeliest token is another one, the reference preferred its own by less."""


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_says_the_same_in_llama(family: str, is_tied: bool, tmp_path: Path) -> None:
    """Logits, and the prompt ids of every probe that a text can give."""
    folder = small_model(tmp_path / "base", family, is_tied=is_tied)
    done = export_gguf(find(str(folder)), output=tmp_path / "x.gguf", kind="F32")
    assert done.by_llama is not None
    assert done.prompts is not None
    assert done.by_llama.largest < 1e-2
    assert done.by_llama.kl < 1e-6
    # One probe holds ChatML's tokens, and Mistral's </s>, as a user's text.
    assert done.prompts.num_same == done.prompts.num_reachable == (3 if family in ("llama", "gemma3") else 2)


@pytest.mark.parametrize("rope", ["linear", "llama3"])
def test_scaled_rotations(rope: str, tmp_path: Path) -> None:
    more = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    values = {"rope_type": rope, "rope_theta": 10000.0, "factor": 4.0, **(more if rope == "llama3" else {})}
    folder = small_model(tmp_path / "base", "llama", rope_parameters=values)
    done = export_gguf(find(str(folder)), output=tmp_path / "x.gguf", kind="F32")
    assert done.by_llama is not None
    assert done.by_llama.largest < 1e-2


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_K_M", "Q6_K"])
def test_types(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights are not what four bits are for: the share of same tokens is left out."""
    monkeypatch.setattr(proven, "ROUNDED", (0.05, 0.0))
    folder = small_model(tmp_path / "base", "qwen2", hidden_size=256, intermediate_size=256)
    done = export_gguf(find(str(folder)), output=tmp_path / "x.gguf", kind=kind)
    assert done.by_llama is not None
    assert 0 < done.by_llama.kl < 0.05
    assert not list(tmp_path.glob(".tmp*"))


def test_an_unknown_type(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        export_gguf(find(str(small_model(tmp_path / "base"))), output=tmp_path / "x.gguf", kind="Q9_Z")
    assert caught.value.key == "gguf_type"


def test_another_tokenizer_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Merged in another order: a probe's ids differ, and the file gets no name."""
    from dataclasses import replace

    from truetune.export.vocabulary import vocabulary

    def wrong(*given: Any) -> Any:
        words = vocabulary(*given)
        return replace(words, scores=[-score for score in words.scores])

    source = find(str(small_model(tmp_path / "base", "gemma3")))
    monkeypatch.setattr(proven, "vocabulary", wrong)
    with pytest.raises(UserError) as caught:
        export_gguf(source, output=tmp_path / "x.gguf", kind="F32")
    assert caught.value.key == "gguf_prompt"
    assert not (tmp_path / "x.gguf").exists()


def test_another_template_is_caught(tmp_path: Path) -> None:
    """Row 38: the file holds another template than that of training."""
    source = find(str(small_model(tmp_path / "base")))
    export_gguf(source, output=tmp_path / "x.gguf", kind="F32")
    _, reference = load_with_reference(source)
    object.__setattr__(source.renderer, "chat_template", source.renderer.chat_template + " ")
    with pytest.raises(UserError) as caught:
        check_in_llama(tmp_path / "x.gguf", source, reference=reference, kind="F32")
    assert caught.value.key == "gguf_template"


@pytest.mark.parametrize("is_scaled", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_alone(family: str, is_scaled: bool, tmp_path: Path) -> None:
    """GGUF base and GGUF adapter in llama.cpp against PEFT."""
    from tests.test_merge import adapter

    base = small_model(tmp_path / "base", family)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    folder = adapter(base, tmp_path / "adapter", scale=0.1, target_modules=targets, use_rslora=is_scaled)
    done = export_adapter(find(str(folder)), output=tmp_path / "x.gguf")
    assert done.by_llama is not None
    assert done.by_llama.largest < 1e-2
    assert done.by_llama.kl < 1e-6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "x.gguf"]


@pytest.mark.real
def test_a_greedy_text_that_parts_is_told_from_a_broken_file(smol: Path, tmp_path: Path) -> None:
    """SmolLM2's Q4_1: another answer about France in llama.cpp, at a near-tie; the same file damaged is refused."""
    from truetune.commands.demo import demo_model

    source = find(demo_model())
    model, reference = load_with_reference(source)
    question = source.renderer.prompt_ids([{"role": "user", "content": "What is the capital of France?"}])
    with llama.Llama(Path(demo_model()), num_context=200) as loaded:
        drift = compare(reference.logits, answer_logits(reference.pairs, of=loaded.logits()))
        assert 0 <= first_gap(model, loaded.logits(), question) < 0.5
    assert drift.kl < 0.05
    proven._refuse(drift, "Q4_1", where="")
    content = bytearray(Path(demo_model()).read_bytes())
    middle = len(content) * 2 // 3
    content[middle : middle + (1 << 20)] = bytes(range(256)) * (1 << 12)
    (tmp_path / "damaged.gguf").write_bytes(content)
    with pytest.raises(UserError) as caught:
        check_in_llama(tmp_path / "damaged.gguf", source, reference=reference, kind="Q4_1")
    assert caught.value.key == "too_far"


@pytest.mark.real
def test_the_lighthouse_in_llama(smol: Path, tmp_path: Path) -> None:
    """Trained in fp32, exported as F32 and F16: prompts, 20 held-out rows teacher-forced, and greedy texts."""
    from truetune.commands.demo import demo_settings

    settings = demo_settings(output_dir=str(tmp_path / "run")).config
    data = [str(settings.data[0]), "--eval-data", str(settings.eval_data[0])]
    words = ["--model", str(settings.model), "--dtype", "float32", "--max-steps", "6", "--output-dir"]
    assert run(["train", *data, *words, str(tmp_path / "run"), "--learning-rate", "3e-3", "--batch-size", "8"]) == 0
    source = find(str(tmp_path / "run"))
    for kind in ("F32", "F16"):
        done = export_gguf(source, output=tmp_path / "x.gguf", kind=kind)
        assert done.by_llama is not None
        assert done.prompts is not None
        assert done.by_llama.num_pairs == MAX_ROWS == 20
        assert done.by_llama.same_best >= 0.99
        assert done.by_llama.gap < BOUND
        assert done.prompts.num_same == done.prompts.num_reachable == 7
    model, _ = load_with_reference(source)
    pairs = chosen(source.run_pairs(5))
    with llama.Llama(tmp_path / "x.gguf", num_context=300) as loaded:
        gaps = [first_gap(model, loaded.logits(), list(pair.prompt_ids)) for pair in pairs]
    assert len(gaps) == 5
    assert max(gaps) < BOUND


def first_gap(model: Any, of: Any, ids: list[int], length: int = 24) -> float:
    """Return how much the model preferred its own token where the two greedy texts part; 0 if they do not."""
    for _ in range(length):
        with torch.no_grad():
            ours = model(torch.tensor([ids])).logits[0, -1]
        theirs = of(ids)[-1]
        best, other = int(ours.argmax()), int(theirs.argmax())
        if best != other:
            return float(ours[best] - ours[other])
        ids = [*ids, best]
    return 0.0


def test_ending_of_a_run(tmp_path: Path) -> None:
    """What stands in the file is what llama.cpp stops at."""
    import llama_cpp

    source = find(str(small_model(tmp_path / "base", "gemma3")))
    export_gguf(source, output=tmp_path / "x.gguf", kind="F32")
    end = ending(source)
    loaded = llama_cpp.Llama(str(tmp_path / "x.gguf"), verbose=False)
    assert json.loads(loaded.metadata["tokenizer.ggml.eot_token_id"]) == end.eot
    assert llama_cpp.llama_vocab_is_eog(llama_cpp.llama_model_get_vocab(loaded.model), end.eot)
    assert llama_cpp.llama_vocab_is_eog(llama_cpp.llama_model_get_vocab(loaded.model), end.eos)
