"""Nothing is lost when the training process, the studio or the browser is killed: a run is what its folder holds."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

from tests.browser.conftest import Studio, step_number, until
from truetune.lock import owner_of

AT_LEAST = "Number((document.querySelector('.tiles dd')?.textContent ?? '').split('/')[0].replace(/\\D/g, '')) >= "

ASK = """([path, body]) => fetch(path, body && {
  method: "POST", headers: {"Content-Type": "application/json"}, body: JSON.stringify(body),
}).then((answer) => answer.json())"""


@pytest.fixture
def running(open_tab: Any, studio: Studio, tiny_qwen: Path) -> tuple[Any, Path]:
    """A run that was started from the page: its tab, and its folder."""
    rows = [{"instruction": f"What is {n} plus {n}?", "output": f"It is {n + n}."} for n in range(60)]
    data = studio.home / "sums.json"
    data.write_text(json.dumps(rows), encoding="utf-8")
    keys = {
        "batch_size": 4,
        "max_steps": 2000,
        "num_train_epochs": 200,
        "save_steps": 5,
        "dtype": "float32",
        "lora_r": 2,
    }
    query = urlencode({"data": data, "model": tiny_qwen, **keys, "eval_steps": 1000, "sample_prompts": "none"})
    tab = open_tab(f"train?{query}")
    tab.page.get_by_role("button", name="Start training").click()
    tab.page.wait_for_url("**/#/run/**", timeout=120_000)
    until(tab.page, f"{AT_LEAST} 8")
    return tab, studio.home / "runs" / tab.page.url.rpartition("/")[2]


def test_what_is_typed_stays_while_the_curve_moves(running: tuple[Any, Path]) -> None:
    tab, _ = running
    page = tab.page
    page.get_by_label("Rows of step").fill("3")
    until(page, f"{AT_LEAST} {step_number(page) + 4}")
    assert page.get_by_label("Rows of step").input_value() == "3"
    page.get_by_role("button", name="Show").click()
    page.get_by_role("heading", name="Rows of step 3", exact=True).wait_for()
    page.get_by_role("button", name="Stop").click()
    page.locator(".badge.stopped").wait_for(timeout=60_000)


def test_a_killed_training_process_is_seen_and_resumed(running: tuple[Any, Path]) -> None:
    tab, run = running
    page = tab.page
    owner = owner_of(run)
    assert owner is not None
    os.kill(int(owner["pid"]), signal.SIGKILL)
    page.locator(".badge.killed").wait_for()
    killed_at = step_number(page)
    assert killed_at >= 8
    page.get_by_role("button", name="Resume").click()
    page.locator(".badge.running").wait_for(timeout=120_000)
    until(page, f"{AT_LEAST} {killed_at + 3}")
    page.get_by_role("button", name="Stop").click()
    page.locator(".badge.stopped").wait_for(timeout=60_000)
    steps = [event["step"] for event in events(run) if event["kind"] == "step"]
    assert steps == list(range(1, len(steps) + 1))
    assert step_number(page) == steps[-1]


def test_the_studio_and_the_browser_may_be_killed(running: tuple[Any, Path], studio: Studio, open_tab: Any) -> None:
    tab, run = running
    seen = step_number(tab.page)
    studio.kill()
    tab.page.context.close()
    studio.start()
    # What the first page said while nobody answered it.
    tab.problems.clear()
    page = open_tab(f"run/{run.name}").page
    page.locator(".badge.running").wait_for()
    until(page, f"{AT_LEAST} {seen + 3}")
    # Its output is found again, and so is the way to stop it.
    page.get_by_role("button", name="Log").click()
    until(page, "document.querySelector('pre.log')?.textContent.includes('step')")
    page.get_by_role("button", name="Stop").click()
    page.locator(".badge.stopped").wait_for(timeout=60_000)


def test_two_tabs_tell_the_same(running: tuple[Any, Path], open_tab: Any) -> None:
    """What one does is seen in the other; the run that both resume goes on once."""
    tab, run = running
    first, second = tab.page, open_tab(f"run/{run.name}").page
    seen = max(step_number(first), step_number(second))
    for page in (first, second):
        until(page, f"{AT_LEAST} {seen + 2}")
    second.get_by_role("button", name="Stop").click()
    for page in (first, second):
        page.locator(".badge.stopped").wait_for(timeout=60_000)
    stopped_at = step_number(first)
    assert step_number(second) == stopped_at
    # The other tab learns of it by itself, and a second start is refused by the run's lock.
    first.get_by_role("button", name="Resume").click()
    again = ["--resume", "--output-dir", str(run.relative_to(run.parents[1]))]
    for page in (first, second):
        page.locator(".run-head .badge.running").wait_for(timeout=120_000)
        until(page, f"{AT_LEAST} {stopped_at + 3}")
    job = second.evaluate(ASK, ["api/jobs", {"command": "train", "words": again}])["id"]
    until(second, f"({ASK})(['api/jobs/{job}']).then(job => job.state === 'failed' && job.exit_code === 3)")
    first.get_by_role("button", name="Stop").click()
    for page in (first, second):
        page.locator(".run-head .badge.stopped").wait_for(timeout=60_000)
    steps = [event["step"] for event in events(run) if event["kind"] == "step"]
    assert steps == list(range(1, len(steps) + 1))


def test_an_open_page_goes_on_when_the_studio_is_back(running: tuple[Any, Path], studio: Studio) -> None:
    tab, _ = running
    page = tab.page
    seen = step_number(page)
    studio.kill()
    page.wait_for_timeout(500)
    studio.start()
    until(page, f"{AT_LEAST} {seen + 5}")
    page.get_by_role("button", name="Stop").click()
    page.locator(".badge.stopped").wait_for(timeout=60_000)
    # That the server was not there for a moment is told on the console by Chromium itself, and nothing else.
    assert all("ERR_" in told for told in tab.problems)
    tab.problems.clear()


def events(run: Path) -> list[dict[str, Any]]:
    """The run's events."""
    return [json.loads(line) for line in (run / "events.jsonl").read_text(encoding="utf-8").splitlines()]
