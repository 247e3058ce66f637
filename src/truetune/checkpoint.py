"""Save, find and load the state of a run. No pickle: safetensors and JSON.

A checkpoint is staged beside its place, every file fsynced, the manifest written last, and then renamed; so a folder
called `checkpoint-000100` is complete, or damaged later, which its hashes tell.

    checkpoint-000100/
      adapter_config.json  adapter_model.safetensors      PEFT's own layout, usable as it is
      optimizer.safetensors  trainer_state.json           AdamW moments; step, scheduler
      manifest.json                                       size and sha256 of each file; what the run was
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from truetune.errors import UserError
from truetune.model import hash_file
from truetune.rundir import to_json, write_atomic

MANIFEST = "manifest.json"


def save_adapter(model: Any, folder: Path, *, base: Mapping[str, str]) -> None:
    """Write PEFT's adapter files; `base`: name (hub id or absolute path) and revision of the model below it."""
    # save_embedding_layers="auto" asks the hub at every save (peft 0.21, utils/save_and_load.py).
    model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / "adapter_config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    values |= {"base_model_name_or_path": base["name"], "revision": base["revision"]}
    write_atomic(path, to_json(values, indent=2) + "\n")


@dataclass(frozen=True)
class State:
    """What a checkpoint holds: `identity` are the hashes of what the run was (data, base, template, configuration).

    `base`: where the base is, see Base.reference.
    """

    model: Any
    optimizer: Any
    scheduler: Any
    identity: Mapping[str, str]
    base: Mapping[str, str]


def save(folder: Path, step: int, *, state: State, write_extra: Callable[[Path], None]) -> Path:
    """Write `folder`/checkpoint-<step> and return it. `write_extra`: adds files (tokenizer, probes) before sealing."""
    target = folder / f"checkpoint-{step:06d}"
    staging = folder / f".tmp-{target.name}-{os.getpid()}"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    save_adapter(state.model, staging, base=state.base)
    write_extra(staging)
    tensors, groups = _flatten(state.optimizer.state_dict())
    save_file(tensors, str(staging / "optimizer.safetensors"))
    values = {"step": step, "scheduler": state.scheduler.state_dict(), "param_groups": groups}
    (staging / "trainer_state.json").write_text(to_json(values), encoding="utf-8")
    seal(staging, step=step, identity=state.identity)
    if target.exists():
        shutil.rmtree(target)
    staging.rename(target)
    sync_folder(folder)
    return target


def seal(folder: Path, *, step: int, identity: Mapping[str, str]) -> None:
    """Fsync every file of `folder` and write its manifest last."""
    files = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        files[path.name] = {"bytes": path.stat().st_size, "sha256": hash_file(path)}
    manifest = {"format": 1, "step": step, "identity": dict(identity), "files": files}
    write_atomic(folder / MANIFEST, _signed(manifest))
    sync_folder(folder)


def _signed(manifest: dict[str, Any]) -> str:
    """Return the manifest's text with the hash of itself, so that damage to it is seen, too."""
    digest = hashlib.sha256(to_json(manifest).encode()).hexdigest()
    return to_json(manifest | {"sha256": digest}, indent=2) + "\n"


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power loss."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def damage(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint, or None if every file matches the manifest."""
    try:
        content = (folder / MANIFEST).read_text(encoding="utf-8")
        manifest = json.loads(content)
    except (OSError, ValueError):
        return MANIFEST
    if content != _signed({key: value for key, value in manifest.items() if key != "sha256"}):
        return MANIFEST
    for name, expected in manifest["files"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != expected["bytes"] or hash_file(path) != expected["sha256"]:
            return str(name)
    return None


def find(folder: Path) -> tuple[Path | None, dict[str, str]]:
    """Return (newest undamaged checkpoint or None, {skipped checkpoint: damaged file})."""
    skipped: dict[str, str] = {}
    for path in reversed(_by_step(folder)):
        broken = damage(path)
        if broken is None:
            return path, skipped
        skipped[path.name] = broken
    return None, skipped


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints, by step and never by time."""
    for path in _by_step(folder)[:-keep]:
        shutil.rmtree(path)


def set_aside(folder: Path, names: Iterable[str]) -> None:
    """Rename damaged checkpoints, so that they are neither found nor counted again; nothing is deleted."""
    for name in names:
        (folder / name).rename(folder / f"damaged-{name}-{os.getpid()}")


def _by_step(folder: Path) -> list[Path]:
    return sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))


def check_identity(folder: Path, identity: Mapping[str, str]) -> None:
    """Refuse to resume a run of other data, base or configuration.

    Raises: UserError listing what differs.
    """
    saved = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["identity"]
    differing = sorted(key for key in identity if saved.get(key) != identity[key])
    if differing:
        raise UserError("resume_changed", where=str(folder), fix="resume_changed", names=", ".join(differing))


def load(folder: Path, state: State) -> int:
    """Put a checkpoint into the model, optimizer and scheduler of `state`; return its step.

    Raises: UserError if the checkpoint belongs to a run of other data, base, template or configuration.
    """
    from peft import set_peft_model_state_dict

    check_identity(folder, state.identity)
    set_peft_model_state_dict(state.model, load_file(str(folder / "adapter_model.safetensors")))
    values = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    tensors = load_file(str(folder / "optimizer.safetensors"))
    state.optimizer.load_state_dict(_unflatten(tensors, values["param_groups"]))
    state.scheduler.load_state_dict(values["scheduler"])
    return int(values["step"])


def _flatten(state: dict[str, Any]) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Return an optimizer's state as {"index.name": tensor} and its parameter groups."""
    tensors = {f"{index}.{name}": value for index, values in state["state"].items() for name, value in values.items()}
    return tensors, state["param_groups"]


def _unflatten(tensors: dict[str, torch.Tensor], groups: list[dict[str, Any]]) -> dict[str, Any]:
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = tensor
    return {"state": state, "param_groups": groups}
