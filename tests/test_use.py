"""Loading for use: runs, adapters of our own and of others, bases, and what must not be loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from truetune.cli import run
from truetune.errors import UserError
from truetune.model import add_lora, find_base, load_base
from truetune.use import find_voices, load, newest_run

QUESTION = [{"role": "user", "content": "Number 3"}]


@pytest.fixture(scope="module")
def trained(tiny_qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a system prompt, on a copy of the base so that it may be changed."""
    folder = tmp_path_factory.mktemp("use")
    shutil.copytree(tiny_qwen, folder / "base")
    rows = [{"instruction": f"Number {n}", "output": f"{n} it is"} for n in range(12)]
    (folder / "data.json").write_text(json.dumps(rows), encoding="utf-8")
    words = ["--model", str(folder / "base"), "--max-steps", "2", "--learning-rate", "1e-2", "--system", "Count."]
    assert run(["train", str(folder / "data.json"), *words, "--output-dir", str(folder / "runs" / "one")]) == 0
    return folder / "runs" / "one"


def test_run_and_adapter_folder_are_the_same_model(trained: Path) -> None:
    """Both ways give the same ids, the same answer, and compared probes."""
    models = [load(trained), load(trained / "adapter")]
    prompts = [model.renderer.prompt_ids(QUESTION) for model in models]
    assert prompts[0] == prompts[1]
    assert models[0].chat(QUESTION, max_new_tokens=8) == models[1].chat("Number 3", max_new_tokens=8)
    assert [model.num_probes for model in models] == [8, 8]


def test_one_answer_whichever_way_it_is_asked(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The API, its stream, the batched answers and the command line agree (E12)."""
    model = load(trained)
    whole = model.chat("Number 3", max_new_tokens=8)
    assert "".join(model.stream("Number 3", max_new_tokens=8)).strip() == whole
    assert model.answers(["Number 3", "Hi"], max_new_tokens=8)[0] == whole
    assert run(["chat", str(trained), "-m", "Number 3", "--max-new-tokens", "8"]) == 0
    printed = capsys.readouterr()
    assert printed.out.strip() == whole
    assert "Count." in printed.err


def test_base_is_asked_as_the_run_is(trained: Path) -> None:
    """`is_base`: the same prompt, the adapter off."""
    tuned, base = load(trained), load(trained, is_base=True)
    ids = tuned.renderer.prompt_ids(QUESTION)
    assert ids == base.renderer.prompt_ids(QUESTION)
    with torch.no_grad():
        logits = [model.model(torch.tensor([ids])).logits for model in (tuned, base)]
    assert not torch.allclose(logits[0], logits[1], atol=1e-3)
    assert tuned.answers(["Number 3"], is_base=True, max_new_tokens=8) == base.answers(["Number 3"], max_new_tokens=8)
    assert not tuned.model.training


def test_adapter_of_another_tool_loads_without_probes(tiny_qwen: Path, tmp_path: Path) -> None:
    """A plain PEFT folder has no truetune.json: it works, and nothing is claimed about it."""
    lora: dict[str, Any] = {"r": 2, "alpha": 4, "dropout": 0.0, "targets": ["q_proj"], "seed": 0}
    model = add_lora(load_base(find_base(str(tiny_qwen)), "float32"), **lora)
    model.save_pretrained(str(tmp_path), save_embedding_layers=False)
    loaded = load(tmp_path)
    assert loaded.num_probes is None
    assert isinstance(loaded.chat("Hi", max_new_tokens=4), str)


def test_other_base_is_refused(trained: Path, tmp_path: Path) -> None:
    """The base was changed since: an adapter on another base answers nonsense, so it is an error (C8)."""
    copy = tmp_path / "adapter"
    shutil.copytree(trained / "adapter", copy)
    path = copy / "truetune.json"
    known = json.loads(path.read_text())
    known["base"]["fingerprint"] = "0" * 64
    path.write_text(json.dumps(known))
    with pytest.raises(UserError) as caught:
        load(copy)
    assert caught.value.key == "other_base"


def test_changed_template_is_refused(trained: Path, tmp_path: Path) -> None:
    """One character of the template beside the adapter differs: a probe notices."""
    copy = tmp_path / "adapter"
    shutil.copytree(trained / "adapter", copy)
    path = copy / "chat_template.jinja"
    path.write_text(path.read_text().replace("<|im_start|>assistant\\n", "<|im_start|>assistant \\n"))
    with pytest.raises(UserError) as caught:
        load(copy)
    assert caught.value.key == "probe_differs"


def test_newest_run(trained: Path, tmp_path: Path) -> None:
    """The newest run of a folder; an empty folder says what to do."""
    assert newest_run(trained.parent) == trained
    with pytest.raises(UserError) as caught:
        newest_run(tmp_path)
    assert caught.value.key == "no_runs"


def test_same_seed_same_answer(trained: Path) -> None:
    """Drawn answers repeat with their seed, differ between seeds, and leave torch's own numbers alone."""
    model = load(trained)
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    told = [model.chat("Hi", max_new_tokens=12, temperature=1.5, seed=seed) for seed in (1, 1, 2)]
    assert told[0] == told[1] != told[2]
    assert torch.equal(torch.rand(3), wanted)
    # So few tokens are left that the likeliest is the only one.
    assert model.chat("Hi", max_new_tokens=12, temperature=1.0, top_p=1e-6) == model.chat("Hi", max_new_tokens=12)


def test_voices_of_one_base(trained: Path, tiny_qwen: Path, tmp_path: Path) -> None:
    """A run, its adapter folder under another name, and the base last; the base is prompted as the first is."""
    copy = tmp_path / "other"
    shutil.copytree(trained / "adapter", copy)
    base, voices = find_voices([str(trained), str(copy)])
    assert [(voice.name, voice.num_probes) for voice in voices] == [("one", 8), ("other", 8), ("base", 8)]
    assert [voice.adapter for voice in voices] == ["adapter_0", "adapter_1", None]
    assert {voice.renderer.system for voice in voices} == {"Count."}
    inner = find_voices([str(trained / "adapter")], use_run_system=False)[1]
    assert [(voice.name, voice.renderer.system) for voice in inner] == [("one", None), ("base", None)]
    assert [voice.name for voice in find_voices([str(base.folder)])[1]] == ["base"]


@pytest.mark.slow
def test_voices_that_do_not_go_together(trained: Path, tmp_path: Path) -> None:
    """Two of one name, two bases; a changed base is refused as in `load`."""
    other = tmp_path / "one"
    shutil.copytree(trained / "adapter", other)
    base = tmp_path / "base2"
    shutil.copytree(trained.parents[1] / "base", base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"rope_theta": 5.0}))
    for paths, key in (([trained, other], "serve_same_name"), ([trained, base], "serve_other_base")):
        with pytest.raises(UserError) as caught:
            find_voices([str(path) for path in paths])
        assert caught.value.key == key
