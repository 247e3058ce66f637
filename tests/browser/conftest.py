"""A real studio, a real Chromium. Every page that a test opens must stay without errors and ask only this machine.

TRUETUNE_SCREENSHOTS=docs/images writes the pictures that the documentation shows.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from truetune.cli import run as truetune

HERE = Path(__file__).parent
CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
SCREENSHOTS = os.environ.get("TRUETUNE_SCREENSHOTS")
START_S = 30
BIG_STEPS, SPIKE = 100_000, 70_123
XSS = '<img src=x onerror="window.hit=1"><script>window.hit=1</script>'
WIDTHS = {"desk": (1180, 860), "phone": (375, 812)}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """All of this folder is marked `browser`, and runs only where that, or the folder itself, is asked for."""
    is_asked = "browser" in config.option.markexpr or any("browser" in word for word in config.args)
    for item in [item for item in items if HERE in item.path.parents]:
        item.add_marker(pytest.mark.browser)
        if not is_asked:
            items.remove(item)


@dataclass
class Studio:
    """A studio process in a home folder of its own."""

    home: Path
    port: int
    process: subprocess.Popen[str] | None = None

    @property
    def url(self) -> str:
        """Where its page is."""
        return f"http://127.0.0.1:{self.port}/"

    def start(self) -> None:
        """Start it and wait until it answers."""
        words = [sys.executable, "-m", "truetune", "--lang", "en", "studio", "--port", str(self.port), "--no-browser"]
        with (self.home.parent / "studio.log").open("a") as log:
            self.process = subprocess.Popen(words, cwd=self.home, stdout=log, stderr=subprocess.STDOUT, text=True)
        until = time.monotonic() + START_S
        while time.monotonic() < until:
            try:
                urllib.request.urlopen(self.url, timeout=5).close()
                return
            except OSError:
                assert self.process.poll() is None, (self.home.parent / "studio.log").read_text()
                time.sleep(0.1)
        raise TimeoutError(self.url)

    def kill(self) -> None:
        """End it at once, as a power loss would; what it started goes on."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()


@pytest.fixture(scope="session")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    """A studio with an empty home folder."""
    home = tmp_path_factory.mktemp("studio") / "home"
    home.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    made = Studio(home, port)
    made.start()
    yield made
    if made.process is not None:
        made.process.terminate()
        made.process.wait(20)


@pytest.fixture(scope="session")
def run_name(studio: Studio, tiny_qwen: Path) -> str:
    """A finished run of the tiny model, on rows that try to be markup, in a folder whose name tries, too."""
    name = "<b>run <img src=x onerror=hit=1>"
    rows = [{"instruction": f"What is {n}? {XSS}", "output": f"It is {n}. {XSS}"} for n in range(40)]
    data = studio.home / "<i>rows.json"
    data.write_text(json.dumps(rows), encoding="utf-8")
    keys = ["--max-steps", "4", "--batch-size", "8", "--eval-steps", "2", "--dtype", "float32", "--lora-r", "2"]
    out = studio.home / "runs" / name
    assert truetune(["train", str(data), "--model", str(tiny_qwen), "--output-dir", str(out), *keys]) == 0
    return name


@pytest.fixture(scope="session")
def big_run(studio: Studio, run_name: str) -> str:
    """The same run with 100,000 steps in its events, and one spike."""
    home = studio.home / "runs"
    shutil.copytree(home / run_name, home / "big")
    events = (home / run_name / "events.jsonl").read_text(encoding="utf-8").splitlines()
    step = next(event for event in map(json.loads, events) if event["kind"] == "step")
    with (home / "big" / "events.jsonl").open("w", encoding="utf-8") as file:
        for number in range(1, BIG_STEPS + 1):
            loss = 9.5 if number == SPIKE else 2 + math.exp(-number / 20_000) + 0.1 * math.sin(number)
            file.write(json.dumps({**step, "step": number, "loss": loss}) + "\n")
    return "big"


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """Debian's Chromium. Without it (`apt-get install chromium`), or without Playwright, these tests fail."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@dataclass
class Tab:
    """A page, what went wrong on it, and whom it asked."""

    page: Any
    problems: list[str] = field(default_factory=list)
    hosts: set[str | None] = field(default_factory=set)
    num_requests: int = 0

    def watch(self) -> None:
        """Take down errors and requests."""
        # What the server refuses is said on the page and by Chromium, too; everything else must not happen.
        self.page.on("console", lambda said: self._said(said))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("request", self._asked)

    def _said(self, said: Any) -> None:
        if said.type in ("error", "warning"):
            self.problems.append(f"{said.text} ({said.location.get('url')})")

    def _asked(self, request: Any) -> None:
        self.num_requests += 1
        parts = urlsplit(request.url)
        if parts.scheme not in ("data", "blob"):
            self.hosts.add(parts.hostname)

    def shot(self, name: str, *, at: str = "header") -> None:
        """Keep a picture, if asked to; `at`: what stands at its top."""
        if SCREENSHOTS:
            Path(SCREENSHOTS).mkdir(parents=True, exist_ok=True)
            self.page.locator(at).first.evaluate(
                "element => scrollTo(0, element.getBoundingClientRect().top + scrollY - 16)"
            )
            self.page.wait_for_timeout(400)
            self.page.screenshot(path=Path(SCREENSHOTS) / f"studio-{name}.png")


@pytest.fixture
def open_tab(chromium: Any, studio: Studio) -> Iterator[Any]:
    """Open pages: open_tab("runs", lang="zh", scheme="dark", width="phone"); all are looked at in the end."""
    tabs: list[Tab] = []

    def opened(at: str = "data", *, lang: str = "en", scheme: str = "light", width: str = "desk") -> Tab:
        size = dict(zip(("width", "height"), WIDTHS[width], strict=True))
        locale = "zh-CN" if lang == "zh" else "en-US"
        context = chromium.new_context(viewport=size, color_scheme=scheme, locale=locale, reduced_motion="reduce")
        context.set_default_timeout(20_000)
        tab = Tab(context.new_page())
        tab.watch()
        tabs.append(tab)
        tab.page.goto(f"{studio.url}#/{at}")
        tab.page.locator("main h1, main .fault").first.wait_for()
        return tab

    yield opened
    for tab in tabs:
        tab.page.context.close()
    assert [problem for tab in tabs for problem in tab.problems] == []
    assert {host for tab in tabs for host in tab.hosts} <= {"127.0.0.1"}
    assert not tabs or sum(tab.num_requests for tab in tabs) > 5


def step_number(page: Any) -> int:
    """The step that the run's page shows."""
    told = page.locator(".tiles dd").first.inner_text()
    return int(re.sub(r"\D", "", told.split("/")[0]) or 0)


def until(page: Any, script: str, *, timeout_s: float = 240) -> None:
    """Wait until a script is true. Playwright's own way evaluates a string in the page, which its policy forbids."""
    end = time.monotonic() + timeout_s
    while not page.evaluate(script):
        assert time.monotonic() < end, f"{script}\n{page.locator('main').inner_text()}"
        time.sleep(0.1)
