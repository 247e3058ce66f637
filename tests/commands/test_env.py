"""`truetune env`: versions, devices and what would be chosen."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from pathlib import Path

import pytest
import torch

from truetune.checkpoint import PACKAGES
from truetune.cli import run
from truetune.engine.families import FAMILIES
from truetune.model import choose_dtype

Capture = pytest.CaptureFixture[str]


def values(out: str) -> dict[str, str]:
    """The lines of label and value."""
    pairs = (line.strip().split("  ", 1) for line in out.splitlines()[1:])
    return {label: value.strip() for label, value in pairs}


def test_env_shows_this_machine(capsys: Capture) -> None:
    assert run(["env", "--lang", "en"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.splitlines()[0] == "This machine"
    found = values(out)
    assert list(found) == ["Python", "packages", "CPU", "GPU", "memory", "weights as", "attention", "families tested"]
    for name in PACKAGES:
        assert f"{name} {importlib.metadata.version(name)}" in found["packages"]
    assert found["CPU"].startswith(f"{torch.get_num_threads()} threads, ")
    assert (found["GPU"] == "-") is not torch.cuda.is_available()
    free, total = (float(word) for word in found["memory"].replace(" GB", "").split(" free of "))
    assert 0 < free <= total


def test_the_dtype_is_the_one_that_training_would_choose(capsys: Capture) -> None:
    assert run(["env", "--lang", "en"]) == 0
    shown = values(capsys.readouterr().out)["weights as"]
    dtype, _ = choose_dtype()
    assert shown.startswith(f"{dtype} (")


@pytest.mark.parametrize("available", [True, False])
def test_the_reason_for_the_dtype_is_named(available: bool, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: available)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert run(["env", "--lang", "en"]) == 0
    shown = values(capsys.readouterr().out)
    expected = "bfloat16 (the CPU has AMX)" if available else "float32 (no bfloat16 in this CPU's hardware)"
    assert (shown["weights as"], shown["GPU"]) == (expected, "-")


def test_env_in_chinese(capsys: Capture) -> None:
    assert run(["env", "--lang", "zh"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("这台机器\n")
    assert "软件包" in out


def test_env_of_a_model_names_its_family(tiny_qwen: Path, tmp_path: Path, capsys: Capture) -> None:
    """A family that was tested, one that was not, and a model that does not exist."""
    assert run(["env", str(tiny_qwen), "--lang", "en"]) == 0
    shown = values(capsys.readouterr().out)
    assert shown["attention"] == "trie (qwen3 was tested; compared again before step 1)"
    assert set(shown["families tested"].split(", ")) == set(FAMILIES)
    other = tmp_path / "other"
    shutil.copytree(tiny_qwen, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"model_type": "unheard_of"}))
    assert run(["env", str(other), "--lang", "en"]) == 0
    assert "unheard_of was not tested" in values(capsys.readouterr().out)["attention"]
    assert run(["env", str(tmp_path / "none")]) == 2
