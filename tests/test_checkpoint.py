"""Checkpoints: complete or absent, verified, pruned by step, and exact when loaded again."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from truetune import checkpoint
from truetune.errors import UserError
from truetune.model import Base, add_lora, load_base

IDENTITY = {"base": "b", "data": "d", "config": "c"}
BASE = {"name": "org/model", "revision": "v2", "hub": "huggingface", "fingerprint": "b"}


def make_state(folder: Path, *, steps: int = 0, seed: int = 0, **identity: str) -> checkpoint.State:
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
    return checkpoint.State(model, optimizer, scheduler, IDENTITY | identity, BASE)


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


def test_loaded_state_goes_on_to_the_bit(tiny_qwen: Path, tmp_path: Path) -> None:
    """Weights, Adam's moments and the learning rate are those that were saved."""
    state = make_state(tiny_qwen, steps=3)
    path = save(tmp_path, 3, state)
    fresh = make_state(tiny_qwen, seed=9)
    assert checkpoint.load(path, fresh) == 3
    expected, found = step_once(state), step_once(fresh)
    assert len(expected) == 4
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    assert fresh.scheduler.get_last_lr() == state.scheduler.get_last_lr()


def test_folder_holds_no_pickle_and_names_the_base(tiny_qwen: Path, tmp_path: Path) -> None:
    """Safetensors and JSON only; nothing temporary is left."""
    path = save(tmp_path, 1, make_state(tiny_qwen, steps=1))
    assert {file.suffix for file in path.iterdir()} == {".json", ".safetensors"}
    config = json.loads((path / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/model", "v2")
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint-000001"]


@pytest.mark.parametrize("fault", ["flip", "cut", "empty", "remove"])
def test_damage_of_every_file_is_seen(tiny_qwen: Path, tmp_path: Path, fault: str) -> None:
    """Each file damaged in each way is named, and the checkpoint before is found instead."""
    state = make_state(tiny_qwen, steps=1)
    good = save(tmp_path, 1, state)
    names = sorted(file.name for file in good.iterdir())
    assert len(names) == 5
    for name in names:
        path = save(tmp_path, 2, state) / name
        content = path.read_bytes()
        damaged = {"flip": bytes([content[0] ^ 1]) + content[1:], "cut": content[:-1], "empty": b""}
        path.unlink() if fault == "remove" else path.write_bytes(damaged[fault])
        assert checkpoint.damage(good) is None
        assert checkpoint.find(tmp_path) == (good, {"checkpoint-000002": name})


def test_newest_step_wins_whatever_the_clock_says(tiny_qwen: Path, tmp_path: Path) -> None:
    """Search and pruning go by step, not by modification time."""
    state = make_state(tiny_qwen)
    for step in (1_000_000, 100, 20):
        path = save(tmp_path, step, state)
        os.utime(path, (step, 10**9 - step))
    assert checkpoint.find(tmp_path)[0] == tmp_path / "checkpoint-1000000"
    checkpoint.prune(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-000100", "checkpoint-1000000"]


def test_saving_a_step_again_replaces_it(tiny_qwen: Path, tmp_path: Path) -> None:
    """A repeated step is whole, not a mixture."""
    save(tmp_path, 1, make_state(tiny_qwen))
    path = save(tmp_path, 1, make_state(tiny_qwen, steps=2))
    assert checkpoint.damage(path) is None
    fresh: Any = make_state(tiny_qwen)
    checkpoint.load(path, fresh)
    assert fresh.scheduler.last_epoch == 2


@pytest.mark.parametrize("key", ["base", "data", "config"])
def test_other_identity_is_refused(tiny_qwen: Path, tmp_path: Path, key: str) -> None:
    """What differs is named."""
    path = save(tmp_path, 1, make_state(tiny_qwen))
    with pytest.raises(UserError) as caught:
        checkpoint.load(path, make_state(tiny_qwen, **{key: "other"}))
    assert caught.value.key == "resume_changed"
    assert caught.value.values["names"] == key


def test_damaged_ones_are_set_aside(tiny_qwen: Path, tmp_path: Path) -> None:
    """They keep their files, and no longer count among those that are kept."""
    state = make_state(tiny_qwen)
    save(tmp_path, 1, state)
    (save(tmp_path, 2, state) / "manifest.json").write_text("{}")
    checkpoint.set_aside(tmp_path, checkpoint.find(tmp_path)[1])
    save(tmp_path, 3, state)
    checkpoint.prune(tmp_path, 1)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-000003"]
    assert len(list(tmp_path.glob("damaged-checkpoint-000002-*/*"))) == 5
