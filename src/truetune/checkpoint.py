"""Save, find and load the state of a run. No pickle: safetensors and JSON.

A checkpoint is staged beside its place and renamed when it is complete (disk.py); so a folder called
`checkpoint-000100` is whole, or was damaged later, which its manifest tells.

    checkpoint-000100/
      adapter_config.json  adapter_model.safetensors      PEFT's own layout, usable as it is; of full fine-tuning
      (config.json  model.safetensors ...)                a Hugging Face folder (trained.py)
      optimizer.safetensors  trainer_state.json           AdamW moments; step, scheduler
      manifest.json                                       size and sha256 of each file; what the run was, and on what
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import distributed as dist

from truetune.disk import MANIFEST, STAGING, damage, read_manifest, remove, require_space, staged, to_json
from truetune.engine.master import Masters, optimised, own_masters
from truetune.errors import MachineError, NumericsError, UserError
from truetune.lora_files import started
from truetune.ranks import Ranks
from truetune.trained import Adapter, Trained, Whole, first_other
from truetune.weights import OPTIMIZER

TRAINER_STATE = "trainer_state.json"
OF_THE_RUN = {OPTIMIZER, TRAINER_STATE, MANIFEST}
"""Files of a checkpoint that its weights do not need."""

MIN_KEPT = 2
PACKAGES = ("truetune", "torch", "transformers", "peft", "accelerate", "tokenizers", "safetensors")
_NAME = re.compile(r"checkpoint-(\d+)")

# With another value of these, the tensors of a checkpoint do not fit.
SHAPING = {
    *("base", "config.finetuning", "config.lora_r", "config.target_modules", "config.use_dora", "config.lora_init"),
    # LoRA+ orders the optimizer's parameters by group.
    "config.loraplus_lr_ratio",
}


@dataclass(frozen=True)
class State:
    """What a checkpoint holds: `identity` says what the run was (data, base, template, every key that matters).

    `base`: where the base is, see Base.reference. `masters`: what the optimizer trains, if not the model's own weights.
    `feed`: where streamed rows come from, see data.feed.
    """

    model: Any
    optimizer: Any
    scheduler: Any
    identity: Mapping[str, str]
    base: Mapping[str, str]
    masters: Masters | None = None
    feed: Any = None

    @property
    def trained(self) -> Trained:
        """The weights that are trained: an adapter, or all."""
        if hasattr(self.model, "peft_config"):
            return Adapter(self.model, self.base)
        return Whole(self.model, self.masters or own_masters(self.model))

    @property
    def num_bytes(self) -> int:
        """Bytes of a checkpoint, nearly: the trained weights, AdamW's two moments, and what an adapter started at."""
        size: int = sum(part.numel() * part.element_size() for part in optimised(self.optimizer))
        return (4 if any(True for _ in started(self.model)) else 3) * size


def versions(*more: str) -> dict[str, str]:
    """Return the versions of the libraries that decide what is computed; `more`: of those that only some runs need."""
    return {name: importlib.metadata.version(name) for name in (*PACKAGES, *more)}


def machine() -> dict[str, str]:
    """Return what else decides the last bits: sums are split among threads and ranks, kernels made for a processor."""
    num_ranks = dist.get_world_size() if dist.is_initialized() else 1
    threads, cpu = torch.get_num_threads(), torch.backends.cpu.get_cpu_capability()
    return {"threads": str(threads), "cpu": cpu, "ranks": str(num_ranks)}


def save(folder: Path, step: int, *, state: State, write_extra: Callable[[Path], None]) -> Path:
    """Write `folder`/checkpoint-<step> and return it. `write_extra`: adds files (template, probes) before sealing.

    Raises: MachineError if the disk is full; NumericsError if a weight is not finite. Older checkpoints stand.
    """
    target = path_of(folder, step)
    _require_finite(state, step)
    require_space(folder, state.num_bytes)
    more = ("bitsandbytes",) if "quantization" in state.base else ()
    facts = {"identity": dict(state.identity), "versions": versions(*more), "machine": machine()}
    with staged(target, step=step, **facts) as staging:
        state.trained.save(staging)
        write_extra(staging)
        save_file(_flatten(state.optimizer.state_dict()), str(staging / OPTIMIZER))
        values = {"step": step, "scheduler": state.scheduler.state_dict()}
        if state.feed is not None:
            values["stream"] = state.feed.position_at(step)
        (staging / TRAINER_STATE).write_text(to_json(values), encoding="utf-8")
    return target


