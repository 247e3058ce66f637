"""Write the generated pages of docs/ from the code; with --check, fail if one is not up to date.

python tools/generate_docs.py [--check]
"""

from __future__ import annotations

import sys
from pathlib import Path

from truetune.config import Config
from truetune.data.formats import FORMATS
from truetune.engine.families import FAMILIES
from truetune.messages import text

ROOT = Path(__file__).resolve().parents[1]

FORMAT_EXAMPLES = {
    "alpaca": '{"instruction": "Translate into French.", "input": "Good morning", "output": "Bonjour"}',
    "messages": '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}',
}


def config_page() -> str:
    """Return the table of configuration keys, in both languages."""
    rows = []
    default = Config()
    for name in Config.model_fields:
        value = getattr(default, name)
        shown = "none" if value is None or value == [] or value == {} else repr(value).replace("'", "")
        rows.append(f"| `{name}` | `{shown}` | {text(f'field.{name}')} | {text(f'field.{name}', 'zh')} |")
    return "\n".join(
        [
            "# Configuration keys\n",
            "Written by `tools/generate_docs.py` from `src/truetune/config.py`. A key is a flag (`--learning-rate` or",
            "`--learning_rate`), a key of the file after `--config`, and an argument of `truetune.train`.",
            "Defaults < file < flags.\n",
            "| key | default | meaning | 含义 |",
            "|---|---|---|---|",
            *rows,
            "",
        ]
    )


def families_page() -> str:
    """Return the list of model families that the engine was run on."""
    rows = [f"| `{name}` | {kind} |" for name, kind in FAMILIES.items()]
    return "\n".join(
        [
            "# Model families\n",
            "Written by `tools/generate_docs.py` from `src/truetune/engine/families.py`. On a tiny random model",
            "of each family, loss and every gradient were compared, in fp32, with one pair at a time through the",
            "model's own code (`tests/equivalence/test_families.py`). `trie`: shared prefixes are computed once.",
            "`padded`: layers that are no plain attention (linear attention, attention sinks) run on padded rows.\n",
            "This is a list of what was tried, not of what works: before step 1 every model is compared in the",
            "same way, and what does not agree falls back (`attention` in [config.md](config.md)).\n",
            "| `model_type` | computed as |",
            "|---|---|",
            *rows,
            "",
        ]
    )


def formats_page() -> str:
    """Return the page about the shapes of rows."""
    parts = [
        "# Data formats\n",
        "Written by `tools/generate_docs.py` from `src/truetune/data/formats.py`. A file is a JSON array or JSON lines",
        "(seen from its content), UTF-8. The format is recognised by the keys; nothing is registered.",
    ]
    for name, known in FORMATS.items():
        needs, may = (", ".join(f"`{key}`" for key in sorted(keys)) or "none" for keys in (known.needs, known.may))
        parts.append(f"\n## {name}\n\nNeeds {needs}; reads besides: {may}.\n\n```json\n{FORMAT_EXAMPLES[name]}\n```")
    parts.append(
        "\nA turn of `messages` has `role` (system, user, assistant) and `content`; the assistant's may have\n"
        "`reasoning_content`, and `train` or `loss` (false: the turn is read, not learned). Other keys of a row are\n"
        "counted and shown, not used. A row that cannot be trained is refused with file, line, reason and fix.\n"
    )
    return "\n".join(parts)


PAGES = {
    "docs/config.md": config_page,
    "docs/data-formats.md": formats_page,
    "docs/families.md": families_page,
}


def main(words: list[str]) -> int:
    """Write the pages, or with --check return 1 if one differs from the code."""
    stale = 0
    for name, page in PAGES.items():
        path = ROOT / name
        if "--check" in words:
            if not path.is_file() or path.read_text(encoding="utf-8") != page():
                sys.stdout.write(f"{name} is not up to date: run python tools/generate_docs.py\n")
                stale += 1
        else:
            path.write_text(page(), encoding="utf-8")
    return min(stale, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
