"""`truetune merge` and `truetune export` from a run to what they print, in both languages."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.small import small_run
from truetune.cli import run
from truetune.export import llama


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run with a system prompt."""
    return small_run(tmp_path_factory.mktemp("export"), "qwen2", num_steps=3)


@pytest.fixture(autouse=True)
def _without_llama(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama, "is_installed", lambda: False)


def test_merge_tells_what_was_lost(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["merge", str(trained), "--output-dir", str(tmp_path / "out"), "--dtype", "float32"]) == 0
    told = capsys.readouterr().out
    assert "Merged in float32, stored as float32" in told
    assert "the same likeliest token at 100.0%" in told
    assert "moved the weights 0.00% as far" in told
    assert "other tools must send it: Count." in told
    assert run(["chat", str(tmp_path / "out"), "-m", "What is 3 plus 3?", "--max-new-tokens", "4"]) == 0
    merged = capsys.readouterr().out
    assert run(["chat", str(trained), "-m", "What is 3 plus 3?", "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out == merged


def test_export_of_a_run(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["export", str(trained), "--to", "gguf", "--output", str(tmp_path / "x.gguf"), "--lang", "zh"]) == 0
    assert "没有用 llama.cpp 核对" in capsys.readouterr().out
    assert run(["export", str(trained), "--to", "adapter", "--output", str(tmp_path / "a.gguf")]) == 0
    assert "Not compared in llama.cpp: pip install llama-cpp-python" in capsys.readouterr().out
    assert (tmp_path / "a.gguf").stat().st_size < (tmp_path / "x.gguf").stat().st_size


def test_export_to_ollama(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["export", str(trained), "--to", "ollama", "--output", str(tmp_path / "keeper")]) == 0
    assert "ollama create keeper -f" in capsys.readouterr().out
    assert 'SYSTEM """Count."""' in (tmp_path / "keeper" / "Modelfile").read_text()


def test_dry_run_of_an_adapter(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is in truetune.json of one's own data is said."""
    assert run(["export", str(trained), "--to", "hub", "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "adapter_model.safetensors" in told
    assert "it holds 8 prompts, some of them from your data" in told
    assert "Nothing was sent" in told


@pytest.mark.parametrize(
    "words",
    [
        ["merge", "x"],
        ["export", "x"],
        ["export", "x", "--to", "floppy"],
        ["merge", "x", "--output-dir", "y", "--dtype", "int8"],
    ],
)
def test_bad_options(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(words) == 2
    assert f"truetune {words[0]} --help" in capsys.readouterr().err
