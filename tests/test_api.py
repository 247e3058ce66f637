"""The Python API: three names, the same words as the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import truetune
from truetune.errors import UserErrors


def test_exported_names() -> None:
    """Nothing else is public."""
    assert sorted(truetune.__all__) == ["check", "load", "train"]


def test_train_check_load(
    write_json: Callable[..., Path], rows: list[dict[str, str]], tiny_qwen: Path, tmp_path: Path
) -> None:
    """The three calls of the README, one after the other."""
    path = write_json(rows)
    report = truetune.check(path, model=tiny_qwen)
    assert (report.rows_read, report.rows_used, report.rows_held_out) == (40, 40, 8)
    run = truetune.train(path, model=str(tiny_qwen), max_steps=2, output_dir=tmp_path / "out")
    assert (run.path, run.steps) == (tmp_path / "out", 2)
    assert run.eval_loss_before is not None
    assert run.eval_loss_after is not None
    assert isinstance(truetune.load(run.path).chat("What is 1 plus 1?", max_new_tokens=3), str)
    # Again in the same process: loading the module of the story must not replace the function.
    again = truetune.train(path, model=str(tiny_qwen), max_steps=2, output_dir=str(tmp_path / "again"))
    assert again.loss == run.loss


def test_unknown_key_is_refused_with_a_suggestion(tiny_qwen: Path) -> None:
    """As on the command line."""
    with pytest.raises(UserErrors, match="learning_rate"):
        truetune.train("data.json", model=str(tiny_qwen), learnig_rate=1)
