"""What a run leaves in its folder: its start, its checkpoints, its adapter, its end."""

from __future__ import annotations

import datetime
import importlib.metadata
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from truetune import checkpoint, identity
from truetune.config import Settings, dump
from truetune.data.prepare import hash_files
from truetune.data.template import TEMPLATE_FILE
from truetune.errors import Stopped, TruetuneError
from truetune.loop import Event
from truetune.preflight import Preflight
from truetune.rundir import RunDir, to_json, write_atomic

PACKAGES = ("truetune", "torch", "transformers", "peft", "accelerate", "tokenizers", "safetensors")


def write_start(run: RunDir, settings: Settings, *, flight: Preflight) -> None:
    """Make the run's folder: configuration, data, and what runs."""
    prepared = flight.prepared
    run.create()
    # First of all files: a folder with run.json can be resumed, whatever else a kill prevents.
    run.write_info(**_info(run, settings, flight))
    run.append({"kind": "state", "state": "running", "time": _now()})
    write_atomic(run.config, dump(settings.config))
    prepared.train.write(run.data / "train.arrow")
    prepared.held_out.write(run.data / "eval.arrow")
    refused = [{"where": row.where, "reason": row.reason, "fix": row.fix} for row in prepared.report.refused]
    write_atomic(run.data / "refused.jsonl", "".join(to_json(row) + "\n" for row in refused))


def _info(run: RunDir, settings: Settings, flight: Preflight) -> dict[str, Any]:
    """Return what run.json says at the start: what runs, on what, and the hashes of all of it."""
    return {
        "state": "running",
        "started": run.read_info()["started"] if run.is_run else _now(),
        "date": flight.renderer.date or datetime.date.today().isoformat(),
        "model": settings.config.model,
        "data": settings.config.data,
        "seed": settings.config.seed,
        "steps": flight.prepared.report.steps,
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "base_fingerprint": flight.base.fingerprint,
        "data_sha256": flight.prepared.data_hash,
        "template_sha256": flight.renderer.template_hash,
        "code_sha256": hash_files(sorted(Path(__file__).parent.rglob("*.py"))),
    }


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


@contextmanager
def recorded_state(run: RunDir) -> Iterator[None]:
    """Write into run.json how what is done inside ended."""
    state, problem = "failed", ""
    try:
        yield
        state = "done"
    except TruetuneError as error:
        state, problem = "stopped" if isinstance(error, Stopped) else "failed", str(error)
        raise
    except KeyboardInterrupt:
        # The second Ctrl-C ends at once; the checkpoints before it stand.
        state = "stopped"
        raise
    finally:
        run.write_info(state=state, error=problem or None)
        run.append({"kind": "state", "state": state, "time": _now()})


def record(run: RunDir, event: Event) -> None:
    """Append an event, and the row ids of a step, to the run's files."""
    if "row_ids" in event:
        run.append_step_rows(event["step"], event["row_ids"])
    run.append({key: value for key, value in event.items() if key != "row_ids"})


def save_checkpoint(
    step: int, *, run: RunDir, state: checkpoint.State, flight: Preflight, save_total_limit: int
) -> None:
    """Write the checkpoint of a step, then remove the oldest."""
    write_extra = partial(_write_use, flight=flight)
    checkpoint.save(run.checkpoints, step, state=state, write_extra=write_extra)
    checkpoint.prune(run.checkpoints, save_total_limit)


def _write_use(folder: Path, *, flight: Preflight) -> None:
    """Write beside an adapter what its use needs: template, probes."""
    (folder / TEMPLATE_FILE).write_text(flight.renderer.chat_template, encoding="utf-8")
    rows = [*flight.prepared.held_out[: identity.NUM_PROBES], *flight.prepared.train[: identity.NUM_PROBES]]
    prompts = [row.prompt for row in rows if row.prompt]
    identity.write(folder, flight.renderer, prompts=prompts, base=flight.base.reference())


def write_adapter(run: RunDir, state: checkpoint.State, *, flight: Preflight) -> None:
    """Write adapter/, the result: PEFT's files, tokenizer, template, probes, card."""
    run.adapter.mkdir(exist_ok=True)
    checkpoint.save_adapter(state.model, run.adapter, base=state.base)
    flight.renderer.save_tokenizer(run.adapter)
    _write_use(run.adapter, flight=flight)
    card = {
        "base_model": state.base["name"],
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "sft"],
    }
    head = "".join(f"{key}: {to_json(value)}\n" for key, value in card.items())
    body = f"# {run.path.name}\n\nA LoRA adapter trained with Truetune. What was trained is in truetune.json.\n"
    write_atomic(run.adapter / "README.md", f"---\n{head}---\n\n{body}")
