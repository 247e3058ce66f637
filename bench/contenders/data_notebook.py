"""The notebook recipe's preparation: pandas, Dataset, and map of its own function over rows, one at a time."""

from __future__ import annotations

import json
import sys
import time

import pandas
from datasets import Dataset, disable_progress_bars
from transformers import AutoTokenizer

from bench.contenders.notebook import encode
from bench.recipe import peak_bytes


def main(path: str, tokenizer: str) -> None:
    """Prepare the rows and print what it took."""
    disable_progress_bars()
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    began = time.perf_counter()
    data = Dataset.from_pandas(pandas.read_json(path))
    data = data.map(encode, fn_kwargs={"tokenizer": loaded}, remove_columns=data.column_names)
    seconds = time.perf_counter() - began
    sys.stdout.write(json.dumps({"seconds": seconds, "peak_bytes": peak_bytes(), "rows": len(data)}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