def rehearse(folder: Path, *, state: State, write_extra: Callable[[Path], None]) -> None:
    """Save as it will be done, read it back and remove it: a disk that is full or read-only is found before step 1.

    Raises: MachineError if what is read is not what was written.
    """
    place = save(folder / f"{STAGING}rehearsal", 0, state=state, write_extra=write_extra)
    broken = damage(place)
    remove(place.parent)
    if broken is not None:
        raise MachineError("rehearsal", where=str(folder), fix="machine", file=broken)


def find(folder: Path) -> tuple[Path | None, dict[str, str]]:
    """Return (newest undamaged checkpoint or None, {skipped checkpoint: damaged file})."""
    skipped: dict[str, str] = {}
    for path in reversed(by_step(folder)):
        broken = broken_file(path)
        if broken is None:
            return path, skipped
        skipped[path.name] = broken
    return None, skipped


def broken_file(path: Path) -> str | None:
    """Return the damaged file of a checkpoint, or None; a copy under the name of another step is damaged, too."""
    broken = damage(path)
    return MANIFEST if broken is None and read_manifest(path)["step"] != step_of(path) else broken


def prune(folder: Path, *, keep: int, best: int | None = None) -> None:
    """Remove the oldest checkpoints, by step and never by time; the newest `keep` and the one of step `best` stay.

    Nothing goes while fewer than two of those that stay are undamaged.
    """
    paths = by_step(folder)
    staying = paths[-max(keep, MIN_KEPT) :]
    going = [path for path in paths if path not in staying and step_of(path) != best]
    if not going:
        return
    good = (path for path in reversed(staying) if broken_file(path) is None)
    if len(list(islice(good, MIN_KEPT))) == MIN_KEPT:
        for path in going:
            remove(path)


def set_aside(folder: Path, names: Iterable[str]) -> None:
    """Rename damaged checkpoints, so that they are neither found nor counted again; nothing is deleted."""
    for name in names:
        (folder / name).rename(folder / f"damaged-{name}-{os.getpid()}")


def by_step(folder: Path) -> list[Path]:
    """Return the checkpoints of a folder, oldest step first."""
    return sorted((path for path in folder.glob("checkpoint-*") if _NAME.fullmatch(path.name)), key=step_of)


def path_of(folder: Path, step: int) -> Path:
    """Return where the checkpoint of a step is, or would be."""
    return folder / f"checkpoint-{step:06d}"


def step_of(path: Path) -> int:
    """Return the step that a checkpoint's name says.

    >>> step_of(Path("run/checkpoints/checkpoint-000100"))
    100
    """
    return int(path.name.rpartition("-")[2])


