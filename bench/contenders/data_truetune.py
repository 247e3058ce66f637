"""truetune's preparation of a file of rows."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from bench.recipe import peak_bytes
from truetune.config import Config
from truetune.data.prepare import prepare
from truetune.data.template import build_renderer
from truetune.model import eos_ids, load_tokenizer


def main(path: str, tokenizer: str) -> None:
    """Prepare the rows and print what it took."""
    loaded = load_tokenizer(Path(tokenizer))
    began = time.perf_counter()
    renderer = build_renderer(loaded, eos_ids(Path(tokenizer)))
    report = prepare(Config(data=[path]), renderer).report
    seconds = time.perf_counter() - began
    result = {"seconds": seconds, "peak_bytes": peak_bytes(), "rows": report.rows_used, "tokens": report.total_tokens}
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
