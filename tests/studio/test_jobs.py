"""Commands that the page starts: what is refused, what is found again, and what no kill takes away (F22)."""

from __future__ import annotations

import json
import os
import shlex
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from truetune.config import Config
from truetune.errors import UserError
from truetune.rundir import RunDir
from truetune.studio.jobs import COMMANDS, PATHS, Jobs
from truetune.studio.places import Places

REFUSED = [
    ("rm", ["-rf", "/"], "studio_command"),
    ("serve", ["x"], "studio_command"),
    ("studio", [], "studio_command"),
    ("check; rm", [], "studio_command"),
    ("../check", [], "studio_command"),
    ("check", ["--nope"], "usage"),
    ("check", ["--help"], "studio_words"),
    ("check", ["data.json", "--system", "--debug", "--model", "--html", "--system", "/tmp/x"], "studio_words"),
    ("check", ["data.json", "--lang", "zh"], "studio_words"),
    ("check", ["a\0b"], "studio_words"),
    ("check", ["x"] * 1000, "studio_words"),
    ("check", ["/etc/passwd", "--model", "m"], "studio_outside"),
    ("check", ["data.json", "../x.json", "--model", "m"], "studio_outside"),
    ("check", ["data.json", "--html", "/tmp/x.html"], "studio_outside"),
    ("check", ["data.json", "--html=/tmp/x.html"], "studio_outside"),
    ("check", ["data.json", "--store", "../x"], "studio_outside"),
    ("check", ["data.json", "--eval-data", "data.json,/etc/hosts"], "studio_outside"),
    ("check", ["data.json", "--config", "/etc/hosts"], "studio_outside"),
    ("train", ["data.json", "--output-dir", "/tmp/x"], "studio_outside"),
    ("train", ["data.json", "--output_dir=~/x"], "studio_outside"),
    ("train", ["--", "/etc/passwd"], "studio_outside"),
    ("merge", ["runs/one", "--output-dir", "/tmp/x"], "studio_outside"),
    ("merge", ["/root", "--output-dir", "x"], "studio_outside"),
    ("export", ["runs/one", "--to", "gguf", "--output", "/tmp/x"], "studio_outside"),
    ("eval", ["/root", "data.json"], "studio_outside"),
    ("eval", ["runs/one", "data.json", "--answers", "/tmp/x"], "studio_outside"),
]


@pytest.mark.parametrize(("command", "words", "key"), REFUSED)
def test_what_is_refused_starts_nothing(command: str, words: list[str], key: str, page: Any) -> None:
    before = page.get("jobs")
    status = 403 if key == "studio_outside" else 400
    assert page.post("jobs", {"command": command, "words": words}, status=status)["error"]["key"] == key
    assert page.get("jobs") == before


def test_every_parameter_that_names_a_file_is_known() -> None:
    """Of all commands that the page starts: what is no path is listed here, so that a new one is thought about."""
    import click

    from truetune.cli import Program

    others = {*("resume", "allow_changed", "skip_bad", "show", "measure", "no_run_system", "max_new_tokens")}
    others |= {*("resume_exact", "to", "quantize", "repo", "dry_run", "questions", "dtype")}
    program = Program("en")
    found = set()
    for name in COMMANDS:
        command = program.get_command(click.Context(program), name)
        assert command is not None
        found |= {str(param.name) for param in command.params}
    keys = set(Config.model_fields) - {"data", "eval_data", "output_dir"}
    assert found - keys - others == PATHS


@pytest.mark.parametrize("name", ["../one", "", "20260101-000000-abcdef", "x" * 500, "..%2f.."])
def test_only_jobs_are_found(name: str, page: Any) -> None:
    assert page.client.get(f"{page.url}api/jobs/{name}").status_code in (200 if not name else 404, 404, 405)
    with pytest.raises(UserError):
        page.studio.jobs.told(name)


