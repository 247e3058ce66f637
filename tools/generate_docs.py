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
    "sharegpt": '{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]}',
    "prompt and completion": '{"prompt": "Hi", "completion": "Hello."}',
    "prompt and response": '{"prompt": "Hi", "response": "Hello."}',
    "query and response": '{"query": "Hi", "response": "Hello.", "history": [["Ho", "Hm."]]}',
    "question and answer": '{"question": "Hi", "answer": "Hello."}',
    "preference": '{"prompt": "Hi", "chosen": "Hello.", "rejected": "What?"}',
    "preference (instruction)": '{"instruction": "Hi", "chosen": "Hello.", "rejected": "What?"}',
    "preference (conversations)": (
        '{"conversations": [{"from": "human", "value": "Hi"}],\n'
        ' "chosen": {"from": "gpt", "value": "Hello."}, "rejected": {"from": "gpt", "value": "What?"}}'
    ),
    "preference (two conversations)": (
        '{"chosen": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}],\n'
        ' "rejected": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "What?"}]}'
    ),
    "text": '{"text": "Plain text, learned whole."}',
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
            "`padded`: shared prefixes are not used, since a layer has something that branches nowhere yet (attention",
            "sinks, Mamba 1, lightning attention).\n",
            "Linear attention, state spaces and short convolutions carry a state from token to token: it branches",
            "where the rows do (`src/truetune/engine/hybrid.py`, [decision 017](decisions/017-hybrid.md)). For",
            "`falcon_h1`, `mamba2` and `nemotron_h` PEFT has no LoRA on `out_proj`, so `target_modules` must name the",
            "others. Kernels for GPUs (flash-linear-attention, mamba-ssm, causal-conv1d) were not tried.\n",
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
        "(seen from its content), CSV, TSV (by RFC 4180, with a header) or Parquet; all but the last may be packed as",
        ".gz or .zst. Text is UTF-8 unless `--encoding` says otherwise. The format of a file is recognised by the keys",
        "of its rows, in the order below; nothing is registered. Shapes may differ between files, not within one.",
        "A .txt or .md file is one row `text`; a folder means such files only where it has no rows (see full.md).",
    ]
    for name, known in FORMATS.items():
        needs, may = (", ".join(f"`{key}`" for key in sorted(keys)) or "none" for keys in (known.needs, known.may))
        parts.append(f"\n## {name}\n\nNeeds {needs}; reads besides: {may}.\n\n```json\n{FORMAT_EXAMPLES[name]}\n```")
    parts.append(
        "\nA turn has `role` (system, user, assistant, tool) and `content`; the assistant's may have\n"
        "`reasoning_content`, `tool_calls`, and `train`, `loss` or `weight` (false or 0: the turn is read, not\n"
        "learned). After an optional system turn, user and assistant take turns; behind an assistant's `tool_calls`\n"
        "come the results, as turns of the role tool. `tools` is a list of JSON schemas, or its JSON text. Of a\n"
        "preference pair the chosen answer is learned; with `loss: dpo` and its kin both are compared\n"
        "([preferences.md](preferences.md)).\n\n"
        "Other keys of a row are counted and shown, not used. A row that cannot be trained is refused with file,\n"
        "line, reason and fix; nothing is dropped, cut or merged silently.\n"
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
