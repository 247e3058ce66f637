"""`truetune train`: its help and where its configuration comes from. Whole runs are in test_training.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from truetune.cli import run
from truetune.config import Config
from truetune.messages import text
from truetune.rundir import RunDir


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_help_names_every_key(lang: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Options are built from the fields: each is there, with its text in the language asked for."""
    assert run(["train", "--help", "--lang", lang]) == 0
    shown = "".join(capsys.readouterr().out.split())
    names = [name for name in Config.model_fields if name not in ("data", "lang")]
    assert len(names) > 35
    for name in names:
        assert f"--{name.replace('_', '-')}VALUE" in shown
        assert "".join(text(f"field.{name}", lang).split()) in shown


def test_resume_alone_takes_the_configuration_of_the_run(
    write_json: Callable[..., Path], rows: list[dict[str, str]], tiny_qwen: Path, tmp_path: Path
) -> None:
    """`--resume --output-dir RUN` needs no data, no model and no key: they are in RUN/config.yaml."""
    out = tmp_path / "out"
    words = ["--model", str(tiny_qwen), "--max-steps", "2", "--learning-rate", "3e-3", "--output-dir", str(out)]
    assert run(["train", str(write_json(rows)), *words]) == 0
    weights = (out / "adapter" / "adapter_model.safetensors").read_bytes()
    RunDir(out).write_info(state="running")
    (out / "adapter" / "adapter_model.safetensors").unlink()
    assert run(["train", "--resume", "--output-dir", str(out)]) == 0
    assert (out / "adapter" / "adapter_model.safetensors").read_bytes() == weights
    assert [event["step"] for event in RunDir(out).read_events() if event["kind"] == "step"] == [1, 2]
