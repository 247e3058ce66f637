"""What a run trains, and how it lies on disk: an adapter, or all weights of the model.

    Adapter   PEFT's files                                    result: RUN/adapter/, the same files
    Whole     a Hugging Face folder, the fp32 weights         result: RUN/model/, in the dtype that computed

What is stored of all weights are the optimizer's fp32 masters, so that a run goes on to the bit; the result holds what
the model computed with and was evaluated as, which is what it is when it is used.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from truetune.disk import to_json, write_atomic
from truetune.engine.master import Masters
from truetune.lora_files import from_files, settings, started, to_files
from truetune.model import Base, load_base
from truetune.weights import weight_files

ADAPTER = "adapter_model.safetensors"
SHARD_SIZE = "5GB"


class Trained(Protocol):
    """Weights that a run trains. `place`: the folder in the run that holds the result."""

    @property
    def place(self) -> str:
        """The folder of the result in the run's."""

    def save(self, folder: Path) -> None:
        """Write them."""

    def load(self, folder: Path) -> None:
        """Take them from a checkpoint, to the bit."""

    def show(self, folder: Path) -> None:
        """Let the model compute with those of a result; the optimizer's stay as they are."""

    def differs(self, folder: Path) -> str | None:
        """Return the first tensor of a checkpoint that is not, bit for bit, what is held; None if all are."""

    def write_result(self, checkpoint: Path, folder: Path, *, left_out: set[str]) -> None:
        """Write the result, made of a checkpoint without its files `left_out`."""


@dataclass(frozen=True)
class Adapter:
    """LoRA on a base that stays as it is: PEFT's own files. `base`: name (hub id or path) and revision of the base."""

    model: Any
    base: Mapping[str, str]
    place = "adapter"

    def save(self, folder: Path) -> None:
        """Write PEFT's adapter files."""
        # save_embedding_layers="auto" asks the hub at every save (peft 0.21, utils/save_and_load.py).
        self.model.save_pretrained(str(folder), save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)
        if any(True for _ in started(self.model)):
            save_file(to_files(self.model), str(folder / ADAPTER), metadata={"format": "pt"})
        path = folder / "adapter_config.json"
        values = settings(json.loads(path.read_text(encoding="utf-8")), self.model)
        values |= {"base_model_name_or_path": self.base["name"], "revision": self.base["revision"]}
        write_atomic(path, to_json(values, indent=2) + "\n")

    def load(self, folder: Path) -> None:
        """Put the adapter of a folder into the model, which has LoRA of the same shape."""
        from_files(load_file(str(folder / ADAPTER)), self.model)

    show = load

    def differs(self, folder: Path) -> str | None:
        """Compare with what would be saved now."""
        return first_other(load_file(str(folder / ADAPTER)), to_files(self.model), name=ADAPTER)

    def write_result(self, checkpoint: Path, folder: Path, *, left_out: set[str]) -> None:
        """Copy the files."""
        for path in _files(checkpoint, left_out):
            shutil.copyfile(path, folder / path.name)


@dataclass(frozen=True)
class Whole:
    """All weights: `masters` are what the optimizer trains, the model may compute with copies in its own dtype."""

    model: Any
    masters: Masters
    place = "model"

    def save(self, folder: Path) -> None:
        """Write the masters by transformers' own `save_pretrained`."""
        master_of = {id(p): w for p, w in zip(self.masters.parameters, self.masters.weights, strict=True)}
        # Tied weights are one parameter under two names, which save_pretrained sees by their memory.
        kept = {name: master_of.get(id(part), part) for name, part in self.model.state_dict(keep_vars=True).items()}
        weights = {name: part.detach() for name, part in kept.items()}
        self.model.save_pretrained(str(folder), state_dict=weights, max_shard_size=SHARD_SIZE)
        _set_dtype(folder, "float32")

    def load(self, folder: Path) -> None:
        """Read the folder as any model is read, and take its weights."""
        self._take(folder, dict(zip(map(id, self.masters.parameters), self.masters.weights, strict=True)))
        self.masters.refresh()

    def show(self, folder: Path) -> None:
        """Take the result's weights; a model in fp32 is its own master, so nothing may be trained afterwards."""
        self._take(folder, {id(parameter): parameter for parameter in self.masters.parameters})

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def _take(self, folder: Path, targets: Mapping[int, torch.Tensor]) -> None:
        for _, found, target in self._beside(folder, targets):
            target.copy_(found)

    def _beside(
        self, folder: Path, targets: Mapping[int, torch.Tensor]
    ) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        """Yield name, tensor of the folder and target of each trained weight."""
        stored = dict(load_base(Base(str(folder), folder, ""), "float32").named_parameters())
        for name, parameter in self.model.named_parameters():
            if id(parameter) in targets:
                yield name, stored[name], targets[id(parameter)]

    def differs(self, folder: Path) -> str | None:
        """Compare the masters with the folder."""
        masters = dict(zip(map(id, self.masters.parameters), self.masters.weights, strict=True))
        for name, found, held in self._beside(folder, masters):
            if not torch.equal(found, held.detach().cpu()):
                return f"model.safetensors: {name}"
        return None

    def write_result(self, checkpoint: Path, folder: Path, *, left_out: set[str]) -> None:
        """Copy the files, the weights in the dtypes that the model computes with."""
        dtypes = {name: part.dtype for name, part in self.model.state_dict().items()}
        weights = {path.name for path in weight_files(checkpoint)}
        for path in _files(checkpoint, left_out):
            if path.name in weights:
                _convert(path, folder / path.name, dtypes=dtypes, usual=self.model.dtype)
            else:
                shutil.copyfile(path, folder / path.name)
        _set_dtype(folder, str(self.model.dtype).removeprefix("torch."))


def first_other(then: Mapping[str, torch.Tensor], now: Mapping[str, torch.Tensor], *, name: str) -> str | None:
    """Return the first tensor that is not the same, bit for bit, as "name: tensor"; None if all are."""
    for key in sorted({*then, *now}):
        if key not in then or key not in now or not torch.equal(then[key], now[key].cpu()):
            return f"{name}: {key}"
    return None


def _files(checkpoint: Path, left_out: set[str]) -> list[Path]:
    return [path for path in sorted(checkpoint.iterdir()) if path.name not in left_out]


def _convert(source: Path, target: Path, *, dtypes: Mapping[str, torch.dtype], usual: torch.dtype) -> None:
    """Write a file of weights in other dtypes; nothing changes that the model would not round itself."""
    with safe_open(str(source), framework="pt") as file:
        tensors = {name: file.get_tensor(name).to(dtypes.get(name, usual)) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, str(target), metadata={"format": "pt"})


def _set_dtype(folder: Path, dtype: str) -> None:
    """Let config.json say what the weights are stored as, and the index, where there is one, how large they are."""
    path = folder / "config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    values.pop("torch_dtype", None)
    write_atomic(path, to_json(values | {"dtype": dtype}, indent=2) + "\n")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        values = json.loads(index.read_text(encoding="utf-8"))
        values["metadata"]["total_size"] = sum(file.stat().st_size for file in weight_files(folder))
        write_atomic(index, to_json(values, indent=2) + "\n")
