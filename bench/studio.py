"""How long the page waits: a page of a million rows, the curve of 100,000 steps, the list of runs. No model needed.

    python bench/studio.py [--rows 1000000] [--steps 100000]

It writes both into a temporary folder (about 1 GB), starts the studio there, and asks as the page does: each request
once cold, then five times; the times are those of whole requests over HTTP, in ms.
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from truetune.data.store import RecordBuilder, RowWriter
from truetune.records import Pair, Row

BATCH = 5000


def write_rows(store: Path, count: int) -> None:
    """Write rows of 120 tokens, two thirds of them learned, and a tokenizer that reads them."""
    store.mkdir(parents=True)
    with RowWriter(store / "train.arrow") as writer:
        for first in range(0, count, BATCH):
            builder = RecordBuilder()
            for number in range(first, min(first + BATCH, count)):
                ids = tuple((number * 7 + at * 13) % 256 for at in range(120))
                question = {"role": "user", "content": f"Question {number}: what is {number} plus {number}?"}
                answer = f"Answer {number}. " * 10
                builder.add(Row(number, f"data.jsonl:{number + 1}", (Pair(ids[:40], ids[40:]),), (question,), answer))
            writer.write(builder.build())
    vocabulary = {letter: at for at, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(store / "tokenizer.json"))


def write_run(run: Path, steps: int) -> None:
    """Write a run folder with the events of many steps."""
    run.mkdir(parents=True)
    info = {"state": "done", "started": "2026-01-01", "model": "m", "data": ["d"], "steps": steps}
    (run / "run.json").write_text(json.dumps(info))
    with (run / "events.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            event: dict[str, object] = {
                "kind": "step",
                "step": step,
                "epoch": step / 1000,
                "loss": 2 + (step * 7919 % 1000) / 1000,
            }
            event |= {"learning_rate": 2e-4 * (1 - step / steps), "grad_norm": 1.2345678901234567, "rows": 16}
            event |= {"pairs": 16, "learned_tokens": 1234, "trie_tokens": 4321, "computed_tokens": 4000}
            event |= {"seconds": 0.123456789, "memory_bytes": 748433408, "cpu_percent": 100.1, "gpu_percent": None}
            file.write(json.dumps(event) + "\n")
            if step % 1000 == 0:
                file.write(json.dumps({"kind": "eval", "step": step, "eval_loss": 1.5, "seconds": 1.0}) + "\n")
    with (run / "steps.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            file.write(json.dumps({"step": step, "rows": [step * 16 % 1000 + at for at in range(16)]}) + "\n")


def main() -> None:
    """Write, start, ask, print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--steps", type=int, default=100_000)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        home = Path(folder)
        run = home / "runs" / "long"
        write_run(run, asked.steps)
        write_rows(run / "data", asked.rows)
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        words = [sys.executable, "-m", "truetune", "studio", "--no-browser", "--port", str(port)]
        studio = subprocess.Popen(words, cwd=home, stdout=subprocess.DEVNULL)
        try:
            ask(f"http://127.0.0.1:{port}/", str(run / "data"), asked.rows, steps=asked.steps)
        finally:
            studio.terminate()
            studio.wait()


def ask(url: str, store: str, rows: int, *, steps: int) -> None:
    """Time what the page asks for."""
    client = httpx.Client(timeout=60)
    began = time.perf_counter()
    while True:
        try:
            client.get(url)
            break
        except httpx.TransportError:
            time.sleep(0.02)
    print(f"studio answers after     {1000 * (time.perf_counter() - began):8.0f} ms")
    page = {"store": store, "side": "train", "count": "10"}
    requests: list[tuple[str, str, dict[str, str]]] = [
        (f"curve of {steps:,} steps", "runs/long/series", {"keys": "loss", "points": "3000"}),
        ("eight more curves", "runs/long/series", {"keys": KEYS, "points": "3000"}),
        (
            "zoom to 1 % of it",
            "runs/long/series",
            {"keys": "loss", "from": str(steps // 2), "to": str(steps * 51 // 100)},
        ),
        ("list of runs", "runs", {}),
        ("rows of a step", f"runs/long/steps/{steps // 2}", {}),
        (f"first page of {rows:,} rows", "rows", page),
        ("page in the middle", "rows", page | {"start": str(rows // 2)}),
        ("last page", "rows", page | {"start": str(rows - 10)}),
        ("search, found last", "rows", page | {"search": f"Question {rows - 1}:"}),
        ("histogram of lengths", "lengths", {"store": store}),
    ]
    print(f"{'':32}{'cold':>8}{'then':>8}  ms")
    for title, path, query in requests:
        times = []
        for _ in range(6):
            began = time.perf_counter()
            response = client.get(f"{url}api/{path}", params=query)
            response.raise_for_status()
            times.append(1000 * (time.perf_counter() - began))
        print(f"{title:32}{times[0]:8.0f}{statistics.median(times[1:]):8.0f}")


KEYS = "learning_rate,grad_norm,rows_per_s,tokens_per_s,seconds,memory_bytes,cpu_percent,gpu_percent"

if __name__ == "__main__":
    main()
