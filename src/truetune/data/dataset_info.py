"""LLaMA-Factory's dataset_info.json: which file holds a data set, and what its columns and roles are called there.

    {"mine": {"file_name": "rows.json", "columns": {"prompt": "question", "response": "answer"}}}

Source: LLaMA-Factory 0.9.5, data/README.md and src/llamafactory/data/parser.py.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from truetune.errors import UserError

FILE_NAME = "dataset_info.json"
ALPACA_COLUMNS = {"prompt": "instruction", "query": "input", "response": "output"}
KEPT_COLUMNS = ("system", "history", "tools", "chosen", "rejected")
KNOWN_COLUMNS = {*ALPACA_COLUMNS.values(), *KEPT_COLUMNS, "messages", "conversations"}
ROLE_TAGS = {
    "user_tag": "human",
    "assistant_tag": "gpt",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}
"""Their names of roles, as ShareGPT calls them."""


@dataclass(frozen=True)
class Names:
    """How a data set's own names become those of a known format. `columns`: its name → ours; `roles`: the same.

    `is_complete`: whether known names that it does not name are left out, as LLaMA-Factory does where `columns` is
    given. `turns`: the column that holds turns, if there is one; `role_key`, `content_key`: what its turns call them.
    """

    columns: dict[str, str] = field(default_factory=dict)
    roles: dict[str, str] = field(default_factory=dict)
    turns: str | None = None
    role_key: str = "from"
    content_key: str = "value"
    is_complete: bool = False

    def known(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return a row in known names; what has none keeps its own."""
        renamed = {self.columns.get(key, self._unnamed(key)): value for key, value in row.items()}
        for key in (self.turns, "chosen", "rejected") if self.turns else ():
            if key in renamed:
                renamed[key] = self._turns(renamed[key])
        return renamed

    def _unnamed(self, key: str) -> str:
        """Return a key that the description does not name: a known one does not count where others are named."""
        return f"{key} (not in columns)" if self.is_complete and key in KNOWN_COLUMNS else key

    def _turns(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._turns(turn) for turn in value]
        if not isinstance(value, dict) or self.role_key not in value:
            return value
        rest = {key: item for key, item in value.items() if key not in (self.role_key, self.content_key)}
        role = value[self.role_key]
        role = self.roles.get(role, role) if isinstance(role, str) else role
        return {"from": role, "value": value.get(self.content_key), **rest}


def read_info(path: Path, name: str | None) -> list[tuple[Path, Names]]:
    """Return file and names of the data set `name`, or of all data sets that are files beside `path`.

    Raises: UserError if the file is no such description, has no such data set, or names what is not there.
    """
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError("data_info", where=str(path), fix="data_info", problem=error) from None
    entries = told.values() if isinstance(told, dict) else [None]
    parts = [value.get(name) or {} for value in entries if isinstance(value, dict) for name in ("columns", "tags")]
    if not all(isinstance(value, dict) for value in (*entries, *parts)):
        raise UserError("data_info", where=str(path), fix="data_info", problem="no object of objects")
    if name is not None and name not in told:
        raise UserError("data_info_name", where=f"{path}:{name}", fix="data_info_name", names=", ".join(told))
    chosen = {key: value for key, value in told.items() if key == name or (name is None and "file_name" in value)}
    found = []
    for key, value in chosen.items():
        file = path.parent / str(value.get("file_name", ""))
        if "file_name" not in value or not file.exists():
            raise UserError("data_info_file", where=f"{path}:{key}", fix="data_info_file", file=str(file))
        found += [(part, _names(value)) for part in (sorted(file.iterdir()) if file.is_dir() else [file])]
    return found


def _names(told: dict[str, Any]) -> Names:
    """Return the names that one entry describes."""
    columns, tags = (told.get(name) or {} for name in ("columns", "tags"))
    if told.get("formatting", "alpaca") == "sharegpt":
        turns = columns.get("messages", "conversations")
        roles = {tags.get(tag, role): role for tag, role in ROLE_TAGS.items()}
        renamed = {turns: "conversations"} | {columns[key]: key for key in KEPT_COLUMNS if key in columns}
        keys = tags.get("role_tag", "from"), tags.get("content_tag", "value")
        return Names(renamed, roles, "conversations", *keys, is_complete=bool(columns))
    renamed = {columns[key]: ours for key, ours in ALPACA_COLUMNS.items() if columns.get(key)}
    renamed |= {columns[key]: key for key in KEPT_COLUMNS if columns.get(key)}
    return Names(renamed, is_complete=bool(columns))
