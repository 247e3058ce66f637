"""A real studio over a home folder with a short real run, in a thread; and as a process that can be killed."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from truetune.cli import run

ROWS = [{"instruction": f"Number {n}?", "output": f"It is {n} 🙂."} for n in range(40)]
QUICK = ("--attention", "padded", "--batch-size", "4", "--lora-r", "2", "--dtype", "float32")


@dataclass
class Page:
    """What a browser that opened the page can do. `studio`: what is behind it, None of another process."""

    url: str
    home: Path
    client: httpx.Client
    studio: Any = None

    def get(self, path: str, *, status: int = 200, **query: Any) -> Any:
        """Ask for JSON."""
        response = self.client.get(f"{self.url}api/{path}", params=query)
        assert response.status_code == status, response.text
        return response.json()

    def post(self, path: str, body: Any = None, *, status: int = 200) -> Any:
        """Send JSON."""
        response = self.client.post(f"{self.url}api/{path}", json=body or {})
        assert response.status_code == status, response.text
        return response.json()

    def job(self, name: str, timeout_s: float = 90) -> dict[str, Any]:
        """Wait until a job has ended."""
        until = time.monotonic() + timeout_s
        while time.monotonic() < until:
            job: dict[str, Any] = self.get(f"jobs/{name}")
            if job["state"] != "running":
                return job
            time.sleep(0.1)
        raise TimeoutError(job["output"])


@pytest.fixture(scope="session")
def studio_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of our own, for the commands that are started, too."""
    return tmp_path_factory.mktemp("studio-cache")


@pytest.fixture(autouse=True)
def _cache_of_commands(studio_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRUETUNE_CACHE", str(studio_cache))


@pytest.fixture(scope="session")
def home(tiny_qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home folder with rows and the run `one`."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "data.json").write_text(json.dumps(ROWS, ensure_ascii=False), encoding="utf-8")
    words = ["train", str(folder / "data.json"), "--model", str(tiny_qwen), "--max-steps", "6", "--eval-steps", "2"]
    assert run([*words, *QUICK, "--system", "Count.", "--output-dir", str(folder / "runs" / "one")]) == 0
    return folder


@pytest.fixture(scope="session")
def open_page(studio_cache: Path) -> Iterator[Callable[..., Page]]:
    """Open a home folder in a studio of this process; `token`: what it asks for."""
    from truetune.serve.listen import bind
    from truetune.studio.app import Studio
    from truetune.studio.places import Places
    from truetune.studio.running import Server

    ends: list[Callable[[], None]] = []

    def begin(home: Path, *roots: Path, token: str | None = None) -> Page:
        bound = bind("127.0.0.1", 0)
        studio = Studio(Places(home, roots), "en")
        ready = threading.Event()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRUETUNE_CACHE", str(studio_cache))
            server = Server(studio, token=token, on_ready=ready.set)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
        thread.start()

        def end() -> None:
            server.should_exit = True
            thread.join(15)
            bound.close()

        ends.append(end)
        assert ready.wait(10)
        page = Page(f"http://127.0.0.1:{bound.getsockname()[1]}/", home, httpx.Client(timeout=60), studio)
        ends.append(page.client.close)
        if token is None:
            assert page.client.get(page.url).status_code == 200
        return page

    yield begin
    for end in reversed(ends):
        end()


@pytest.fixture(scope="session")
def page(open_page: Callable[..., Page], home: Path) -> Page:
    """The page over `home`."""
    return open_page(home)


@dataclass
class Process:
    """A studio as a process of its own, in `home`."""

    home: Path
    port: int
    log: Path
    clients: list[httpx.Client] = field(default_factory=list)

    def start(self) -> Page:
        """Start it, and open the page."""
        words = [sys.executable, "-P", "-m", "truetune", "studio", "--no-browser", "--port", str(self.port)]
        with self.log.open("ab") as output:
            self.child = subprocess.Popen(words, cwd=self.home, stdout=output, stderr=output, env=dict(os.environ))
        page = Page(f"http://127.0.0.1:{self.port}/", self.home, httpx.Client(timeout=60))
        self.clients.append(page.client)
        for _ in range(200):
            assert self.child.poll() is None, self.log.read_text()
            try:
                page.client.get(page.url)
            except httpx.TransportError:
                time.sleep(0.1)
            else:
                return page
        raise TimeoutError

    def kill(self) -> None:
        """As a crash would."""
        self.child.kill()
        self.child.wait()


@pytest.fixture
def process(tmp_path: Path) -> Iterator[Process]:
    """A studio that can be killed, in an empty home folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    home = tmp_path / "home"
    home.mkdir()
    process = Process(home, port, tmp_path / "studio.log")
    yield process
    process.kill()
    for client in process.clients:
        client.close()
