"""A server from its start to its end: the port, signals, a kill, the model's files removed (F21)."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch

from truetune.errors import MachineError, UserError
from truetune.serve.listen import bind
from truetune.serve.running import Selector, make_service, max_cached_tokens

ASK = {"model": "one", "messages": [{"role": "user", "content": "Hi"}]}


def test_a_port_in_use_is_found_before_anything_is_loaded() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(MachineError) as caught:
            bind("127.0.0.1", other.getsockname()[1])
    assert caught.value.key == "port_in_use"
    assert caught.value.exit_code == 3
    for host in ("no.such.name.invalid", "203.0.113.7"):
        with pytest.raises(UserError) as wrong:
            bind(host, 0)
        assert wrong.value.key == "serve_address"


def test_layers_without_keys_and_values_are_refused() -> None:
    config = SimpleNamespace(layer_types=["linear_attention", "full_attention"])
    model = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: config))
    with pytest.raises(UserError) as caught:
        make_service(model, [], lang="en", log=print)
    assert caught.value.values["names"] == "linear_attention"


def test_room_for_keys_follows_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    config = SimpleNamespace(num_hidden_layers=3, num_key_value_heads=2, num_attention_heads=4, hidden_size=32)
    model = torch.nn.Linear(1, 1)
    model.dtype = torch.float32  # type: ignore[assignment]
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1_000_000))
    assert max_cached_tokens(config, model) == 500_000 // (2 * 3 * 2 * 8 * 4)


def test_the_selector_switches_only_when_it_must() -> None:
    told: list[Any] = []
    tuner = SimpleNamespace(
        disable_adapter_layers=lambda: told.append("off"), enable_adapter_layers=lambda: told.append("on")
    )
    select = Selector(SimpleNamespace(base_model=tuner, set_adapter=lambda name, **_: told.append(name)))
    for name in ("a", "a", None, None, "a", "b", None, "b"):
        select(name)
    assert told == ["a", "off", "on", "b", "off", "on"]


class Process:
    """`truetune serve` in a process of its own."""

    def __init__(self, run: Path, *more: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [sys.executable, "-m", "truetune", "serve", str(run), "--port", str(self.port), "--lang", "en", *more]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )
        self.url = f"http://127.0.0.1:{self.port}"
        self.lines: list[str] = []
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if line.startswith("Listening on"):
                return
        raise RuntimeError("".join(self.lines))

    def ask(self, **more: Any) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/chat/completions", json=ASK | {"max_tokens": 4} | more, timeout=60)

    def end(self, number: int) -> tuple[int, float]:
        """Send a signal; return the exit code, and how long it took."""
        began = time.perf_counter()
        self.process.send_signal(number)
        code, duration = self.process.wait(30), time.perf_counter() - began
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code, duration


@pytest.fixture
def copied(tiny_runs: list[Path], tiny_qwen: Path, tmp_path: Path) -> Path:
    """A copy of the run with a copy of its base, that may be removed."""
    shutil.copytree(tiny_qwen, tmp_path / "tiny-qwen3")
    shutil.copytree(tiny_runs[0], tmp_path / "one")
    path = tmp_path / "one" / "adapter" / "adapter_config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(tmp_path / "tiny-qwen3")})
    )
    return tmp_path / "one"


@pytest.mark.slow
def test_f21_killed_restarted_and_ended(copied: Path) -> None:
    """kill -9 while it answers, a start after it, files removed while it serves, SIGTERM while it answers."""
    first = Process(copied)
    assert "  8 prompts compared with training: the same token ids\n" in first.lines
    assert "  system prompt, unless a request brings one: Count.\n" in first.lines
    wanted = first.ask().json()["choices"]
    with httpx.stream(
        "POST", f"{first.url}/v1/chat/completions", json=ASK | {"stream": True, "max_tokens": 9000}
    ) as told:
        lines = told.iter_lines()
        next(lines)
        assert first.end(signal.SIGKILL)[0] == -9
        with pytest.raises(httpx.HTTPError):
            list(lines)
    second = Process(copied)
    assert second.ask().json()["choices"] == wanted
    shutil.rmtree(copied.parent / "tiny-qwen3")
    shutil.rmtree(copied)
    assert second.ask().json()["choices"] == wanted
    ended: list[str] = []

    def read() -> None:
        asked = ASK | {"stream": True, "max_tokens": 30_000}
        with httpx.stream("POST", f"{second.url}/v1/chat/completions", json=asked, timeout=60) as told:
            ended.extend(told.iter_lines())

    reader = threading.Thread(target=read)
    reader.start()
    while not httpx.get(f"{second.url}/metrics").text.count("truetune_running 1"):
        time.sleep(0.02)
    code, duration = second.end(signal.SIGTERM)
    reader.join(10)
    assert code == 143
    assert duration < 9
    assert "the server is stopping" in ended[-2]
    assert "[DONE]" not in ended[-1]


@pytest.mark.slow
def test_ctrl_c_with_nothing_to_do_ends_at_once(tiny_runs: list[Path]) -> None:
    running = Process(tiny_runs[0], "--no-run-system")
    assert not [line for line in running.lines if "system prompt" in line]
    assert running.ask().status_code == 200
    code, duration = running.end(signal.SIGINT)
    assert (code, duration < 3) == (130, True)
