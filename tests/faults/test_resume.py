"""Resuming: at every step to the same bits (E1), past damage, and never as another run (F10, F13, F14, F18 to F20)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hurt import NUM_STEPS, assert_same, digest, events, orphans, words

from truetune import checkpoint, disk
from truetune.cli import run
from truetune.messages import text
from truetune.rundir import RunDir
from truetune.signals import StopFlag

pytestmark = pytest.mark.slow


@pytest.fixture
def command(data: Path, held_out: Path, tiny_base: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """The words of the run, into `out`."""

    def make(*more: str, **keys: Any) -> list[str]:
        return words(data, tiny_base, tmp_path / "out", *more, **{"eval_data": held_out, **keys})

    return make


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Let the run be stopped, as by SIGTERM, after a step."""

    def set_step(step: int) -> None:
        from truetune.teller import Teller

        tell, flags = Teller.tell, []
        enter = StopFlag.__enter__
        monkeypatch.setattr(StopFlag, "__enter__", lambda self: (flags.append(self), enter(self))[1])

        def tell_and_stop(self: Teller, event: dict[str, Any]) -> None:
            tell(self, event)
            if event["kind"] == "step" and event["step"] == step:
                flags[-1].signal = 15

        monkeypatch.setattr(Teller, "tell", tell_and_stop)

    return set_step


@pytest.mark.parametrize("step", range(1, NUM_STEPS))
def test_every_step(
    step: int, command: Callable[..., list[str]], stop_at: Callable[[int], None], whole: Path, tmp_path: Path
) -> None:
    """Stopped after step k: state, adapter and exit code of a stopped run; resumed: nothing tells that it was (E1)."""
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context():
        stop_at(step)
        assert run(command()) == 143
    assert RunDir(out).read_info()["state"] == "stopped"
    assert disk.read_manifest(out / "adapter")["step"] == step
    assert run(["verify", str(out)]) == 0
    stop_at(-1)
    assert run(command("--resume")) == 0
    assert_same(out, whole)


def test_bits_follow_the_seed(command: Callable[..., list[str]], whole: Path, tmp_path: Path) -> None:
    """Two runs with one seed are equal to the bit, with another seed they are not (E14)."""
    assert run(command()) == 0
    assert_same(tmp_path / "out", whole)
    shutil.rmtree(tmp_path / "out")
    assert run(command(seed=43)) == 0
    assert digest(tmp_path / "out") != digest(whole)


FILES = (
    *("adapter_config.json", "adapter_model.safetensors", "optimizer.safetensors", "trainer_state.json"),
    *("manifest.json", "truetune.json", "chat_template.jinja"),
)


def _damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :]
    path.write_bytes({"flip": flipped, "cut": content[:middle], "zero": bytes(len(content))}[how])


