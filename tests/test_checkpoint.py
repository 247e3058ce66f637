"""Checkpoints: complete or absent, verified, pruned by step, and exact when loaded again."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from truetune import checkpoint
from truetune.errors import MachineError, NumericsError, UserError
from truetune.model import Base, add_lora, load_base

IDENTITY = {"base": "b", "data": "d", "config.seed": "1"}
BASE = {"name": "org/model", "revision": "v2", "hub": "huggingface", "fingerprint": "b"}


def make_state(folder: Path, *, steps: int = 0, seed: int = 0) -> checkpoint.State:
    """A tiny model with optimizer and scheduler, moved by `steps` steps."""
    model = add_lora(
        load_base(Base(str(folder), folder, ""), "float32"), r=2, alpha=4, dropout=0.0, targets=["q_proj"], seed=seed
    )
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    torch.manual_seed(5)
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        scheduler.step()
    return checkpoint.State(model, optimizer, scheduler, IDENTITY, BASE)


def save(folder: Path, step: int, state: checkpoint.State) -> Path:
    """Save without extra files."""
    return checkpoint.save(folder, step, state=state, write_extra=lambda _folder: None)


def step_once(state: checkpoint.State) -> dict[str, torch.Tensor]:
    """One more step with a fixed gradient; the weights after it."""
    parameters = {name: p for name, p in state.model.named_parameters() if p.requires_grad}
    for parameter in parameters.values():
        parameter.grad = torch.full_like(parameter, 0.3)
    state.optimizer.step()
    state.scheduler.step()
    return {name: p.detach().clone() for name, p in parameters.items()}


def test_loaded_state_goes_on_to_the_bit(tiny_base: Path, tmp_path: Path) -> None:
    """Weights, Adam's moments and the learning rate are those that were saved."""
    state = make_state(tiny_base, steps=3)
    path = save(tmp_path, 3, state)
    fresh = make_state(tiny_base, seed=9)
    assert checkpoint.load(path, fresh) == 3
    expected, found = step_once(state), step_once(fresh)
    assert len(expected) == 4
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    assert fresh.scheduler.get_last_lr() == state.scheduler.get_last_lr()


