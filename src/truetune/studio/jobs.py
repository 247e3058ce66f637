"""Commands that the page starts: processes in sessions of their own, found again by a studio that was killed.

runs/.jobs/ID/
  job.json      what runs: command, words, process       exit     its exit code, written when it ended
  output.log    all that it prints                       report.json, store/   what a check leaves
"""

from __future__ import annotations

import datetime
import json
import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import psutil

from truetune.cli import Program
from truetune.disk import to_json, write_atomic
from truetune.errors import UserError
from truetune.rundir import next_run_path
from truetune.studio.places import Places

COMMANDS = ("check", "train", "eval", "compare", "verify", "merge", "export")
PATHS = {
    *("data", "eval_data", "output_dir", "config_file", "json_file", "html_file", "store"),
    *("path", "run", "answers_file", "output"),
}
"""Parameters that name files; only `model` may lie outside the roots, and is only read."""
MAX_WORDS, MAX_WORD_CHARACTERS = 500, 20_000
MAX_JOBS, TAIL_BYTES, TAIL_LINES = 30, 1 << 16, 300
STOPPED = (130, 143)
_ID = re.compile(r"\d{8}-\d{6}-[0-9a-f]{6}")


class Jobs:
    """The jobs of a home folder."""

    def __init__(self, places: Places) -> None:
        self._places = places
        self.folder = places.home / "runs" / ".jobs"
        self._children: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, command: str, words: Sequence[str], *, lang: str) -> dict[str, Any]:
        """Start a command and return its job.

        Raises: UserError if there is no such command, its words are wrong, or one names a file outside the roots.
        """
        asked = self._parsed(command, words, lang)
        self._prune()
        name = f"{datetime.datetime.now(datetime.UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"
        folder = self.folder / name
        folder.mkdir(parents=True)
        added, facts = self._added(command, asked, folder)
        whole = [command, *added, *words]
        with (folder / "output.log").open("wb") as output:
            python = [sys.executable, "-u", "-P", "-m"]
            child = subprocess.Popen(
                [*python, "truetune.studio.keeper", str(folder / "exit"), *python, "truetune", "--lang", lang, *whole],
                cwd=self._places.home,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._children[name] = child
        job = {
            "id": name,
            "command": command,
            "words": list(words),
            "shown": shlex.join(["truetune", *whole]),
            "model": asked.get("model"),
            "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "pid": child.pid,
            "pid_started": _started(child.pid),
            **facts,
        }
        write_atomic(folder / "job.json", to_json(job, indent=2) + "\n")
        return self.told(name)

    def listed(self) -> list[dict[str, Any]]:
        """Return the jobs, oldest first, without output and result."""
        return [self._told(folder) for folder in self._folders()]

    def told(self, name: str) -> dict[str, Any]:
        """Return a job, with the end of its output and, of a check, its report.

        Raises: UserError if there is none of that id.
        """
        folder = self._folder(name)
        return self._told(folder) | {"output": _tail(folder / "output.log"), "result": _read(folder / "report.json")}

    def stop(self, name: str) -> None:
        """Send SIGINT to the command: training finishes its step and saves; a second one ends it at once."""
        job = self.told(name)
        if job["state"] != "running":
            raise UserError("studio_not_running", where=name, fix="studio_not_running")
        os.killpg(job["pid"], signal.SIGINT)

    def models(self) -> list[str]:
        """Return the models that jobs were given, the newest first."""
        return [job["model"] for job in reversed(self.listed()) if job.get("model")]

    def _parsed(self, command: str, words: Sequence[str], lang: str) -> dict[str, Any]:
        """Return what the command itself makes of its words."""
        if command not in COMMANDS:
            raise UserError("studio_command", where=command, fix="studio_command", known=", ".join(COMMANDS))
        if len(words) > MAX_WORDS or any("\0" in word or len(word) > MAX_WORD_CHARACTERS for word in words):
            raise UserError("studio_words", where=command, fix="studio_words")
        program = Program(lang)
        above = click.Context(program, **program.context_settings)
        found = program.get_command(above, command)
        # The command line moves its own options to the front: words would mean another thing there than here.
        if found is None or any(word.startswith(("-h", "--help", "--lang", "--debug")) for word in words):
            raise UserError("studio_words", where=command, fix="studio_words")
        try:
            values = dict(found.make_context(command, list(words), parent=above).params)
        except click.UsageError as error:
            problem = {"problem": error.format_message(), "command": f"truetune {command}"}
            raise UserError("usage", where=f"truetune {command}", fix="usage", **problem) from None
        for key in PATHS & set(values):
            given = values[key] or ()
            for value in [given] if isinstance(given, str) else given:
                for path in value.split(",") if key == "eval_data" else [value]:
                    self._places.inside(path.strip())
        return values

    def _added(self, command: str, asked: dict[str, Any], folder: Path) -> tuple[list[str], dict[str, Any]]:
        """Return the words that the studio adds, and what the job remembers because of them."""
        shown = folder.relative_to(self._places.home)
        report = ["--json", str(shown / "report.json")]
        if command == "check":
            return [*report, "--store", str(shown / "store")], {"store": str(folder / "store")}
        if command == "eval":
            return report, {}
        if command == "train" and not asked.get("output_dir") and not asked.get("config_file") and asked["data"]:
            taken = {job.get("run") for job in self.listed()}
            path = next_run_path(asked["data"][0], str(asked.get("model")), root=self._places.home / "runs")
            while path.name in taken:
                stem, _, number = path.name.rpartition("-")
                path = path.with_name(f"{stem}-{int(number) + 1:03d}")
            return ["--output-dir", str(path.relative_to(self._places.home))], {"run": path.name}
        if command == "train" and asked.get("output_dir"):
            return [], {"run": Path(asked["output_dir"]).name}
        return [], {}

    def _told(self, folder: Path) -> dict[str, Any]:
        job: dict[str, Any] = _read(folder / "job.json")
        code = _read(folder / "exit")
        child = self._children.get(folder.name)
        # Reaps it, if it ended.
        is_alive = child.poll() is None if child else _started(job["pid"]) == job["pid_started"]
        if code is None and not is_alive:
            # It may have ended between the two.
            code = _read(folder / "exit")
        if code is None:
            state = "running" if is_alive else "failed"
        elif code in STOPPED:
            state = "stopped"
        else:
            # A check that refuses rows ends with 2, and has its report.
            state = "done" if code == 0 or (folder / "report.json").is_file() else "failed"
        return job | {"state": state, "exit_code": code}

    def _folders(self) -> list[Path]:
        found = [path for path in self.folder.glob("*") if _ID.fullmatch(path.name) and (path / "job.json").is_file()]
        return sorted(found)

    def _folder(self, name: str) -> Path:
        if not _ID.fullmatch(name) or not (self.folder / name / "job.json").is_file():
            raise UserError("studio_missing", where=name, fix="studio_missing")
        return self.folder / name

    def _prune(self) -> None:
        """Remove the oldest jobs that have ended; the runs that they made stay."""
        for folder in self._folders()[:-MAX_JOBS]:
            if self._told(folder)["state"] != "running":
                shutil.rmtree(folder)
                self._children.pop(folder.name, None)


def _started(pid: int) -> float | None:
    """Return when a process began, which with its number names it for ever; None if it is gone."""
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.Error:
        return None


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _tail(path: Path) -> list[str]:
    """Return the last lines of a file."""
    with path.open("rb") as file:
        file.seek(max(file.seek(0, os.SEEK_END) - TAIL_BYTES, 0))
        return file.read().decode(errors="replace").splitlines()[-TAIL_LINES:]
