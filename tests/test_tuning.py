"""A search on a small model: every trial is a run of its own, whatever came before it, and a kill changes nothing."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest

from tests.small import small_model
from truetune import tuning
from truetune.cli import run
from truetune.config import examples_folder, resolve
from truetune.console import Console
from truetune.errors import NumericsError
from truetune.rundir import RunDir
from truetune.search import Trial
from truetune.signals import StopFlag
from truetune.tunedir import TuneDir

NUM_TRIALS, NUM_STEPS = 5, 4
KEYS = ("--batch-size", "4", "--dtype", "float32", "--learning-rate", "3e-3", "--ranks", "2,4", "--lora-dropout", "0.1")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small base, rows to train and rows held out."""
    folder = tmp_path_factory.mktemp("tune")
    small_model(folder / "base")
    for name, numbers in (("data", range(24)), ("held", range(24, 32))):
        rows = [{"instruction": f"What is {n} plus {n}?", "output": f"It is {2 * n}."} for n in numbers]
        (folder / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")
    return folder


def words(place: Path, out: Path, *more: str) -> list[str]:
    """The command of the search."""
    data = [str(place / "data.json"), "--eval-data", str(place / "held.json"), "--model", str(place / "base")]
    size = ["--trials", str(NUM_TRIALS), "--max-steps", str(NUM_STEPS)]
    return ["tune", *data, *KEYS, *size, "--output-dir", str(out), *more]


def told(folder: Path) -> list[dict[str, Any]]:
    """The trials without what the clock decides."""
    return [trial.to_dict() | {"seconds": 0} for trial in TuneDir(folder).read_trials()]


@pytest.fixture(scope="module")
def whole(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search that nobody interrupts."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert run(words(place, out)) == 0
    return out


def search_of(whole: Path) -> tuning.Search:
    """What the trials of a search share, built anew from its folder."""
    folder = TuneDir(whole)
    settings, then = resolve({}, folder.config), folder.read_info()
    console = Console(quiet=True)
    flight = tuning._shortened(tuning.preflight(settings.config, console), NUM_STEPS)
    space = tuning.make_space(settings.config, ranks=(2, 4))
    return tuning._prepare(settings, flight, space=space, path=whole, console=console, then=then)[0]


def alone(whole: Path, trial: Trial) -> Trial | None:
    """The trial taken with nothing before it."""
    proposal: Any = SimpleNamespace(values=trial.values, is_hopeless=lambda *_: trial.state == "pruned")
    return tuning.take_trial(search_of(whole), proposal, number=trial.number, stop=StopFlag())


@pytest.mark.slow
def test_each_trial_alone_is_the_same_to_the_bit(whole: Path) -> None:
    """Nothing is left of the trials before: weights, moments, dropout, order."""
    trials = TuneDir(whole).read_trials()
    assert len(trials) == NUM_TRIALS
    assert {trial.values["lora_r"] for trial in trials} >= {2, 4}
    for trial in (trials[1], trials[-1]):
        again = alone(whole, trial)
        assert again is not None
        assert (again.evaluations, again.row_losses) == (trial.evaluations, trial.row_losses)
    losses = [trial.evaluations for trial in trials]
    assert len(set(losses)) == NUM_TRIALS
    assert len({evaluations[0] for evaluations in losses}) == 1


@pytest.mark.slow
def test_a_trial_without_hope_ends_at_an_evaluation(whole: Path) -> None:
    """It counts up to where it was given up, and leaves nothing behind for the next one."""
    search, trials = search_of(whole), TuneDir(whole).read_trials()
    hopeless: Any = SimpleNamespace(values=trials[2].values, is_hopeless=lambda step, _: step >= 2)
    given_up = tuning.take_trial(search, hopeless, number=0, stop=StopFlag())
    assert given_up is not None
    assert (given_up.state, given_up.loss, given_up.row_losses) == ("pruned", None, ())
    assert given_up.evaluations == trials[2].evaluations[:3]
    following: Any = SimpleNamespace(values=trials[1].values, is_hopeless=lambda *_: False)
    after = tuning.take_trial(search, following, number=1, stop=StopFlag())
    assert after is not None
    assert after.evaluations == trials[1].evaluations


@pytest.mark.slow
def test_train_gives_what_the_trial_promised(whole: Path, place: Path, tmp_path: Path) -> None:
    """best.yaml, with the trial's number of steps, comes to the trial's held-out loss at every evaluation."""
    best = min(TuneDir(whole).read_trials(), key=lambda trial: trial.loss or 9e9)
    out = tmp_path / "run"
    more = ["--max-steps", str(NUM_STEPS), "--eval-steps", "1", "--sample-prompts", "none"]
    assert run(["train", "--config", str(whole / "best.yaml"), "--output-dir", str(out), *more]) == 0
    losses = {event["step"]: event["eval_loss"] for event in RunDir(out).read_events() if event["kind"] == "eval"}
    assert len(best.evaluations) == NUM_STEPS + 1
    for step, loss in best.evaluations:
        assert losses[step] == pytest.approx(loss, rel=1e-6)
    assert losses[NUM_STEPS] < losses[0]


@pytest.mark.slow
def test_the_first_trial_is_as_given_and_the_end_is_never_worse(whole: Path) -> None:
    trials = TuneDir(whole).read_trials()
    assert trials[0].values == {"learning_rate": 3e-3, "lora_r": 16, "lora_alpha": 32}
    best = resolve({}, whole / "best.yaml").config
    winner = min((trial for trial in trials if trial.loss is not None), key=lambda trial: trial.loss or 0)
    assert winner.loss is not None
    assert trials[0].loss is not None
    assert winner.loss <= trials[0].loss
    assert (best.learning_rate, best.lora_r, best.lora_alpha) == tuple(winner.values.values())
    assert best.max_steps is None


def test_a_trial_that_goes_on_with_another_ones_weights_is_noticed(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: the adapter of a trial stays in the base."""
    monkeypatch.setattr(peft.PeftModel, "unload", lambda self: self.merge_and_unload(), raising=False)
    assert run(words(place, tmp_path / "out")) == 4
    assert told(tmp_path / "out") == []


def test_every_trial_begins_at_the_base(place: Path, tmp_path: Path) -> None:
    """Two of them: what the first one learned is gone."""
    assert run([*words(place, tmp_path / "out"), "--trials", "2"]) == 0
    starts = {trial.evaluations[0] for trial in TuneDir(tmp_path / "out").read_trials()}
    assert len(starts) == 1
    assert len(told(tmp_path / "out")) == 2


@pytest.mark.slow
def test_what_a_kill_cut_is_taken_again(whole: Path, place: Path, tmp_path: Path) -> None:
    """After any number of lines, and inside one, the search goes on to the same trials; finished ones are not taken."""
    lines = (whole / "trials.jsonl").read_bytes()
    for size in (0, lines.index(b"\n") + 30, len(lines)):
        out = tmp_path / str(size)
        out.mkdir()
        for name in ("tune.json", "config.yaml"):
            content = (whole / name).read_text().replace(str(whole), str(out))
            (out / name).write_text(content)
        (out / "trials.jsonl").write_bytes(lines[:size])
        assert run(["tune", "--resume", "--output-dir", str(out)]) == 0
        assert told(out) == told(whole)
        kept = lines[: lines.rfind(b"\n", 0, size) + 1]
        assert (out / "trials.jsonl").read_bytes().startswith(kept)
        assert resolve({}, out / "best.yaml").config == resolve({}, whole / "best.yaml").config


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.long)])
def test_stopped_in_a_trial_and_resumed(number: int, whole: Path, place: Path, tmp_path: Path) -> None:
    """A real process is killed, or asked to stop, at a moment of chance; what ended is there, and the rest follows."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "truetune", *words(place, out, "--trials", "40")]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    deadline = time.monotonic() + 120
    while not (out / "trials.jsonl").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.005)
    time.sleep(random.random() * 0.3)
    os.kill(process.pid, number)
    _, errors = process.communicate(timeout=60)
    ended = told(out)
    assert 0 < len(ended) < 40, errors
    assert process.returncode == (-number if number == signal.SIGKILL else 130)
    if number == signal.SIGINT:
        assert "--resume --output-dir" in errors
        assert (out / "best.yaml").is_file()
    wanted = max(NUM_TRIALS, len(ended))
    assert run(["tune", "--resume", "--output-dir", str(out), "--trials", str(wanted)]) == 0
    assert told(out)[:NUM_TRIALS] == told(whole)


@pytest.mark.slow
def test_a_changed_search_does_not_go_on(whole: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (whole / "trials.jsonl").read_bytes()
    for more in (["--batch-size", "3"], ["--ranks", "2,8"], ["--warmup-ratio", "0.5"]):
        assert run(["tune", "--resume", "--output-dir", str(whole), *more]) == 2
        assert "changed since the search began" in capsys.readouterr().err
    assert run(words(place, whole)) == 2
    assert "--resume" in capsys.readouterr().err
    assert (whole / "trials.jsonl").read_bytes() == before


@pytest.mark.slow
def test_trials_that_blow_up_fail_alone(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss that is not finite is that trial's end; the next one begins at the base again."""
    real = tuning.Proposal

    class Wild(real):  # type: ignore[misc, valid-type]
        def __init__(self, space: Any, trials: Any, **more: Any) -> None:
            super().__init__(space, trials, **more)
            if len(trials) == 1:
                self.values = self.values | {"learning_rate": 1e30}

    monkeypatch.setattr(tuning, "Proposal", Wild)
    monkeypatch.setattr("truetune.search.Space.highest_rate", 1e31, raising=False)
    monkeypatch.setattr(tuning, "make_space", lambda config, **_: tuning.Space(1e-4, 1e31, (16,), 2.0))
    assert run(words(place, tmp_path / "out", "--trials", "2")) == 0
    first, second = told(tmp_path / "out")
    assert (first["state"], second["state"], second["loss"]) == ("complete", "failed", None)
    assert "loss is" in second["problem"]
    assert second["evaluations"][0] == first["evaluations"][0]


@pytest.mark.slow
def test_nothing_that_ends_is_a_fault(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(words(place, tmp_path / "out", "--trials", "1", "--learning-rate", "1e30", "--lang", "zh")) == 4
    assert "没有一次试验训练到头" in capsys.readouterr().err
    assert told(tmp_path / "out")[0]["state"] == "failed"
    assert not (tmp_path / "out" / "best.yaml").exists()


@pytest.mark.slow
def test_the_search_fits_its_time(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(words(place, tmp_path / "out", "--timeout-s", "0.01", "--trials", "3")) == 0
    said = capsys.readouterr().out
    assert "0 s are enough for about 1 whole trials" in said
    assert "After 1 trials another one would not end" in said
    assert len(told(tmp_path / "out")) == 1


@pytest.mark.slow
def test_rows_must_be_held_out(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = ["tune", str(place / "held.json"), "--model", str(place / "base"), "--output-dir", str(tmp_path / "out")]
    assert run(few) == 2
    assert "no rows are held out" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_example_runs(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = examples_folder()
    monkeypatch.chdir(examples.parent)
    more = ["--model", str(place / "base"), "--output-dir", str(tmp_path / "out"), "--max-length", "4096"]
    assert run(["tune", "--config", str(examples / "tune.yaml"), "--trials", "2", "--max-steps", "2", *more]) == 0
    assert [trial["state"] for trial in told(tmp_path / "out")] == ["complete", "complete"]


def test_a_start_that_is_not_the_base_is_refused() -> None:
    made = Trial(0, "complete", {}, ((0, 2.0),), 1.0, 1.0)
    tuning._check_start(made, 2.0)
    with pytest.raises(NumericsError, match="the base's own is"):
        tuning._check_start(made, 2.0000001)
