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


@dataclass(frozen=True)
class Source:
    """A base, with an adapter (`folder`) or without one, and how it is prompted; no weights yet.

    `known`: truetune.json, None without it. `num_probes`: prompts whose ids were compared with those of training.
    """

    path: str
    base: Base
    renderer: Renderer
    folder: Path | None = None
    known: dict[str, Any] | None = None
    num_probes: int | None = None

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
    folder = _adapter_folder(Path(path).expanduser())
    found = _base_only(path) if folder is None else _adapter(path, folder)
    return found if use_run_system else replace(found, renderer=replace(found.renderer, system=None))


def _adapter_folder(path: Path) -> Path | None:
    """Return the folder with adapter_config.json that `path` means, or None if it is a model's name."""
    run = RunDir(path)
    if run.is_run:
        # While a run goes on, or after it failed, its newest checkpoint is newer than what a stop before left.
        if run.adapter.is_dir() and run.read_info()["state"] in ("done", "stopped"):
            return run.adapter
        newest, _ = checkpoint.find(run.checkpoints)
        if newest is None:
            raise UserError("run_no_adapter", where=str(path), fix="run_no_adapter", path=path)
        return newest
    return path if (path / "adapter_config.json").is_file() else None


def _base_only(path: str) -> Source:
    """A model; one that was merged knows how it was trained."""
    base = find_base(path)
    prepare_base(base)
    source = Source(path, base, build_renderer(load_tokenizer(base.folder), eos_ids(base.folder)))
    return _prompted(source, base.folder, known=identity.read(base.folder))


def _adapter(path: str, folder: Path) -> Source:
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
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