@pytest.mark.parametrize(
    "how", ["cut", pytest.param("flip", marks=pytest.mark.long), pytest.param("zero", marks=pytest.mark.long)]
)
def test_damage_of_every_file(
    how: str, command: Callable[..., list[str]], whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each is named by verify and by resume, which takes the checkpoint before; nothing is deleted (F10)."""
    out = tmp_path / "out"
    for name in FILES:
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(whole, out)
        RunDir(out).write_info(state="running")
        _damage(out / "checkpoints" / "checkpoint-000006" / name, how)
        capsys.readouterr()
        assert run(["verify", str(out)]) == 3
        assert f"checkpoints/checkpoint-000006 ({name})" in capsys.readouterr().out
        assert run(command("--resume")) == 0
        assert text("train.skipped_checkpoint", name="checkpoint-000006", file=name) in capsys.readouterr().out
        assert len(list((out / "checkpoints").glob("damaged-checkpoint-000006-*/*"))) == len(FILES)
        assert_same(out, whole)


def test_a_disk_that_cannot_be_read(
    command: Callable[..., list[str]], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An input-output error is damage like any other (F9)."""
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    RunDir(out).write_info(state="running")
    opened = Path.open

    def open_file(path: Path, *rest: Any, **more: Any) -> Any:
        if path.name == "optimizer.safetensors" and path.parent.name == "checkpoint-000006" and "b" in "".join(rest):
            raise OSError(5, "Input/output error")
        return opened(path, *rest, **more)

    monkeypatch.setattr(Path, "open", open_file)
    found, skipped = checkpoint.find(out / "checkpoints")
    assert (found, skipped) == (
        out / "checkpoints" / "checkpoint-000003",
        {"checkpoint-000006": "optimizer.safetensors"},
    )
    monkeypatch.undo()
    torch.set_num_threads(1)


@pytest.mark.parametrize("shift_s", [-3600, 10 * 365 * 86400])
def test_the_clock_does_not_matter(
    shift_s: int, command: Callable[..., list[str]], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An hour back, ten years on, or all times equal: the newest step is the newest (F13)."""
    import os
    import time

    save, now, count = disk._put, time.time(), []

    def put(staging: Path, target: Path) -> None:
        save(staging, target)
        count.append(target)
        os.utime(target, (now, now + shift_s * len(count)))

    monkeypatch.setattr(disk, "_put", put)
    assert run(command(save_steps=1, save_total_limit=2)) == 0
    names = [path.name for path in checkpoint.by_step(tmp_path / "out" / "checkpoints")]
    assert names == ["checkpoint-000005", "checkpoint-000006"]
    assert digest(tmp_path / "out") == digest(whole)


# --- numbers that are not finite (F14) ---


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make the loss of some steps NaN."""

    def poison(*steps: int) -> None:
        from truetune import loop

        train_step = loop.train_step

        def hurt_step(*rest: Any, seeds: tuple[int, int], **more: Any) -> Any:
            result = train_step(*rest, seeds=seeds, **more)
            if seeds[1] in steps:
                object.__setattr__(result, "loss", float("nan"))
            return result

        monkeypatch.setattr(loop, "train_step", hurt_step)

    return poison


def test_nan_stops_and_loses_nothing(
    command: Callable[..., list[str]],
    poisoned: Callable[..., None],
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Exit 4, rows named, the state of the step before saved: when the cause is gone, it goes on from there."""
    out = tmp_path / "out"
    poisoned(5)
    assert run(command()) == 4
    said = capsys.readouterr().err
    assert said.startswith("step 5: ")
    assert said.count("numbers.json:") == 5
    assert "(row " in said
    assert checkpoint.find(out / "checkpoints")[0] == out / "checkpoints" / "checkpoint-000004"
    assert (RunDir(out).read_info()["state"], run(["verify", str(out)])) == ("failed", 0)
    monkeypatch.undo()
    torch.set_num_threads(1)
    assert run(command("--resume")) == 0
    assert "Continuing after step 4." in capsys.readouterr().out
    assert_same_but_checkpoints(out, whole)


def assert_same_but_checkpoints(out: Path, whole: Path) -> None:
    assert events(out) == events(whole)
    assert digest(out) == digest(whole)
    assert orphans(out) == []


def test_skipped_steps_are_told_and_counted_over_resumption(
    command: Callable[..., list[str]],
    poisoned: Callable[..., None],
    stop_at: Callable[[int], None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    poisoned(2, 5)
    stop_at(3)
    assert run(command("--skip-bad", "1")) == 143
    stop_at(-1)
    assert run(command("--resume", "--skip-bad", "1")) == 4
    assert run(command("--resume", "--skip-bad", "2")) == 0
    taken = [(event["kind"], event["step"]) for event in events(out) if event["kind"] != "eval"]
    assert taken == [("step", 1), ("skipped", 2), ("step", 3), ("step", 4), ("skipped", 5), ("step", 6)]
    lines = [json.loads(line) for line in (out / "steps.jsonl").read_text().splitlines()]
    assert [(line["step"], len(line["rows"])) for line in lines] == [(1, 5), (2, 5), (3, 3), (4, 5), (5, 5), (6, 3)]
    assert text("train.skipped", step=2, loss="nan", row_ids=lines[1]["rows"]) in capsys.readouterr().out
    assert run(["verify", str(out)]) == 0


# --- what changed (F18 to F20) ---


@pytest.fixture
def stopped(command: Callable[..., list[str]], stop_at: Callable[[int], None], tmp_path: Path) -> Path:
    """A run stopped after step 3."""
    stop_at(3)
    assert run(command()) == 143
    stop_at(-1)
    return tmp_path / "out"


def _other_data(path: Path) -> Path:
    other = path.parent / "other.json"
    other.write_text(path.read_text().replace("It is 4.", "It is 5."))
    return other


def _other_model(path: Path, folder: Path, *, part: str) -> Path:
    other = folder / "model"
    shutil.copytree(path, other)
    if part == "template":
        template = other / "chat_template.jinja"
        template.write_text(template.read_text() + "\n")
    else:
        from safetensors.torch import load_file, save_file

        weights = load_file(other / "model.safetensors")
        weights["model.norm.weight"][0] += 1
        save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    return other


CHANGES: dict[str, tuple[str, Callable[..., dict[str, Any]]]] = {
    "data": ("data", lambda data, model, tmp: {"data": _other_data(data)}),
    "seed": ("seed (42 → 1)", lambda *_: {"seed": 1}),
    "learning rate": ("learning_rate (0.01 → 0.02)", lambda *_: {"learning_rate": 0.02}),
    "epochs": ("num_train_epochs (2.0 → 3.0)", lambda *_: {"num_train_epochs": 3}),
    "system": ('data, system (null → "x")', lambda *_: {"system": "x"}),
    "template": ("template", lambda data, model, tmp: {"model": _other_model(model, tmp, part="template")}),
    "base": ("base", lambda data, model, tmp: {"model": _other_model(model, tmp, part="weights")}),
    "rank": ("lora_r (2 → 4)", lambda *_: {"lora_r": 4}),
}


@pytest.mark.parametrize("what", CHANGES)
def test_changes_are_listed_and_refused(
    what: str,
    stopped: Path,
    data: Path,
    held_out: Path,
    tiny_base: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Exit 2, the run untouched; --allow-changed says what is other and goes on, if the weights fit."""
    names, change = CHANGES[what]
    changed = change(data, tiny_base, tmp_path)
    path, model = changed.pop("data", data), changed.pop("model", tiny_base)
    words_now = words(path, model, stopped, "--resume", **{"eval_data": held_out, **changed})
    before = {file: file.read_bytes() for file in stopped.rglob("*") if file.is_file()}
    capsys.readouterr()
    assert run(words_now) == 2
    said = capsys.readouterr().err
    for name in names.split(", "):
        assert name in said
    assert {file: file.read_bytes() for file in stopped.rglob("*") if file.is_file()} == before
    fits = what not in ("rank", "base")
    assert run([*words_now, "--allow-changed"]) == (0 if fits else 2)
    if fits:
        out = capsys.readouterr().out
        assert all(text("train.changed", name=name.partition(" ")[0], values="") in out for name in names.split(", "))
        last = 9 if what == "epochs" else 6
        assert [event["step"] for event in events(stopped) if event["kind"] == "step"] == [*range(1, last + 1)]
        assert run(["verify", str(stopped)]) == 0


@pytest.mark.parametrize(("version", "code"), [("{major}.99.9", 0), ("99.0.0", 2)])
def test_other_versions(
    version: str,
    code: int,
    stopped: Path,
    command: Callable[..., list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A minor one is said, a major one refused unless it is allowed (F19)."""
    now = checkpoint.versions()
    other = version.format(major=now["torch"].split(".")[0])
    monkeypatch.setattr(checkpoint, "versions", lambda: now | {"torch": other})
    capsys.readouterr()
    assert run(command("--resume")) == code
    said = capsys.readouterr()
    assert f"torch ({now['torch']} → {other})" in said.out + said.err
    if code:
        assert run(command("--resume", "--allow-changed")) == 0


def test_a_finished_run_with_more_epochs(
    command: Callable[..., list[str]], whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Finished is finished, unless more is asked for by name; then it goes on after its last step (F20)."""
    out = tmp_path / "out"
    assert run(command()) == 0
    capsys.readouterr()
    assert run(command("--resume", num_train_epochs=3)) == 0
    assert text("train.already_done", path=out) in capsys.readouterr().out
    assert digest(out) == digest(whole)
    assert run(command("--resume", "--allow-changed", num_train_epochs=3)) == 0
    said = capsys.readouterr().out
    assert "num_train_epochs (2.0 → 3.0)" in said
    assert "Continuing after step 6." in said
    assert [event["step"] for event in events(out) if event["kind"] == "step"] == [*range(1, 10)]
    assert run(["verify", str(out)]) == 0


def test_no_checkpoint_yet_begins_at_the_base(command: Callable[..., list[str]], whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(command()) == 0
    shutil.rmtree(out / "checkpoints")
    RunDir(out).write_info(state="running")
    assert run(command("--resume")) == 0
    assert_same(out, whole)


def test_samples_are_taken_again_as_they_were(
    data: Path, held_out: Path, tiny_base: Path, stop_at: Callable[[int], None], tmp_path: Path
) -> None:
    """Stopped between two samples and resumed: the same answers of base and current model, at the same steps."""
    keys = {"eval_data": held_out, "sample_prompts": "How much is 3 and 4?", "eval_steps": 3}
    assert run(words(data, tiny_base, tmp_path / "whole", **keys)) == 0
    stop_at(4)
    assert run(words(data, tiny_base, tmp_path / "resumed", **keys)) == 143
    stop_at(-1)
    assert run(words(data, tiny_base, tmp_path / "resumed", "--resume", **keys)) == 0
    assert events(tmp_path / "resumed") == events(tmp_path / "whole")
    samples = [event for event in events(tmp_path / "whole") if event["kind"] == "sample"]
    assert [event["step"] for event in samples] == [0, NUM_STEPS]
    assert samples[0]["base"] == samples[0]["answer"] == samples[1]["base"] != samples[1]["answer"]


# --- the result ---


def _losses(monkeypatch: pytest.MonkeyPatch, *losses: float) -> None:
    """Let the evaluations give these losses."""
    from truetune import assembly

    given: Iterator[float] = iter(losses)
    monkeypatch.setattr(assembly, "loss_evaluator", lambda *_, **__: lambda: {"eval_loss": next(given)})


@pytest.mark.parametrize(("result", "step"), [("best", 2), ("last", 6)])
def test_which_step_becomes_the_result(
    result: str,
    step: int,
    command: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The best step is saved although no save was due, and kept although newer ones came."""
    _losses(monkeypatch, 3.0, 1.0, 2.0, 1.5)
    out = tmp_path / "out"
    assert run(command(result=result, save_steps=1, save_total_limit=2)) == 0
    assert disk.read_manifest(out / "adapter")["step"] == step
    path = out / "checkpoints" / f"checkpoint-{step:06d}" / "adapter_model.safetensors"
    assert (out / "adapter" / path.name).read_bytes() == path.read_bytes()
    said = text("train.best", step=2, loss=1.0)
    assert (said in capsys.readouterr().out) == (result == "best")
    kept = [checkpoint.step_of(path) for path in checkpoint.by_step(out / "checkpoints")]
    assert kept == [2, 5, 6]


def test_it_ends_when_it_gets_worse(
    command: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _losses(monkeypatch, 3.0, 1.0, 2.0, 1.5)
    out = tmp_path / "out"
    assert run(command(result="best", early_stopping_patience=1)) == 0
    assert [event["step"] for event in events(out) if event["kind"] == "step"] == [1, 2, 3, 4]
    assert disk.read_manifest(out / "adapter")["step"] == 2
    assert RunDir(out).read_info()["state"] == "done"
    assert text("train.stopped_early", step=4, best_step=2) in capsys.readouterr().out


def test_best_needs_rows_held_out(data: Path, tiny_base: Path, tmp_path: Path) -> None:
    assert run(words(data, tiny_base, tmp_path / "out", result="best", eval_split=0)) == 2
    assert not (tmp_path / "out").exists()
