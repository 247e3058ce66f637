"""Runs with a preference loss, through the command line: what they tell, resume to the bit, refuse, and report."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from truetune import assembly, loop, report
from truetune.cli import run
from truetune.config import LOSSES, load_yaml
from truetune.engine import preference
from truetune.messages import CATALOGUES, text
from truetune.rundir import RunDir

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("short_answers")]

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
REWARDS = ("rewards_chosen", "rewards_rejected", "reward_accuracy", "reward_margin")
FREE = ("seconds", "memory_bytes", "cpu_percent", "gpu_percent")
KEYS = ["--batch-size", "8", "--lora-dropout", "0.1", "--learning-rate", "1e-2", "--save-steps", "2"]
COMPUTED = ["--dtype", "float32", "--attention", "trie", "--max-tokens-per-forward", "64"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty rows: 32 to train, 8 held out; answers begin alike."""
    path = tmp_path_factory.mktemp("data") / "sums.json"
    rows = [
        {"prompt": f"What is {n} plus {n}?", "chosen": f"It is {2 * n}.", "rejected": f"It is hard to say, {n} times."}
        for n in range(40)
    ]
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def words(data: Path, model: Path, out: Path, loss: str) -> list[str]:
    """The words of a run of six steps, in several forwards each."""
    more = ["--loss", loss, "--max-steps", "6", "--eval-steps", "3", "--gradient-checkpointing", "true"]
    return ["train", str(data), "--model", str(model), "--output-dir", str(out), *KEYS, *COMPUTED, *more]


