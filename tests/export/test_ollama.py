"""Modelfiles: for each shape of template one that gives the text of every probe, or a refusal."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.small import FAMILIES, LLAMA3, _tokenizer
from truetune import identity
from truetune.data.template import Renderer, build_renderer
from truetune.errors import UserError
from truetune.export.ollama import find_shape, go_template, modelfile, prove, render

MORE = [
    [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Who are you?"}],
    [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "Two {{ .System }}"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "Three"},
    ],
]


def renderer_of(family: str, system: str | None = None) -> tuple[Renderer, str]:
    tokenizer: Any = _tokenizer(family)
    return build_renderer(tokenizer, [tokenizer.eos_token_id], system=system), tokenizer.bos_token or ""


def probes_of(renderer: Renderer) -> list[dict[str, Any]]:
    every = [*identity.FIXED_PROBES, *MORE]
    return [{"messages": messages, "prompt_ids": renderer.prompt_ids(messages)} for messages in every]


@pytest.mark.parametrize("system", [None, "You keep the light."])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_shape_is_found_and_proven(family: str, system: str | None) -> None:
    """ChatML, Llama 3, Gemma (system in the first turn), Mistral (in the last one), with a system prompt or not."""
    renderer, skip = renderer_of(family, system)
    probes = probes_of(renderer)
    template = go_template(renderer, skip=skip)
    assert prove(template, renderer, probes=probes, skip=skip) == 5
    text = modelfile(renderer, probes=probes, weights="model.gguf", skip=skip)
    assert text.startswith("FROM ./model.gguf\nTEMPLATE ")
    assert ("SYSTEM " in text) is (system is not None)
    assert f'PARAMETER stop "{renderer.tokenizer.eos_token}"' in text


def test_the_words_of_a_template() -> None:
    """As it stands in the file, for ChatML."""
    renderer, _ = renderer_of("qwen3")
    assert go_template(renderer) == (
        "{{ range $i, $_ := .Messages }}"
        '{{ if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "assistant" }}<|im_start|>assistant\n{{ .Content }}<|im_end|>\n'
        "{{ end }}{{ end }}<|im_start|>assistant\n"
    )


def test_the_real_templates(qwen_tokenizer: Any) -> None:
    """Qwen3 writes an empty thinking block before the last answer only: a probe with an answer tells."""
    renderer = build_renderer(qwen_tokenizer, [151645])
    assert find_shape(renderer).user.before == "<|im_start|>user\n"
    assert prove(go_template(renderer), renderer, probes=probes_of(renderer)) == 5


@pytest.mark.real
def test_smollm(smol_tokenizer: Any) -> None:
    """It writes a system turn of its own where there is none."""
    renderer = build_renderer(smol_tokenizer, [2])
    template = go_template(renderer)
    assert "{{ if not .System }}<|im_start|>system\nYou are a helpful AI assistant" in template
    assert prove(template, renderer, probes=probes_of(renderer)) == 5


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ loop.index }}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:",
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | upper }}<|im_end|>\n{% endfor %}<|im_start|>",
        "{% for m in messages[-1:] %}<|im_start|>user\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n",
    ],
)
def test_other_shapes_are_refused(template: str) -> None:
    """Numbered turns, changed contents, forgotten turns: nothing is written that is not proven."""
    renderer, _ = renderer_of("qwen3")
    other = replace(renderer, chat_template=template)
    with pytest.raises(UserError) as caught:
        modelfile(other, probes=probes_of(other), weights="x.gguf")
    assert caught.value.key in ("ollama_shape", "ollama_prompt")


def test_a_planted_wrong_template_is_refused() -> None:
    """Row 38: one space too many."""
    renderer, _ = renderer_of("qwen3")
    template = go_template(renderer).replace("user\n", "user \n")
    with pytest.raises(UserError) as caught:
        prove(template, renderer, probes=probes_of(renderer))
    assert (caught.value.key, caught.value.values["number"]) == ("ollama_prompt", 1)


def test_what_the_small_reader_does_not_know_is_an_error() -> None:
    assert "trim" in LLAMA3
    with pytest.raises(ValueError, match="printf"):
        render("{{ printf .Content }}", [{"role": "user", "content": "x"}])


def test_ollama_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GGUF and Modelfile side by side; other files are not overwritten."""
    from tests.small import small_model
    from truetune.export import llama
    from truetune.export.proven import export_ollama
    from truetune.source import find

    monkeypatch.setattr(llama, "is_installed", lambda: False)
    source = find(str(small_model(tmp_path / "base")))
    for _ in range(2):
        done, num_proven = export_ollama(source, folder=tmp_path / "out", kind="F16")
        assert num_proven == 3
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["Modelfile", "model.gguf"]
    assert done.kind == "F16"
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(UserError) as caught:
        export_ollama(source, folder=tmp_path / "out", kind="F16")
    assert caught.value.key == "export_in_the_way"
