"""One search is one folder, in which every line is final: killed at any instant, it goes on behind the last one.

TUNE/
  tune.json     what is searched, on what: settings in force, the space, the identity      trials.jsonl  a line a trial
  config.yaml   the configuration as given      best.yaml  the best so far, for train --config
  tune.html, tune.md                            the same to look at
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from truetune.disk import MARGIN_BYTES, is_leftover, require_space, to_json, write_atomic
from truetune.errors import UserError
from truetune.lock import FILE as LOCK_FILE
from truetune.search import Trial


class TuneDir:
    """Paths of one search, and its lines."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.info = path / "tune.json"
        self.config = path / "config.yaml"
        self.trials = path / "trials.jsonl"
        self.best = path / "best.yaml"

    @property
    def is_search(self) -> bool:
        """True if the folder holds a search."""
        return self.info.is_file()

    def read_info(self) -> dict[str, Any]:
        """Return tune.json."""
        info: dict[str, Any] = json.loads(self.info.read_text(encoding="utf-8"))
        return info

    def begin(self, config: str, info: Mapping[str, Any]) -> None:
        """Write what the search is; tune.json last, since a folder with it can be resumed."""
        write_atomic(self.config, config)
        write_atomic(self.info, to_json(dict(info), indent=2) + "\n")

    def read_trials(self) -> list[Trial]:
        """Return the trials that ended; a last line that a kill cut is cut away."""
        if not self.trials.is_file():
            return []
        content = self.trials.read_text(encoding="utf-8")
        whole = content[: content.rfind("\n") + 1]
        if whole != content:
            write_atomic(self.trials, whole)
        return [Trial.from_dict(json.loads(line)) for line in whole.splitlines()]

    def append(self, trial: Trial) -> None:
        """Add a trial that ended, durably.

        Raises: MachineError if the disk is full; the lines before it stand.
        """
        require_space(self.path, MARGIN_BYTES)
        with self.trials.open("a", encoding="utf-8") as file:
            file.write(to_json(trial.to_dict()) + "\n")
            file.flush()
            os.fsync(file.fileno())


def open_search(path: Path, *, resume: bool) -> TuneDir:
    """Return the folder of a new search, or of the one to resume.

    Raises: UserError if the folder holds another one or other files, or if there is nothing to resume.
    """
    folder = TuneDir(path)
    if path.exists() and not path.is_dir():
        raise UserError("output_is_file", where=str(path), fix="output_other")
    if folder.is_search:
        if not resume:
            raise UserError("tune_exists", where=str(path), fix="output_resume_or_other")
        return folder
    found = [some for some in path.iterdir() if not _is_begun(some)] if path.is_dir() else []
    if found:
        raise UserError("output_not_empty", where=str(path), fix="output_other")
    if resume and not path.is_dir():
        raise UserError("tune_none", where=str(path), fix="output_no_run")
    return folder


def _is_begun(path: Path) -> bool:
    """Return whether a search that was killed before tune.json left this."""
    return path.name in (LOCK_FILE, "config.yaml") or is_leftover(path)