def differences(folder: Path, identity: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Return {what: (then, now)} for all that a run is now and was not when the checkpoint was written."""
    saved = read_manifest(folder)["identity"]
    return {
        name: (saved.get(name, "-"), identity.get(name, "-"))
        for name in sorted({*saved, *identity})
        if saved.get(name) != identity.get(name)
    }


def other_versions(folder: Path) -> dict[str, tuple[str, str]]:
    """Return {name: (then, now)} for every library that is another version now, and what differs of the machine."""
    manifest = read_manifest(folder)
    more = manifest["versions"].keys() & {"bitsandbytes"}
    saved, now = {"ranks": "1"} | manifest["versions"] | manifest["machine"], versions(*more) | machine()
    return {name: (saved.get(name, "-"), value) for name, value in now.items() if saved.get(name) != value}


def check_identity(folder: Path, identity: Mapping[str, str], *, allow_changed: bool = False) -> dict[str, str]:
    """Refuse to resume a run of other data, base or configuration; return {what: "then → now"}, if that is allowed.

    Raises: UserError listing what differs; also where it is allowed, if the tensors would not fit.
    """
    changed = differences(folder, identity)
    shown = {name.removeprefix("config."): _shown(name, *values) for name, values in changed.items()}
    names = ", ".join(f"{name}{values}" for name, values in shown.items())
    if changed.keys() & SHAPING:
        raise UserError("resume_other_shape", where=str(folder), fix="resume_other_shape", names=names)
    if changed and not allow_changed:
        raise UserError("resume_changed", where=str(folder), fix="resume_changed", names=names)
    return shown


def _shown(name: str, then: str, now: str) -> str:
    """Hashes say nothing to a reader; values do."""
    return f" ({then} → {now})" if name.startswith("config.") else ""


def load(folder: Path, state: State) -> int:
    """Put a checkpoint into the model, optimizer, scheduler and feed of `state`; return its step.

    Learning rate and weight decay are those of `state`, at the checkpoint's step; if nothing changed, the same bits.
    """
    state.trained.load(folder)
    values = json.loads((folder / TRAINER_STATE).read_text(encoding="utf-8"))
    if state.feed is not None:
        state.feed.go_to(values["stream"])
    scheduler = state.scheduler
    at = values["scheduler"]["last_epoch"]
    rates = [rate * factor(at) for rate, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    scheduler.load_state_dict(values["scheduler"] | {"base_lrs": scheduler.base_lrs, "_last_lr": rates})
    groups = state.optimizer.state_dict()["param_groups"]
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate
    moments = _unflatten(load_file(str(folder / OPTIMIZER)))
    state.optimizer.load_state_dict({"state": moments, "param_groups": groups})
    return int(values["step"])


def share(state: State, ranks: Ranks, *, step: int) -> int:
    """Give every rank what rank 0 has of a run: weights, moments, scheduler; return rank 0's `step`.

    So the others need not see the folder, and all begin with the same bits.
    """
    if ranks.size == 1:
        return step
    weights = optimised(state.optimizer)
    ranks.give(weights)
    if state.masters is not None:
        state.masters.refresh()
    values = state.optimizer.state_dict()
    shapes = {name: [list(tensor.shape), str(tensor.dtype)] for name, tensor in _flatten(values).items()}
    head = ranks.tell(
        {
            "step": step,
            "scheduler": state.scheduler.state_dict(),
            "groups": values["param_groups"],
            "shapes": shapes,
            "stream": state.feed and state.feed.position_at(step),
        }
    )
    state.scheduler.load_state_dict(head["scheduler"])
    tensors = _flatten(values) if ranks.is_main else _empty_like(head["shapes"], weights[0].device)
    ranks.give(tensors[name] for name in sorted(head["shapes"]))
    if not ranks.is_main:
        state.optimizer.load_state_dict({"state": _unflatten(tensors), "param_groups": head["groups"]})
        if state.feed is not None:
            state.feed.go_to(head["stream"])
    return int(head["step"])


def _empty_like(shapes: dict[str, Any], device: Any) -> dict[str, torch.Tensor]:
    """Return room for tensors; AdamW keeps its counters on the CPU."""
    return {
        name: torch.empty(shape, dtype=getattr(torch, dtype.removeprefix("torch.")), device=device if shape else "cpu")
        for name, (shape, dtype) in shapes.items()
    }


def other_tensor(folder: Path, state: State) -> str | None:
    """Return the first tensor of a checkpoint that is not, bit for bit, what `state` holds; None if all are."""
    moments = _flatten(state.optimizer.state_dict())
    return state.trained.differs(folder) or first_other(load_file(str(folder / OPTIMIZER)), moments, name=OPTIMIZER)


def _require_finite(state: State, step: int) -> None:
    for name, part in state.model.named_parameters():
        if part.requires_grad and not torch.isfinite(part).all():
            raise NumericsError("weight_not_finite", where=f"step {step}", fix="not_finite", name=name)


def _flatten(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return an optimizer's state as {"index.name": tensor}."""
    return {f"{index}.{name}": value for index, values in state["state"].items() for name, value in values.items()}


def _unflatten(tensors: dict[str, torch.Tensor]) -> dict[int, dict[str, torch.Tensor]]:
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = tensor
    return state
