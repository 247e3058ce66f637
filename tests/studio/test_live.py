"""Events as they come: all of them, once, in order; over a reconnection, and over a resume that cuts the file."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from truetune.rundir import RunDir
from truetune.studio import live as module
from truetune.studio.live import live


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """A run that has begun."""
    monkeypatch.setattr(module, "POLL_S", 0.01)
    run = RunDir(tmp_path)
    run.write_info(state="done")
    run.append({"kind": "state", "state": "running"})
    for step in range(1, 4):
        run.append({"kind": "step", "step": step, "loss": 1.0})
    return run


async def take(stream: Any, count: int) -> list[tuple[str, dict[str, Any]]]:
    """Return the (id, event) of the next events, but those of the state."""
    found: list[tuple[str, dict[str, Any]]] = []
    async with asyncio.timeout(10):
        async for piece in stream:
            lines = dict(line.split(": ", 1) for line in piece.decode().strip().split("\n") if not line.startswith(":"))
            event = json.loads(lines.get("data", "{}"))
            if event and event["kind"] != "state":
                found.append((lines.get("id", ""), event))
            if len(found) == count:
                return found
    return found


def steps(found: list[tuple[str, dict[str, Any]]]) -> list[Any]:
    return [event.get("step", event["kind"]) for _, event in found]


def test_only_what_is_later_and_then_everything(run: RunDir) -> None:
    async def follow() -> None:
        stream = live(run, after=2)
        assert steps(await take(stream, 1)) == [3]
        for step in range(4, 7):
            run.append({"kind": "step", "step": step, "loss": 1.0})
        with run.events.open("a") as file:
            file.write('{"kind": "eval", "st')
        assert steps(await take(stream, 3)) == [4, 5, 6]
        with run.events.open("a") as file:
            file.write('ep": 6, "eval_loss": 2.0}\n')
        ((name, event),) = await take(stream, 1)
        assert event == {"kind": "eval", "step": 6, "eval_loss": 2.0}
        await stream.aclose()
        # The page lost its connection here; what came meanwhile, and no more, comes when it is back.
        run.append({"kind": "sample", "step": 6, "number": 0})
        again = live(run, after=0, seen=name)
        assert [event["kind"] for _, event in await take(again, 1)] == ["sample"]

    asyncio.run(follow())


def test_a_resume_cuts(run: RunDir) -> None:
    async def follow() -> None:
        stream = live(run, after=0)
        assert steps(await take(stream, 3)) == [1, 2, 3]
        run.cut_back(1)
        run.append({"kind": "step", "step": 2, "loss": 9.0})
        found = await take(stream, 3)
        assert steps(found) == ["cut", 1, 2]
        assert found[-1][1]["loss"] == 9.0

    asyncio.run(follow())


def test_the_state_is_told_when_it_changes(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STATE_S", 0.0)

    async def follow() -> list[str]:
        seen: list[str] = []
        async for piece in live(run, after=99):
            if b'"state"' in piece:
                seen.append(json.loads(piece.decode().partition("data: ")[2])["state"])
                run.write_info(state="stopped")
            if len(seen) == 2:
                break
        return seen

    assert asyncio.run(asyncio.wait_for(follow(), 10)) == ["done", "stopped"]
