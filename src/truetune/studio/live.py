"""A run's events as they come, for the page: a stream that ends when the page closes it."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from typing import Any

from truetune.disk import to_json
from truetune.rundir import RunDir
from truetune.studio.runs import state_of

POLL_S = 0.3
STATE_S = 2.0
"""How often the state is looked up, and a line is sent that shows a page has gone."""
MAX_READ_BYTES = 1 << 22


async def live(run: RunDir, *, after: int, seen: str = "") -> AsyncIterator[bytes]:
    """Yield events later than step `after`, as server-sent events; whatever comes of samples and states, too.

    `seen`: the id of the last event that the page had, INODE:OFFSET, when it connects again. A "cut" event says that
    the file was cut back by a resume: what the page holds of later steps is void.
    """
    inode, offset = _place(seen)
    state, since_state = "", STATE_S
    # What came before the page asked, and is of no step, it knows already.
    is_new = bool(seen)
    while True:
        lines, inode_now, offset_now = await asyncio.to_thread(_read, run, inode, offset)
        if inode and inode_now != inode:
            yield _event({"kind": "cut"}, f"{inode_now}:0")
            after = -1
        for line, end in lines:
            event = _parsed(line)
            if event is not None and (event["step"] > after if "step" in event else is_new):
                yield _event(event, f"{inode_now}:{end}")
        inode, offset = inode_now, offset_now
        if lines:
            # There may be more than one read takes.
            continue
        is_new = True
        if since_state >= STATE_S:
            since_state = 0.0
            info = await asyncio.to_thread(run.read_info)
            now = await asyncio.to_thread(state_of, run, info)
            yield b": \n\n" if now == state else _event({"kind": "state", "state": now, "error": info.get("error")}, "")
            state = now
        await asyncio.sleep(POLL_S)
        since_state += POLL_S


def _place(seen: str) -> tuple[int, int]:
    inode, _, offset = seen.partition(":")
    return (int(inode), int(offset)) if inode.isdecimal() and offset.isdecimal() else (0, 0)


def _read(run: RunDir, inode: int, offset: int) -> tuple[list[tuple[bytes, int]], int, int]:
    """Return the whole lines that are new, each with the offset of its end; then the file's inode, and that offset."""
    try:
        with run.events.open("rb") as file:
            told = os.fstat(file.fileno())
            if told.st_ino != inode or told.st_size < offset:
                offset = 0
            file.seek(offset)
            data = file.read(MAX_READ_BYTES)
    except FileNotFoundError:
        return [], 0, 0
    lines = []
    for line in data[: data.rfind(b"\n") + 1].splitlines(keepends=True):
        offset += len(line)
        lines.append((line, offset))
    return lines, told.st_ino, offset


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) else None


def _event(value: dict[str, Any], name: str) -> bytes:
    head = f"id: {name}\n" if name else ""
    return f"{head}data: {to_json(value)}\n\n".encode()
