"""What a path means: of one trained run, every way to name it (C8: another base, of the same shape)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.small import small_model, small_run
from truetune.cli import run
from truetune.errors import UserError
from truetune.merge import merge
from truetune.source import find


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a system prompt and held-out rows, on a small base beside it."""
    return small_run(tmp_path_factory.mktemp("source"), "qwen3", num_steps=4)


@pytest.mark.parametrize("name", ["", "adapter"])
def test_a_run_and_its_adapter(name: str, trained: Path) -> None:
    source = find(str(trained / name))
    assert source.folder == trained / "adapter"
    assert source.num_probes == len(source.probes) >= 3
    assert source.renderer.system == "Count."
    pairs = source.run_pairs(20)
    assert len(pairs) == 20
    text = source.renderer.tokenizer.decode(pairs[0].prompt_ids)
    assert "Count." in text
    assert text.count("plus") == 1
    assert find(str(trained / name), use_run_system=False).renderer.system is None


def test_a_checkpoint_knows_its_run(trained: Path) -> None:
    checkpoint = max((trained / "checkpoints").glob("checkpoint-*"))
    assert len(find(str(checkpoint)).run_pairs(5)) == 5


def test_a_model_and_a_merged_one(trained: Path, tmp_path: Path) -> None:
    """A base has nothing to compare; a merged folder is prompted, and checked, as the run is."""
    base = find(str(trained.parent / "base"))
    assert (base.folder, base.known, base.num_probes, base.run_pairs(5)) == (None, None, None, [])
    merge(find(str(trained)), output=tmp_path / "merged")
    merged = find(str(tmp_path / "merged"))
    assert merged.folder is None
    assert merged.num_probes == find(str(trained)).num_probes
    assert merged.renderer.system == "Count."


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    """Base and run, to be changed; the run names the copy of the base."""
    shutil.copytree(trained.parent / "base", tmp_path / "base")
    shutil.copytree(trained, tmp_path / "run")
    path = tmp_path / "run" / "adapter" / "adapter_config.json"
    values = json.loads(path.read_text()) | {"base_model_name_or_path": str(tmp_path / "base")}
    path.write_text(json.dumps(values))
    return tmp_path / "run"


@pytest.mark.parametrize("command", ["chat", "merge", "export", "serve", "compare"])
@pytest.mark.parametrize("fault", ["base", "shape", "template"])
def test_another_base_or_template_is_caught_by_every_use(
    fault: str, command: str, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """C8 and row 38: a base of the same shape, of another shape, and a template with one more space."""
    out = copy.parent / "out"
    words = {
        "chat": ["chat", str(copy), "-m", "Hi", "--max-new-tokens", "2"],
        "merge": ["merge", str(copy), "--output-dir", str(out)],
        "export": ["export", str(copy), "--to", "gguf", "--output", str(out)],
        "serve": ["serve", str(copy)],
        "compare": ["compare", str(copy), "-m", "Hi"],
    }[command]
    base = copy.parent / "base"
    if fault == "template":
        path = copy / "adapter" / "chat_template.jinja"
        path.write_text(path.read_text().replace("assistant\\n", "assistant \\n"))
    else:
        shutil.rmtree(base)
        small_model(base, "qwen3", **({"num_hidden_layers": 2} if fault == "shape" else {"rope_theta": 9.0}))
    assert run(words) == 2
    told = capsys.readouterr().err
    if fault == "template":
        assert "prompt 1" in told
    else:
        assert f"trained on {copy.parents[0].parent}" in told or "trained on /" in told
        assert str(base) in told
    assert not out.exists()


def test_a_run_without_an_adapter(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "adapter")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(UserError) as caught:
        find(str(tmp_path / "run"))
    assert caught.value.key == "run_no_adapter"
