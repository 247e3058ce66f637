"""The curve of 100,000 steps under a hand: it zooms and moves along without a frame that one would notice.

uPlot draws 100,000 points nearly as smoothly as 3,000 (measured: longest frame 83 ms against 50 ms), so frames alone
would not tell that the server had stopped thinning. What would: each rest of the hand asks for the steps in view anew,
and what comes then must stay small. The second test takes the thinning away and sees that.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.browser.conftest import BIG_STEPS, Studio, until
from truetune.studio import runs

LONGEST_FRAME_MS = 150
"""Of the best of some tries, since other processes take the core now and then; a frame is 17 ms if nothing does."""
MOST_BYTES = 1_000_000
"""Of one answer: nine curves of 6,000 points."""
NUM_TRIES = 3

WATCH = """() => {
  const seen = window.seen = {gaps: [], tasks: [], isOn: true};
  let last = performance.now();
  const look = (now) => { seen.gaps.push(now - last); last = now; if (seen.isOn) requestAnimationFrame(look); };
  requestAnimationFrame((now) => { last = now; requestAnimationFrame(look); });
  seen.observer = new PerformanceObserver((list) => seen.tasks.push(...list.getEntries().map((task) => task.duration)));
  seen.observer.observe({type: "longtask"});
}"""
SIZES = "performance.getEntriesByType('resource').filter(r => r.name.includes('/series')).map(r => r.decodedBodySize)"
TOLD = "() => { seen.isOn = false; seen.observer.disconnect(); return [seen.gaps, seen.tasks]; }"


def gesture(page: Any) -> None:
    """Zoom in with Ctrl and the wheel, move along with the wheel, then with Shift and drag, and zoom out again."""
    size = page.locator(".chart .u-over").first.bounding_box()
    x, y = size["x"] + size["width"] / 2, size["y"] + size["height"] / 2
    page.mouse.move(x, y)
    turn(page, "Control", 8, (0, -60))
    turn(page, None, 12, (40, 0))
    page.keyboard.down("Shift")
    page.mouse.down()
    page.mouse.move(x + 250, y, steps=12)
    page.mouse.up()
    page.keyboard.up("Shift")
    page.mouse.move(x, y)
    turn(page, "Control", 12, (0, 60))


def turn(page: Any, key: str | None, times: int, by: tuple[int, int]) -> None:
    """Turn the wheel while a key is held."""
    if key:
        page.keyboard.down(key)
    for _ in range(times):
        page.mouse.wheel(*by)
        page.wait_for_timeout(20)
    if key:
        page.keyboard.up(key)


def move(page: Any, name: str) -> tuple[float, int]:
    """Move a hand over the run's curve: the longest time between two frames, of the best try; the largest answer."""
    longest, sizes = [], []
    for _ in range(NUM_TRIES):
        page.goto(f"{page.url.partition('#')[0]}#/runs")
        page.get_by_role("heading", name="Runs").wait_for()
        page.goto(f"{page.url.partition('#')[0]}#/run/{name}")
        until(page, "document.querySelectorAll('.chart canvas').length > 4")
        page.wait_for_load_state("networkidle")
        page.wait_for_timeout(300)
        page.evaluate("performance.clearResourceTimings()")
        page.evaluate(WATCH)
        gesture(page)
        # What the last rest asked for is drawn, too.
        page.wait_for_load_state("networkidle")
        page.wait_for_timeout(300)
        gaps, tasks = page.evaluate(TOLD)
        assert len(gaps) > 30
        longest.append(max(gaps))
        sizes += page.evaluate(SIZES)
        told = ", ".join(f"{task:.0f}" for task in tasks)
        print(f"\n{len(gaps)} frames, longest {max(gaps):.0f} ms; long tasks: {told}; {max(sizes):,} bytes")
    # The hand rests after each of four movements; each rest asks twice.
    assert len(sizes) >= NUM_TRIES * 4
    return min(longest), max(sizes)


def test_zooming_and_moving_along_is_smooth(open_tab: Any, big_run: str) -> None:
    longest_ms, num_bytes = move(open_tab("runs").page, big_run)
    assert longest_ms < LONGEST_FRAME_MS
    assert num_bytes < MOST_BYTES


def test_without_thinning_that_test_fails(open_tab: Any, big_run: str, studio: Studio) -> None:
    page = open_tab("runs").page
    found = runs.Runs([studio.home])
    columns = found.log(found.run(big_run)).columns()

    def whole(route: Any) -> None:
        query = parse_qs(urlsplit(route.request.url).query)
        first, last = int(query.get("from", ["0"])[0]), int(query.get("to", [str(BIG_STEPS)])[0])
        chosen = (columns["step"] >= first) & (columns["step"] <= last)
        told = {key: runs._plain(columns[key][chosen]) for key in query["keys"][0].split(",")}
        route.fulfill(json={"step": columns["step"][chosen].tolist(), **told, "eval": [], "total": BIG_STEPS})

    page.route("**/series?**", whole)
    assert move(page, big_run)[1] > 5 * MOST_BYTES
