"""Talking to a run: `truetune serve RUN` as a process of its own, started at the first question and asked from here."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil

from truetune.disk import to_json, write_atomic
from truetune.errors import MachineError, TruetuneError, UserError
from truetune.rundir import RunDir
from truetune.studio.fields import fault
from truetune.studio.places import Places
from truetune.studio.rows import Stores, token_texts

BASE, TUNED = "base", "tuned"
ROLES = ("system", "user", "assistant")
POLL_S, READY_S, WAIT_S = 0.25, 600.0, 5.0
"""How often a server that loads is asked, how long it may take, and how long it may take to end."""
ANSWER_S = 600.0
PASSED_ON = ("temperature", "top_p", "max_tokens", "seed", "stop")


class Talk:
    """One server at a time, for the run that was asked last; it is found again by a studio that was killed."""

    def __init__(self, places: Places, stores: Stores) -> None:
        self._places, self._stores = places, stores
        self._lock = asyncio.Lock()
        self._record = places.home / "runs" / ".jobs" / "talk.json"
        self._log = places.home / "runs" / ".jobs" / "talk.log"
        self._child: subprocess.Popen[bytes] | None = None

    async def stream(self, run: RunDir, ask: dict[str, Any], *, lang: str) -> AsyncIterator[bytes]:
        """Yield server-sent events: {"status": "loading"} while the model loads, then chunks as OpenAI's, [DONE]."""
        messages = checked(ask.get("messages"))
        loading = asyncio.ensure_future(self._ready(run))
        while not loading.done():
            yield _event({"status": "loading"})
            await asyncio.wait([loading], timeout=1.0)
        try:
            url, names = loading.result()
        except TruetuneError as error:
            yield _event({"error": fault(error, lang)})
            return
        if ask.get("side") == BASE and len(names) == 1:
            # Of full fine-tuning, only the result is served.
            problem = UserError("studio_no_base", where=run.path.name, fix="studio_no_base", name=run.path.name)
            yield _event({"error": fault(problem, lang)})
            return
        passed = {key: ask[key] for key in PASSED_ON if ask.get(key) is not None}
        model = names[-1] if ask.get("side") == BASE else names[0]
        body = {"model": model, "messages": messages, "stream": True, **passed}
        async with (
            httpx.AsyncClient(timeout=ANSWER_S) as client,
            client.stream("POST", f"{url}/v1/chat/completions", json=body) as response,
        ):
            if response.status_code != httpx.codes.OK:
                yield _event(json.loads(await response.aread()))
                return
            async for piece in response.aiter_raw():
                yield piece

    async def ids(self, run: RunDir, messages: Any) -> dict[str, Any]:
        """Return the ids that the server makes of messages, and the text of each."""
        asked = checked(messages)
        url, names = await self._ready(run)
        async with httpx.AsyncClient(timeout=ANSWER_S) as client:
            response = await client.post(f"{url}/tokenize", json={"model": names[0], "messages": asked})
        told = response.json()
        if response.status_code != httpx.codes.OK:
            raise UserError("studio_refused", where=run.path.name, fix="studio_refused", told=told["error"]["message"])
        ids: list[int] = told["tokens"]
        return {"ids": ids, "texts": token_texts(ids, self._stores.tokenizer(run.data))}

    def save(self, messages: Any, path: str | None) -> Path:
        """Append a row to a file of rows, `saved.jsonl` in the home folder if none is named; return the file.

        Raises: UserError if it is no conversation that ends with an answer, or no .jsonl file inside the roots.
        """
        asked = checked(messages)
        target = self._places.inside(path or "saved.jsonl")
        if asked[-1]["role"] != "assistant" or not asked[-1]["content"].strip() or target.suffix != ".jsonl":
            raise UserError("studio_row", where=str(target), fix="studio_row")
        line = (to_json({"messages": asked}) + "\n").encode()
        with target.open("ab", buffering=0) as file:
            # One write, and whole lines before it: a row is there or not.
            file.write(line if _ends_line(target) else b"\n" + line)
            os.fsync(file.fileno())
        return target

    async def close(self) -> None:
        """End the server."""
        await asyncio.to_thread(self._end, self._known())

    async def _ready(self, run: RunDir) -> tuple[str, list[str]]:
        """Return where the server of a run is, and the names of its models, the base's last; start it if need be."""
        async with self._lock:
            known = self._known()
            if known is None or known["run"] != str(run.path) or known["step"] != run.result_step:
                await asyncio.to_thread(self._end, known)
                known = await asyncio.to_thread(self._start, run)
            url = f"http://127.0.0.1:{known['port']}"
            began = time.monotonic()
            async with httpx.AsyncClient(timeout=WAIT_S) as client:
                while time.monotonic() - began < READY_S:
                    try:
                        models = (await client.get(f"{url}/v1/models")).json()["data"]
                        return url, [model["id"] for model in models]
                    except httpx.TransportError:
                        if self._known() is None:
                            break
                        await asyncio.sleep(POLL_S)
        told = " ".join(self._log.read_text(encoding="utf-8", errors="replace").split())[-500:]
        raise MachineError("studio_serve", where=run.path.name, fix="studio_serve", told=told)

    def _start(self, run: RunDir) -> dict[str, Any]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._record.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("wb") as output:
            self._child = subprocess.Popen(
                [sys.executable, "-u", "-P", "-m", "truetune", "serve", str(run.path), "--port", str(port)],
                cwd=self._places.home,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        known = {
            "run": str(run.path),
            "step": run.result_step,
            "port": port,
            "pid": self._child.pid,
            "pid_started": psutil.Process(self._child.pid).create_time(),
        }
        write_atomic(self._record, to_json(known) + "\n")
        return known

    def _known(self) -> dict[str, Any] | None:
        """Return the server that was started, by this studio or an earlier one, if it lives."""
        if self._child is not None and self._child.poll() is not None:
            self._child = None
            return None
        try:
            known: dict[str, Any] = json.loads(self._record.read_text(encoding="utf-8"))
            process = psutil.Process(known["pid"])
            is_same = process.create_time() == known["pid_started"] and process.status() != psutil.STATUS_ZOMBIE
        except (OSError, ValueError, LookupError, psutil.Error):
            return None
        return known if is_same else None

    def _end(self, known: dict[str, Any] | None) -> None:
        if known is None:
            return
        try:
            process = psutil.Process(known["pid"])
            process.send_signal(signal.SIGTERM)
            if self._child is not None and self._child.pid == known["pid"]:
                self._child.wait(WAIT_S)
            else:
                process.wait(WAIT_S)
        except (psutil.TimeoutExpired, subprocess.TimeoutExpired):
            os.kill(known["pid"], signal.SIGKILL)
        except psutil.NoSuchProcess:
            self._child = None
        self._record.unlink(missing_ok=True)


def checked(messages: Any) -> list[dict[str, str]]:
    """Return messages of role and text.

    Raises: UserError if they are something else.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise UserError("studio_messages", where="messages", fix="studio_messages")
    for message in messages:
        is_one = isinstance(message, dict) and set(message) == {"role", "content"}
        if not is_one or message["role"] not in ROLES or not isinstance(message["content"], str):
            raise UserError("studio_messages", where="messages", fix="studio_messages")
    return list(messages)


def _ends_line(path: Path) -> bool:
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return True
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def _event(value: Any) -> bytes:
    return f"data: {to_json(value)}\n\n".encode()