@pytest.mark.slow
def test_a_check_is_a_report_and_rows(page: Any, tiny_qwen: Path, home: Path) -> None:
    rows = [*json.loads((home / "data.json").read_text()), {"instruction": "no answer"}]
    (home / "refused.json").write_text(json.dumps(rows), encoding="utf-8")
    job = page.post("jobs", {"command": "check", "words": ["refused.json", "--model", str(tiny_qwen)]})
    assert job["state"] == "running"
    assert job["shown"] == f"truetune {' '.join(map(shlex.quote, shlex.split(job['shown'])[1:]))}"
    job = page.job(job["id"])
    assert (job["state"], job["exit_code"]) == ("done", 2)
    assert (job["result"]["rows_read"], job["result"]["rows_refused"]) == (41, 1)
    assert page.get("refused", store=job["store"])["rows"][0]["where"].startswith("refused.json:")
    sides = [page.get("rows", store=job["store"], side=side)["total"] for side in ("train", "eval")]
    assert sum(sides) == 40
    assert not (Path(job["store"]) / "tokenizer.json").exists()
    # The command that is shown is the one that ran.
    assert "--store" in job["shown"]
    assert [one["id"] for one in page.get("jobs")][-1] == job["id"]


@pytest.mark.slow
@pytest.mark.long
def test_f22_no_kill_of_the_studio_takes_anything_away(process: Any, tiny_qwen: Path, home: Path) -> None:
    (process.home / "data.json").write_text((home / "data.json").read_text())
    page = process.start()
    words = ["data.json", "--model", str(tiny_qwen), "--attention", "padded", "--dtype", "float32", "--eval-split", "0"]
    words += ["--batch-size", "1", "--num-train-epochs", "40", "--sample-prompts", "none", "--save-steps", "50"]
    job = page.post("jobs", {"command": "train", "words": words})
    name, path = job["run"], process.home / "runs" / job["run"]
    events = RunDir(path)

    def steps() -> int:
        return sum(event["kind"] == "step" for event in events.read_events())

    wait(lambda: steps() > 20)
    process.kill()
    seen = steps()
    # Nobody looks, and the training goes on.
    wait(lambda: steps() > seen + 20)
    page = process.start()
    told = page.get(f"jobs/{job['id']}")
    assert (told["state"], told["run"]) == ("running", name)
    assert page.get(f"runs/{name}")["state"] == "running"
    assert page.get(f"runs/{name}/series")["step"][:20] == list(range(1, 21))
    # Stopped from the new page: the step ends, the state is saved.
    page.post(f"jobs/{job['id']}/stop")
    told = page.job(job["id"])
    assert (told["state"], told["exit_code"]) == ("stopped", 130)
    assert page.get(f"runs/{name}")["state"] == "stopped"
    stopped_at = page.get(f"runs/{name}")["steps"]
    # A training that is killed does not take the studio with it, and its state is seen.
    resumed = page.post("jobs", {"command": "train", "words": ["--resume", "--output-dir", str(path)]})
    assert resumed["run"] == name
    wait(lambda: steps() > stopped_at + 5)
    os.killpg(resumed["pid"], signal.SIGKILL)
    told = page.job(resumed["id"])
    assert (told["state"], told["exit_code"]) == ("failed", None)
    wait(lambda: page.get(f"runs/{name}")["state"] == "killed")
    # And it goes on from there, with each step once.
    again = page.post("jobs", {"command": "train", "words": ["--resume", "--output-dir", f"runs/{name}"]})
    wait(lambda: page.get(f"runs/{name}")["state"] == "running")
    page.post(f"runs/{name}/stop")
    assert page.job(again["id"])["state"] == "stopped"
    taken = [event["step"] for event in events.read_events() if event["kind"] == "step"]
    assert taken == list(range(1, len(taken) + 1))
    assert page.get(f"runs/{name}/series", points=20000)["step"] == taken


def wait(is_so: Any, timeout_s: float = 90) -> None:
    """Wait for something."""
    until = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_old_jobs_go_and_running_ones_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = Jobs(Places(tmp_path))
    monkeypatch.setattr("truetune.studio.jobs.MAX_JOBS", 3)
    for number in range(6):
        folder = jobs.folder / f"20260101-00000{number}-abcdef"
        folder.mkdir(parents=True)
        state = {"pid": os.getpid(), "pid_started": None if number else started(), "command": "train"}
        (folder / "job.json").write_text(json.dumps({"id": folder.name, **state}))
    (jobs.folder / "notes").mkdir()
    jobs._prune()
    assert [job["id"][14] for job in jobs.listed()] == ["0", "3", "4", "5"]
    assert [job["state"] for job in jobs.listed()] == ["running", "failed", "failed", "failed"]
    assert (jobs.folder / "notes").is_dir()


def started() -> float:
    """When this process began."""
    import psutil

    return psutil.Process().create_time()
