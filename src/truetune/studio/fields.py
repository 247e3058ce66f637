"""What the page is made of: the configuration's fields, recipes, texts, and faults as the page shows them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from truetune.config import Config, examples_folder, load_yaml
from truetune.errors import TruetuneError, UserErrors
from truetune.messages import CATALOGUES, text

NUMBERS = {"integer", "number"}
NOT_IN_A_RECIPE = ("model", "data", "eval_data", "output_dir", "lang")


def fields(lang: str) -> list[dict[str, Any]]:
    """Return name, kind, choices, default and help of every key of a run.

    `kind`: text, number, bool, list or choice; a number may have words as `choices`, too ("auto").
    """
    schema = Config.model_json_schema()["properties"]
    return [
        {
            "name": name,
            **_kind(schema[name]),
            "default": field.get_default(call_default_factory=True),
            "help": text(f"field.{name}", lang),
        }
        for name, field in Config.model_fields.items()
    ]


def _kind(schema: dict[str, Any]) -> dict[str, Any]:
    parts = [part for part in schema.get("anyOf", [schema]) if part.get("type") != "null"]
    types = {part.get("type") for part in parts}
    words = [word for part in parts for word in part.get("enum", [part["const"]] if "const" in part else [])]
    if types & NUMBERS:
        return {"kind": "number", "choices": words}
    if "boolean" in types:
        return {"kind": "bool" if not words else "choice", "choices": [*words, *(["true", "false"] if words else [])]}
    if words and "array" not in types:
        return {"kind": "choice", "choices": words}
    return {"kind": "list" if "array" in types else "text", "choices": words}


def presets() -> list[dict[str, Any]]:
    """Return the recipes that come with the package: name, and the values that are not about one's own files."""
    found = []
    for path in sorted(examples_folder().glob("*.yaml")):
        values = {key: value for key, value in load_yaml(path)[0].items() if key not in NOT_IN_A_RECIPE}
        found.append({"name": path.stem, "values": values})
    return found


def texts(lang: str) -> dict[str, str]:
    """Return the whole catalogue in a language."""
    return CATALOGUES[lang if lang in CATALOGUES else "en"]


def models(folder: Path, used: list[Any]) -> list[str]:
    """Return the models that were used, and those that lie in a folder; each once."""
    lying = [*(path.parent for path in folder.glob("*/config.json")), *folder.glob("*.gguf")]
    return list(dict.fromkeys(str(model) for model in [*used, *sorted(lying)] if model))


def fault(error: TruetuneError, lang: str) -> dict[str, Any]:
    """Return a fault as the page shows it: where, message, fix; of several, all of them in these."""
    if isinstance(error, UserErrors):
        told = [fault(one, lang) for one in error.errors]
        return {
            "key": error.key,
            **{part: "\n".join(one[part] for one in told) for part in ("where", "message", "fix")},
        }
    return {
        "key": error.key,
        "where": error.where,
        "message": text(f"error.{error.key}", lang, **error.values),
        "fix": text(f"fix.{error.fix}", lang, **error.values),
    }