@pytest.fixture(scope="module")
def whole(data: Path, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """An uninterrupted run with a loss, each once."""
    folder = tmp_path_factory.mktemp("whole")

    def make(loss: str) -> Path:
        if not (folder / loss).exists():
            assert run(words(data, tiny_base, folder / loss, loss)) == 0
        return folder / loss

    return make


def told(out: Path, kind: str) -> list[dict[str, Any]]:
    """The events of a kind, without what the clock and the machine decide."""
    events = [event for event in RunDir(out).read_events() if event["kind"] == kind]
    return [{key: value for key, value in event.items() if key not in FREE} for event in events]


def test_steps_and_evaluations_tell_loss_and_rewards(whole: Callable[[str], Path]) -> None:
    """Before step 1 the loss is log 2 and no answer is preferred; then the chosen ones are."""
    steps, evaluations = told(whole("dpo"), "step"), told(whole("dpo"), "eval")
    assert [event["step"] for event in evaluations] == [0, 3, 6]
    assert all({f"eval_{name}" for name in REWARDS} < set(event) for event in evaluations)
    assert all(set(REWARDS) < set(event) for event in steps)
    assert evaluations[0]["eval_loss"] == pytest.approx(0.693147, rel=1e-5)
    assert (evaluations[0]["eval_reward_accuracy"], evaluations[0]["eval_reward_margin"]) == (0.5, 0)
    assert evaluations[-1]["eval_loss"] < 0.6
    assert evaluations[-1]["eval_reward_accuracy"] == 1
    assert all(event["pairs"] == 2 * event["rows"] for event in steps)
    assert all(
        event["reward_margin"] == pytest.approx(event["rewards_chosen"] - event["rewards_rejected"], abs=1e-6)
        for event in steps
    )
    assert all(event["computed_tokens"] < event["learned_tokens"] + event["rows"] * 40 for event in steps)


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_stopped_and_resumed_is_the_same_to_the_bit(
    loss: str,
    whole: Callable[[str], Path],
    data: Path,
    tiny_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A signal in step 3: saved; resumed: the events, the weights. With dropout, recomputation and several forwards."""
    take = loop.train_step

    def stopping(*rest: Any, seeds: tuple[int, int], **more: Any) -> Any:
        if seeds[1] == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return take(*rest, seeds=seeds, **more)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", stopping)
        assert run(words(data, tiny_base, out, loss)) == 143
    assert [event["step"] for event in told(out, "step")] == [1, 2, 3]
    assert run(["train", "--resume", "--output-dir", str(out)]) == 0
    for kind in ("step", "eval"):
        assert told(out, kind) == told(whole(loss), kind)
    for name in ("adapter_model.safetensors",):
        assert (out / "adapter" / name).read_bytes() == (whole(loss) / "adapter" / name).read_bytes()
    assert run(["verify", str(out), "--resume-exact", "4"]) == 0


def test_a_reward_that_is_not_what_it_was_is_found(whole: Callable[[str], Path], tmp_path: Path, capsys: Any) -> None:
    """verify compares the margins, too."""
    import shutil

    copy = RunDir(Path(shutil.copytree(whole("dpo"), tmp_path / "copy")))
    events = list(copy.read_events())
    [event for event in events if event["kind"] == "step"][-1]["reward_margin"] += 1e-9
    copy.events.write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")
    assert run(["verify", str(copy.path), "--resume-exact", "2"]) == 4
    assert "reward_margin" in capsys.readouterr().err


def test_the_card_says_how_often_the_chosen_answer_is_likelier(whole: Callable[[str], Path]) -> None:
    """Base against tuned, as the run's own evaluations have it, in both languages; the adapter names the loss."""
    card = report.read(whole("dpo"))
    assert card is not None
    assert card["findings"][0]["name"] == "preferred"
    last = told(whole("dpo"), "eval")[-1]
    assert card["preferred"]["gained"] == last["eval_reward_accuracy"]
    assert card["preferred"]["margin"] == pytest.approx(last["eval_reward_margin"] / 0.1, rel=1e-4)
    assert 0 <= card["preferred"]["base_likelier"] <= card["preferred"]["tuned_likelier"] == 1
    for lang in CATALOGUES:
        assert report.sentences(card, lang)[0].count("100%") >= 1
        assert text("card.chosen_likelier", lang) in [label for label, *_ in report.metric_lines(card, lang)]
    assert '"dpo"' in (whole("dpo") / "adapter" / "README.md").read_text(encoding="utf-8")


def test_a_run_that_learned_no_preference_is_told_so(data: Path, tiny_base: Path, tmp_path: Path, capsys: Any) -> None:
    """At a learning rate of almost 0; the screen says what is compared before training."""
    line = words(data, tiny_base, tmp_path / "out", "ipo")
    line[line.index("1e-2")] = "1e-9"
    assert run([*line, "--max-steps", "1"]) == 0
    said = capsys.readouterr().out
    assert text("note.compared", count=40, loss="ipo") in said
    assert text("train.first_rejected") in said
    card = report.read(tmp_path / "out")
    assert card is not None
    assert card["findings"][0]["name"] == "not_preferred"


@pytest.mark.parametrize("loss", LOSSES[1:])
def test_the_example_runs_with_every_loss(
    loss: str, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Two steps each; what runs is compared with the model's own code first, by the loss itself."""
    monkeypatch.chdir(EXAMPLES.parent)
    taken: list[str] = []
    aim = preference.Preference.aim

    def noted(self: Any, *rest: Any, **share: Any) -> Any:
        taken.append(self.name)
        return aim(self, *rest, **share)

    monkeypatch.setattr(preference.Preference, "aim", noted)
    line = ["train", "--config", "examples/dpo.yaml", "--model", str(tiny_base), "--max-steps", "2", "--loss", loss]
    assert load_yaml(EXAMPLES / "dpo.yaml")[0]["loss"] == "dpo"
    assert run([*line, "--output-dir", str(tmp_path / "out"), "--dtype", "float32"]) == 0
    said = capsys.readouterr().out
    assert [event["step"] for event in told(tmp_path / "out", "step")] == [1, 2]
    (comparison,) = told(tmp_path / "out", "comparison")
    assert (comparison["attention"], comparison["is_same"]) == ("trie", True)
    # Plain and trie compared, two evaluations, two steps.
    assert taken == [loss] * 6
    assert "GB" in said


@pytest.mark.parametrize("loss", ["dpo", "orpo"])
def test_rows_that_do_not_fit_the_loss_are_named(loss: str, tiny_base: Path, tmp_path: Path, capsys: Any) -> None:
    """Rows of one answer, plain text, and answers behind other turns; each with its line and what to do."""
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    files = {
        "a.jsonl": {"instruction": "Hi", "output": "Yo."},
        "b.jsonl": {"text": "All of it."},
        "c.jsonl": {
            "chosen": [*turns, turns[0], {"role": "assistant", "content": "One."}],
            "rejected": [{"role": "user", "content": "Ho"}, {"role": "assistant", "content": "Two."}],
        },
    }
    for name, row in files.items():
        (tmp_path / name).write_text(json.dumps(row) + "\n", encoding="utf-8")
    paths = [str(tmp_path / name) for name in files]
    assert run(["check", *paths, "--model", str(tiny_base), "--loss", loss]) == 2
    said = capsys.readouterr().out
    one, two = text("error.row_no_rejected", loss=loss), text("error.row_two_prompts", loss=loss)
    for name, reason in {"a.jsonl": one, "b.jsonl": one, "c.jsonl": two}.items():
        assert f"{tmp_path / name}:1: {reason}" in said
    assert text("fix.row_no_rejected") in said
    assert run(["check", paths[0], "--model", str(tiny_base)]) == 0


def test_memory_that_is_short_halves_forwards_down_to_a_row(
    data: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What fits is taken, with its event; where not even a row fits, the run ends and does not try for ever."""
    take, limit = loop.train_step, [100]

    def hungry(engine: Any, forwards: Any, **more: Any) -> Any:
        if max(forward.num_tokens for forward in forwards) > limit[0]:
            raise MemoryError
        return take(engine, forwards, **more)

    monkeypatch.setattr(loop, "train_step", hungry)
    line = words(data, tiny_base, tmp_path / "out", "dpo")
    line[line.index("64")] = "1024"
    assert run([*line, "--max-steps", "1"]) == 0
    assert [event["max_tokens"] for event in told(tmp_path / "out", "memory")][-1] <= 100
    limit[0] = 3
    line[line.index(str(tmp_path / "out"))] = str(tmp_path / "other")
    assert run(line) == 3


def test_answers_that_would_be_scaled_apart_are_refused(
    data: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """A model that scales positions by the longest pair of a forward, and rows on both sides of its threshold."""
    monkeypatch.setattr(assembly, "scaled_from", lambda _: 8)
    assert run(words(data, tiny_base, tmp_path / "out", "dpo")) == 2
    assert text("fix.preference_scaled", limit=8) in capsys.readouterr().err
