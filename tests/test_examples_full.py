"""The examples of full fine-tuning and of plain text, run as they stand for two steps."""

from __future__ import annotations

from pathlib import Path

import pytest

from truetune.cli import run
from truetune.config import examples_folder, resolve
from truetune.rundir import RunDir

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("short_answers")]


@pytest.mark.parametrize("name", ["full", "text"])
def test_two_steps(name: str, tiny_qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(examples_folder().parent)
    recipe = f"examples/{name}.yaml"
    words = ["train", "--config", recipe, "--model", str(tiny_qwen), "--max-steps", "2", "--output-dir"]
    assert run([*words, str(tmp_path / "run")]) == 0
    made = RunDir(tmp_path / "run")
    assert made.read_info()["state"] == "done"
    assert made.result.name == ("model" if name == "full" else "adapter")
    steps = [event for event in made.read_events() if event["kind"] == "step"]
    assert len(steps) == 2
    rows = resolve({}, Path(recipe)).config.batch_size
    assert all(event["rows"] == rows for event in steps)
    samples = [event for event in made.read_events() if event["kind"] == "sample"]
    assert len(samples) >= 2
    if name == "text":
        # Only the last piece of a page ends; of all others every token but the first one read is the text's.
        assert sum(event["learned_tokens"] for event in steps) > 0.8 * sum(event["trie_tokens"] for event in steps)
