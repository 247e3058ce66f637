"""A real server over two tiny adapters of one base, for all tests here."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from truetune.cli import run


@dataclass
class Running:
    """A server in a thread. `logs`: what it told of each request."""

    url: str
    port: int
    service: Any
    runs: list[Path]
    logs: list[dict[str, Any]] = field(default_factory=list)
    client: httpx.Client = field(default_factory=lambda: httpx.Client(timeout=60))

    def post(self, path: str = "chat/completions", **body: Any) -> httpx.Response:
        """Send a request; a question to the first run unless `body` says otherwise."""
        asked: dict[str, Any] = {"model": "one", "max_tokens": 6}
        if path == "chat/completions":
            asked["messages"] = [{"role": "user", "content": "Number 3"}]
        body = {name: value for name, value in (asked | body).items() if value is not ...}
        return self.client.post(f"{self.url}/{path}", json=body)

    def idle(self, timeout_s: float = 10) -> float:
        """Wait until no answer is being made, and return how long that took."""
        began = time.perf_counter()
        worker = self.service.worker
        while worker.num_running or worker.num_waiting:
            if time.perf_counter() - began > timeout_s:
                raise TimeoutError("answers are still being made")
            time.sleep(0.005)
        return time.perf_counter() - began


@pytest.fixture(scope="session")
def tiny_runs(tiny_qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A short run with a system prompt and an argument of the template, and an adapter that another tool wrote."""
    import torch

    from truetune.model import add_lora, find_base, load_base

    folder = tmp_path_factory.mktemp("served")
    rows = [{"instruction": f"Number {n}", "output": f"{n} it is"} for n in range(12)]
    (folder / "data.json").write_text(json.dumps(rows), encoding="utf-8")
    keys = ["--model", str(tiny_qwen), "--max-steps", "2", "--learning-rate", "3e-2", "--attention", "padded"]
    keys += ["--system", "Count.", "--chat-template-kwargs", "{enable_thinking: false}"]
    assert run(["train", str(folder / "data.json"), *keys, "--output-dir", str(folder / "one")]) == 0
    lora: dict[str, Any] = {"r": 2, "alpha": 4, "dropout": 0.0, "targets": ["q_proj", "v_proj"], "seed": 0}
    model = add_lora(load_base(find_base(str(tiny_qwen)), "float32"), **lora)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(3))
    model.save_pretrained(str(folder / "two"), save_embedding_layers=False)
    return [folder / "one", folder / "two"]


@pytest.fixture(scope="session")
def start(tiny_runs: list[Path]) -> Iterator[Callable[..., Running]]:
    """Start servers; they end with the tests."""
    from truetune.serve.listen import bind
    from truetune.serve.running import Server, make_service
    from truetune.use import find_voices, load_voices

    ends: list[Callable[[], None]] = []

    def begin(*, token: str | None = None, service: Any = None) -> Running:
        bound = bind("127.0.0.1", 0)
        port = bound.getsockname()[1]
        running = Running(f"http://127.0.0.1:{port}/v1", port, service, tiny_runs)
        if service is None:
            base, voices = find_voices([str(path) for path in tiny_runs])
            model = load_voices(base, voices).float()
            running.service = make_service(model, voices, lang="en", log=lambda **told: running.logs.append(told))
            running.service.worker.start()
        ready = threading.Event()
        server = Server(running.service, token=token, on_ready=ready.set)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
        thread.start()

        def end() -> None:
            server.should_exit = True
            thread.join(15)
            running.service.worker.close("over")
            bound.close()

        ends.append(end)
        assert ready.wait(10)
        return running

    yield begin
    for end in reversed(ends):
        end()


@pytest.fixture(scope="session")
def served(start: Callable[..., Running]) -> Running:
    """A server without a token."""
    return start()
