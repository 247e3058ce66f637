"""Rows of a file on their way to the loop, streamed or prepared first: when the first step has its rows, and all.

python -m bench.contenders.streaming PATH TOKENIZER streamed|prepared
"""

from __future__ import annotations

import json
import sys
import threading
import time
from itertools import count
from pathlib import Path

import psutil

from truetune.config import Config
from truetune.data.head import prepare_stream
from truetune.data.prepare import prepare
from truetune.data.template import build_renderer
from truetune.engine.order import batches
from truetune.model import eos_ids, load_tokenizer

BATCH_SIZE, LOOK_S = 16, 0.02


def main(path: str, tokenizer: str, how: str) -> None:
    """Pass every row once, as the loop takes them, and print what it took."""
    loaded = load_tokenizer(Path(tokenizer))
    # Without pages of files that the system may take back at any time.
    own = [0]
    threading.Thread(target=_watch, args=(own,), daemon=True).start()
    began = time.perf_counter()
    renderer = build_renderer(loaded, eos_ids(Path(tokenizer)))
    config = Config(data=[path], streaming=how == "streamed", max_steps=1 << 40, batch_size=BATCH_SIZE)
    prepared = (prepare_stream if config.streaming else prepare)(config, renderer)
    if prepared.feed is not None:
        steps = prepared.feed.steps(0, batch_size=BATCH_SIZE)
    else:
        order = batches(len(prepared.train), BATCH_SIZE, seed=config.seed)
        steps = ((epoch, [prepared.train[number] for number in numbers]) for epoch, numbers in order)
    num_rows, first_s = 0, 0.0
    for _ in count():
        epoch, rows = next(steps)
        first_s = first_s or time.perf_counter() - began
        num_rows += len(rows)
        if epoch >= 1:
            break
    seconds = time.perf_counter() - began
    result = {"first_s": first_s, "seconds": seconds, "rows": num_rows, "own_bytes": own[0]}
    sys.stdout.write(json.dumps(result) + "\n")


def _watch(own: list[int]) -> None:
    process = psutil.Process()
    while True:
        told = process.memory_info()
        own[0] = max(own[0], told.rss - told.shared)
        time.sleep(LOOK_S)


if __name__ == "__main__":
    main(*sys.argv[1:])
