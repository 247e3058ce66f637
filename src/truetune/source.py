"""What a path means: a run, an adapter or a model; its base and its renderer, checked before weights are read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from truetune import checkpoint, identity
from truetune.data.store import StoredRows
from truetune.data.template import TEMPLATE_FILE, Renderer, build_renderer
from truetune.errors import UserError
from truetune.model import Base, eos_ids, find_base, load_tokenizer, prepare_base
from truetune.records import Pair, pairs_of
from truetune.rundir import RunDir

ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class Source:
    """A base, with an adapter (`folder`) or without one, and how it is prompted; no weights yet.

    `known`: truetune.json, None without it. `num_probes`: prompts whose ids were compared with those of training.
    `is_full`: all weights of a run were trained: `base` is the result itself, and what it came from stands in `known`.
    """

    path: str
    base: Base
    renderer: Renderer
    folder: Path | None = None
    known: dict[str, Any] | None = None
    num_probes: int | None = None
    is_full: bool = False

    def require_adapter(self) -> Path:
        """Return the adapter's folder.

        Raises: UserError if there is none; of full fine-tuning it says where the model is.
        """
        if self.is_full:
            raise UserError("merge_full", where=self.path, fix="merge_full", folder=self.base.folder)
        if self.folder is None:
            raise UserError("merge_no_adapter", where=self.path, fix="merge_no_adapter")
        return self.folder

    def origin(self) -> Base:
        """Return the base that training began from: of full fine-tuning, the one that truetune.json names.

        Raises: UserError if it is not there any longer, or another one is.
        """
        if not self.is_full or self.known is None:
            return self.base
        told = self.known["base"]
        found = find_base(told["name"], revision=told["revision"], hub=told["hub"])
        identity.check_base(self.base.folder, self.known, name=found.name, fingerprint=found.fingerprint)
        prepare_base(found)
        return found

    @property
    def probes(self) -> Sequence[dict[str, Any]]:
        """The probes that were written in training; [] without truetune.json."""
        return self.known["probes"] if self.known else ()

    def run_pairs(self, max_rows: int) -> list[Pair]:
        """Return pairs of the run's rows, held-out ones first; [] if its data are not there."""
        places = [Path(self.path).expanduser(), *(self.folder.resolve().parents[:2] if self.folder else ())]
        run = next((RunDir(place) for place in places if RunDir(place).is_run), None)
        rows: list[Any] = []
        for name in ("eval.arrow", "train.arrow"):
            if run is not None and (run.data / name).is_file():
                rows += StoredRows(run.data / name)[: max_rows - len(rows)]
        return pairs_of(rows)


def find(path: str, *, use_run_system: bool = True) -> Source:
    """Return what `path` means.

    Raises: UserError if it does not exist, its base is another one than it was trained on, or it is prompted otherwise.
    """
    folder = _tuned_folder(Path(path).expanduser())
    if folder is None:
        found = _base_only(path)
    elif (folder / ADAPTER_CONFIG).is_file():
        found = _adapter(path, folder)
    else:
        found = _full(path, folder)
    return found if use_run_system else replace(found, renderer=replace(found.renderer, system=None))


def _tuned_folder(path: Path) -> Path | None:
    """Return the folder with the trained weights that `path` means, or None if it is a model's name."""
    run = RunDir(path)
    if run.is_run:
        # While a run goes on, or after it failed, its newest checkpoint is newer than what a stop before left.
        if run.result.is_dir() and run.read_info()["state"] in ("done", "stopped"):
            return run.result
        newest, _ = checkpoint.find(run.checkpoints)
        if newest is None:
            raise UserError("run_no_adapter", where=str(path), fix="run_no_adapter", path=path)
        return newest
    above = RunDir(path.absolute().parent)
    is_result = path.is_dir() and above.is_run and above.result == path.absolute()
    return path if is_result or (path / ADAPTER_CONFIG).is_file() else None


def _full(path: str, folder: Path) -> Source:
    """A run that trained all weights: a model that stands alone, called as the run is."""
    source = _base_only(str(folder))
    return replace(source, path=path, base=replace(source.base, name=path), is_full=True)


def _base_only(path: str) -> Source:
    """A model; one that was merged knows how it was trained."""
    base = find_base(path)
    prepare_base(base)
    source = Source(path, base, build_renderer(load_tokenizer(base.folder), eos_ids(base.folder)))
    return _prompted(source, base.folder, known=identity.read(base.folder))


def _adapter(path: str, folder: Path) -> Source:
    config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    known = identity.read(folder)
    revision = config.get("revision") or "main"
    trained = known["base"] if known else {}
    base = find_base(
        config["base_model_name_or_path"],
        revision=revision,
        hub=trained.get("hub", "huggingface"),
        # As it was in training.
        quantization=trained.get("quantization"),
    )
    if known:
        identity.check_base(folder, known, name=base.name, fingerprint=base.fingerprint)
    prepare_base(base)
    has_tokenizer = (folder / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(folder if has_tokenizer else base.folder)
    source = Source(path, base, build_renderer(tokenizer, eos_ids(base.folder)), folder)
    return _prompted(source, folder, known=known)


def _prompted(source: Source, folder: Path, *, known: dict[str, Any] | None) -> Source:
    """Return the source prompted as `known`, truetune.json of `folder`, says, and its probes compared."""
    if not known:
        return source
    renderer = Renderer(
        source.renderer.tokenizer,
        (folder / TEMPLATE_FILE).read_text(encoding="utf-8"),
        tuple(known["stop_ids"]),
        known["system"],
        known["chat_template_kwargs"],
        known["date"],
    )
    num_probes = identity.check(folder, renderer, known=known)
    return replace(source, renderer=renderer, known=known, num_probes=num_probes)