def test_folder_holds_no_pickle_and_names_the_base(tiny_base: Path, tmp_path: Path) -> None:
    """Safetensors and JSON only; nothing temporary is left."""
    path = save(tmp_path, 1, make_state(tiny_base, steps=1))
    assert {file.suffix for file in path.iterdir()} == {".json", ".safetensors"}
    config = json.loads((path / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/model", "v2")
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint-000001"]


@pytest.mark.parametrize("fault", ["flip", "cut", "empty", "remove"])
def test_damage_of_every_file_is_seen(tiny_base: Path, tmp_path: Path, fault: str) -> None:
    """Each file damaged in each way is named, and the checkpoint before is found instead."""
    state = make_state(tiny_base, steps=1)
    good = save(tmp_path, 1, state)
    names = sorted(file.name for file in good.iterdir())
    assert len(names) == 5
    for name in names:
        path = save(tmp_path, 2, state) / name
        content = path.read_bytes()
        damaged = {"flip": bytes([content[0] ^ 1]) + content[1:], "cut": content[:-1], "empty": b""}
        path.unlink() if fault == "remove" else path.write_bytes(damaged[fault])
        assert checkpoint.broken_file(good) is None
        assert checkpoint.find(tmp_path) == (good, {"checkpoint-000002": name})


def test_newest_step_wins_whatever_the_clock_says(tiny_base: Path, tmp_path: Path) -> None:
    """Search and pruning go by step, not by modification time."""
    state = make_state(tiny_base)
    for step in (1_000_000, 100, 20):
        path = save(tmp_path, step, state)
        os.utime(path, (step, 10**9 - step))
    assert checkpoint.find(tmp_path)[0] == tmp_path / "checkpoint-1000000"
    checkpoint.prune(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-000100", "checkpoint-1000000"]


def test_saving_a_step_again_replaces_it(tiny_base: Path, tmp_path: Path) -> None:
    """A repeated step is whole, not a mixture."""
    save(tmp_path, 1, make_state(tiny_base))
    path = save(tmp_path, 1, make_state(tiny_base, steps=2))
    assert checkpoint.broken_file(path) is None
    fresh: Any = make_state(tiny_base)
    checkpoint.load(path, fresh)
    assert fresh.scheduler.last_epoch == 2


@pytest.mark.parametrize(
    ("changed", "key", "names"),
    [
        ({"data": "other"}, "resume_changed", "data"),
        ({"config.seed": "2", "data": "x"}, "resume_changed", "seed (1 → 2), data"),
        ({"config.new": "2"}, "resume_changed", "new (- → 2)"),
        ({"base": "other"}, "resume_other_shape", "base"),
        ({"config.lora_r": "2"}, "resume_other_shape", "lora_r (- → 2)"),
    ],
)
def test_other_identity_is_refused(
    changed: dict[str, str], key: str, names: str, tiny_base: Path, tmp_path: Path
) -> None:
    """What differs is named, keys with both values; allowed, it is returned, unless the tensors would not fit."""
    path = save(tmp_path, 1, make_state(tiny_base))
    checkpoint.check_identity(path, IDENTITY)
    with pytest.raises(UserError) as caught:
        checkpoint.check_identity(path, IDENTITY | changed)
    assert (caught.value.key, caught.value.values["names"]) == (key, names)
    if key == "resume_changed":
        shown = checkpoint.check_identity(path, IDENTITY | changed, allow_changed=True)
        assert ", ".join(f"{name}{values}" for name, values in shown.items()) == names
    else:
        with pytest.raises(UserError):
            checkpoint.check_identity(path, IDENTITY | changed, allow_changed=True)


def test_other_versions_are_told(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path, 1, make_state(tiny_base))
    assert checkpoint.other_versions(path) == {}
    now = checkpoint.versions()
    monkeypatch.setattr(checkpoint, "versions", lambda: now | {"peft": "9.9"})
    assert checkpoint.other_versions(path) == {"peft": (now["peft"], "9.9")}


def test_learning_rate_is_that_of_the_run_now(tiny_base: Path, tmp_path: Path) -> None:
    """Resumed with another learning rate, that one is in force at once, on its own curve."""
    path = save(tmp_path, 3, make_state(tiny_base, steps=3))
    state = make_state(tiny_base)
    state.scheduler.base_lrs = [0.5]
    checkpoint.load(path, state)
    assert state.scheduler.get_last_lr() == [0.5 / 4] == [group["lr"] for group in state.optimizer.param_groups]


def test_the_best_and_two_undamaged_stay(tiny_base: Path, tmp_path: Path) -> None:
    state = make_state(tiny_base)
    for step in range(1, 7):
        save(tmp_path, step, state)
    checkpoint.prune(tmp_path, keep=1, best=2)
    assert [checkpoint.step_of(path) for path in checkpoint.by_step(tmp_path)] == [2, 5, 6]
    (tmp_path / "checkpoint-000006" / "manifest.json").write_text("{}")
    save(tmp_path, 7, state)
    checkpoint.prune(tmp_path, keep=2, best=7)
    # Of 6 and 7 only one is good: nothing goes.
    assert [checkpoint.step_of(path) for path in checkpoint.by_step(tmp_path)] == [2, 5, 6, 7]


def test_a_copy_under_another_step_is_damaged(tiny_base: Path, tmp_path: Path) -> None:
    path = save(tmp_path, 1, make_state(tiny_base))
    shutil.copytree(path, tmp_path / "checkpoint-000009")
    assert checkpoint.find(tmp_path) == (path, {"checkpoint-000009": "manifest.json"})


def test_what_is_no_checkpoint_is_left_alone(tiny_base: Path, tmp_path: Path) -> None:
    path = save(tmp_path, 1, make_state(tiny_base))
    for name in ("checkpoint-last", "checkpoint-1.bak", ".tmp-checkpoint-000002-1", "notes"):
        (tmp_path / name).mkdir()
    assert checkpoint.by_step(tmp_path) == [path]


def test_weights_that_are_not_finite_are_not_saved(tiny_base: Path, tmp_path: Path) -> None:
    state = make_state(tiny_base)
    with torch.no_grad():
        next(part for part in state.model.parameters() if part.requires_grad)[0, 0] = float("inf")
    with pytest.raises(NumericsError) as caught:
        save(tmp_path, 1, state)
    assert "lora_A" in caught.value.values["name"]
    assert list(tmp_path.iterdir()) == []


def test_rehearsal_leaves_nothing_and_sees_a_bad_disk(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = make_state(tiny_base)
    checkpoint.rehearse(tmp_path, state=state, write_extra=lambda _: None)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(checkpoint, "damage", lambda _: "optimizer.safetensors")
    with pytest.raises(MachineError) as caught:
        checkpoint.rehearse(tmp_path, state=state, write_extra=lambda _: None)
    assert caught.value.values["file"] == "optimizer.safetensors"
    assert list(tmp_path.iterdir()) == []


def test_damaged_ones_are_set_aside(tiny_base: Path, tmp_path: Path) -> None:
    """They keep their files, and no longer count among those that are kept."""
    state = make_state(tiny_base)
    save(tmp_path, 1, state)
    (save(tmp_path, 2, state) / "manifest.json").write_text("{}")
    checkpoint.set_aside(tmp_path, checkpoint.find(tmp_path)[1])
    save(tmp_path, 3, state)
    save(tmp_path, 4, state)
    checkpoint.prune(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-000003", "checkpoint-000004"]
    assert len(list(tmp_path.glob("damaged-checkpoint-000002-*/*"))) == 5
