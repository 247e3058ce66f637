"""`truetune serve` over HTTP: 16 clients at once beside one at a time, and 200 at once.

    python -m bench.serving

Serves SmolLM2-135M from a process of its own with the whole machine, and writes bench/results/serving.md. Two plain
`generate` calls of transformers, with one prompt and with a batch of 16, are measured beside it.
"""

from __future__ import annotations

import asyncio
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import psutil

RESULT = Path(__file__).parent / "results" / "serving.md"
NUM_TOKENS, NUM_CLIENTS, NUM_ROUNDS, NUM_CROWD, NUM_CROWDS = 64, 16, 3, 200, 7
TOPICS = ("the sea", "bread", "a lighthouse", "winter", "trains", "bees", "a market", "mountains")


def question(number: int) -> str:
    """A prompt of its own for every request, so that no cache answers it."""
    return f"Write story number {number} about {TOPICS[number % len(TOPICS)]} and tell me what happens in the end."


class Server:
    """`truetune serve MODEL` as a process."""

    def __init__(self, model: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "truetune", "serve", model, "--port", str(port), "--lang", "en"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.url = f"http://127.0.0.1:{port}"
        for _ in range(600):
            try:
                self.model = httpx.get(f"{self.url}/v1/models").json()["data"][-1]["id"]
                return
            except httpx.ConnectError:
                time.sleep(0.2)
        raise TimeoutError("the server did not start")

    @property
    def memory_mb(self) -> float:
        """Resident memory."""
        return psutil.Process(self.process.pid).memory_info().rss / 1e6

    async def ask(self, client: httpx.AsyncClient, number: int, **more: Any) -> httpx.Response:
        """Ask for exactly NUM_TOKENS tokens, as far as the answer has them."""
        messages = [{"role": "user", "content": question(number)}]
        body = {"model": self.model, "messages": messages, "max_tokens": NUM_TOKENS} | more
        return await client.post(f"{self.url}/v1/chat/completions", json=body)


async def rate(server: Server, *, num_clients: int, first: int) -> tuple[float, list[float]]:
    """(tokens/s of all clients together, seconds of each request); each client asks once."""
    durations: list[float] = []

    async def one(client: httpx.AsyncClient, number: int) -> int:
        began = time.perf_counter()
        response = await server.ask(client, number)
        durations.append(time.perf_counter() - began)
        return int(response.json()["usage"]["completion_tokens"])

    async with httpx.AsyncClient(timeout=600) as client:
        began = time.perf_counter()
        counts = await asyncio.gather(*(one(client, first + number) for number in range(num_clients)))
        return sum(counts) / (time.perf_counter() - began), durations


async def crowd(server: Server, first: int) -> dict[str, Any]:
    """NUM_CROWD clients at once: what they were told, and how long /health took meanwhile."""
    limits = httpx.Limits(max_connections=NUM_CROWD + 10)
    async with httpx.AsyncClient(timeout=600, limits=limits) as client:
        asked = [asyncio.ensure_future(server.ask(client, first + n, max_tokens=16)) for n in range(NUM_CROWD)]
        delays = []
        while not all(one.done() for one in asked):
            began = time.perf_counter()
            await client.get(f"{server.url}/health")
            delays.append(time.perf_counter() - began)
            await asyncio.sleep(0.1)
        statuses = Counter(one.result().status_code for one in asked)
        tokens = [one.result().json()["usage"]["completion_tokens"] for one in asked if one.result().status_code == 200]
    return {
        "statuses": dict(sorted(statuses.items())),
        "lost": NUM_CROWD - sum(statuses.values()),
        "tokens": sum(tokens),
        "health": 1000 * statistics.median(delays),
        "slowest": 1000 * max(delays),
        "memory": server.memory_mb,
    }


def generate_rate(model: str, num_prompts: int) -> float:
    """Tokens/s of transformers' own `generate` with that many prompts at once."""
    from truetune.generate import Sampling, answers
    from truetune.use import load

    loaded = load(model)
    prompts = [[{"role": "user", "content": question(number)}] for number in range(num_prompts)]
    began = time.perf_counter()
    texts = answers(
        loaded.model, loaded.renderer, prompts=prompts, sampling=Sampling(NUM_TOKENS), batch_size=num_prompts
    )
    duration = time.perf_counter() - began
    return sum(len(loaded.renderer.text_ids(text)) for text in texts) / duration


def measure(model: str) -> list[str]:
    """Return the lines of the report."""
    server = Server(model)
    try:
        asyncio.run(rate(server, num_clients=1, first=900))
        alone, together, waits = [], [], []
        for number in range(NUM_ROUNDS):
            singles = [asyncio.run(rate(server, num_clients=1, first=100 * number + n))[0] for n in range(3)]
            alone.append(statistics.median(singles))
            found, durations = asyncio.run(rate(server, num_clients=NUM_CLIENTS, first=100 * number + 50))
            together.append(found)
            waits.append(statistics.median(durations))
        one, many = statistics.median(alone), statistics.median(together)
        before = server.memory_mb
        crowds = [asyncio.run(crowd(server, 1000 * (n + 1))) for n in range(NUM_CROWDS)]
    finally:
        server.process.terminate()
        server.process.wait(30)
    lines = [
        "| what | tokens/s (median of 3) | each of the 3 |",
        "|---|---:|---|",
        f"| one request at a time | {one:.0f} | {', '.join(f'{value:.0f}' for value in alone)} |",
        f"| {NUM_CLIENTS} at once | {many:.0f} | {', '.join(f'{value:.0f}' for value in together)} |",
        f"| ratio | {many / one:.1f} | |",
        f"| `generate`, one prompt | {generate_rate(model, 1):.0f} | once |",
        f"| `generate`, a batch of {NUM_CLIENTS} | {generate_rate(model, NUM_CLIENTS):.0f} | once |",
        "",
        f"Half of the {NUM_CLIENTS} had their whole answer after {statistics.median(waits):.1f} s.",
        "",
        f"{NUM_CROWD} clients at once, {NUM_CROWDS} times (16 tokens each; memory before: {before:.0f} MB):",
        "",
        "| told | lost | tokens | /health, median and slowest | memory after |",
        "|---|---:|---:|---:|---:|",
    ]
    for found in crowds:
        told = ", ".join(f"{status}: {count}" for status, count in found["statuses"].items())
        lines.append(
            f"| {told} | {found['lost']} | {found['tokens']} | {found['health']:.0f} and {found['slowest']:.0f} ms "
            f"| {found['memory']:.0f} MB |"
        )
    return lines


def main() -> None:
    """Measure, print and write the report."""
    from truetune.commands.demo import demo_model

    lines = measure(demo_model())
    import torch
    import transformers

    head = [
        "# Serving",
        "",
        f"SmolLM2-135M, {NUM_TOKENS} tokens an answer, prompts of about 40 tokens, all different. "
        f"{os.cpu_count()} cores ({platform.machine()}), torch {torch.__version__}, transformers "
        f"{transformers.__version__}. Made by `python -m bench.serving`.",
        "",
    ]
    text = "\n".join([*head, *lines]) + "\n"
    RESULT.write_text(text, encoding="utf-8")
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
