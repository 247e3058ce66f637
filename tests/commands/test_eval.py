"""`truetune eval`: the metrics of plain transformers, for runs and models, and answers in a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from truetune.cli import run
from truetune.use import load

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows that were not trained."""
    path = tmp_path_factory.mktemp("eval") / "rows.json"
    values = [{"instruction": f"Number {n}?", "output": f"{n}, it is."} for n in range(100, 170)]
    path.write_text(json.dumps(values), encoding="utf-8")
    return path


def by_transformers(model: Any, rows: Path) -> dict[str, float]:
    """Loss and accuracy by transformers' own forward, row by row; Qwen3 writes an empty think block before it."""
    losses, hits = [], []
    for row in json.loads(rows.read_text(encoding="utf-8")):
        prompt = model.renderer.prompt_ids([{"role": "user", "content": row["instruction"]}])
        answer = model.renderer.tokenizer(row["output"], add_special_tokens=False).input_ids
        before = model.renderer.tokenizer("<think>\n\n</think>\n\n", add_special_tokens=False).input_ids
        ids = torch.tensor([[*prompt, *before, *answer]])
        with torch.no_grad():
            logits_AV = model.model(input_ids=ids).logits[0, -len(answer) - 1 : -1].float()
        losses.append(torch.nn.functional.cross_entropy(logits_AV, torch.tensor(answer), reduction="none"))
        hits.append(logits_AV.argmax(-1) == torch.tensor(answer))
    return {"answer_loss": float(torch.cat(losses).mean()), "token_accuracy": float(torch.cat(hits).float().mean())}


def test_metrics_of_base_and_tuned(
    small_run: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "facts.json"
    assert run(["eval", str(small_run), str(rows), "--json", str(path), "--lang", "en"]) == 0
    facts = json.loads(path.read_text(encoding="utf-8"))
    assert set(facts) == {"base", "tuned"}
    for side, model in (("base", load(small_run, is_base=True)), ("tuned", load(small_run))):
        assert facts[side]["num_rows"] == 70
        for key, value in by_transformers(model, rows).items():
            assert facts[side][key] == pytest.approx(value, rel=1e-3, abs=0.01), (side, key)
    assert facts["tuned"]["answer_loss"] < facts["base"]["answer_loss"]
    printed = capsys.readouterr().out
    assert f"{facts['tuned']['answer_loss']:.3f}" in printed
    assert f"{facts['base']['answer_loss']:.3f}" in printed


def test_any_model(tiny_qwen: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "facts.json"
    assert run(["eval", str(tiny_qwen), str(rows), "--json", str(path), "--lang", "zh"]) == 0
    facts = json.loads(path.read_text(encoding="utf-8"))
    assert set(facts) == {"base"}
    assert facts["base"]["answer_loss"] == pytest.approx(
        by_transformers(load(tiny_qwen), rows)["answer_loss"], rel=1e-3
    )
    assert "测量值" in capsys.readouterr().out


def test_answers_in_a_file(small_run: Path, rows: Path, tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    assert run(["eval", str(small_run), str(rows), "--answers", str(path), "--max-new-tokens", "4"]) == 0
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(lines) == 70
    assert all(set(line) == {"where", "messages", "expected", "answer", "base"} for line in lines)
    model, asked = load(small_run), lines[17]
    assert asked["answer"] == model.chat(asked["messages"], max_new_tokens=4)
    assert asked["base"] == load(small_run, is_base=True).chat(asked["messages"], max_new_tokens=4)


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_bad_rows_and_folders(small_run: Path, tmp_path: Path, lang: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Refused rows end it unless they may be skipped; a folder that is not there is found before anything is loaded."""
    path = tmp_path / "bad.json"
    good = [{"instruction": f"{n}", "output": "x"} for n in range(3)]
    path.write_text(json.dumps([*good, {"instruction": "no answer"}]), encoding="utf-8")
    assert run(["eval", str(small_run), str(path), "--lang", lang]) == 2
    assert "bad.json" in capsys.readouterr().out
    assert run(["eval", str(small_run), str(path), "--invalid", "skip", "--lang", lang]) == 0
    assert run(["eval", str(small_run), str(path), "--answers", str(tmp_path / "no" / "a.jsonl"), "--lang", lang]) == 2
    assert "no_folder" not in capsys.readouterr().err
    assert run(["eval", str(small_run), "--lang", lang]) == 2
