"""What a run leaves in its folder: its start, its checkpoints, its adapter, its end."""

from __future__ import annotations

import datetime
import importlib.metadata
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from truetune import checkpoint, identity
from truetune.config import Settings, dump
from truetune.data.prepare import write_rows
from truetune.data.template import TEMPLATE_FILE
from truetune.errors import Stopped, TruetuneError
from truetune.loop import Event
from truetune.preflight import Preflight
from truetune.rundir import RunDir, to_json, write_atomic

PACKAGES = ("truetune", "torch", "transformers", "peft", "accelerate", "tokenizers", "safetensors")


def write_start(run: RunDir, settings: Settings, *, flight: Preflight) -> None:
    """Make the run's folder: configuration, data, and what runs."""
    run.create()
    write_atomic(run.config, dump(settings.config))
    prepared = flight.prepared
    write_rows(run.data / "train.arrow", prepared.train)
    write_rows(run.data / "eval.arrow", prepared.held_out)
    refused = [{"where": row.where, "reason": row.reason, "fix": row.fix} for row in prepared.report.refused]
    write_atomic(run.data / "refused.jsonl", "".join(to_json(row) + "\n" for row in refused))
    run.write_info(
        state="running",
        started=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        date=datetime.date.today().isoformat() if flight.renderer.date is None else flight.renderer.date,
        model=settings.config.model,
        data=settings.config.data,
        seed=settings.config.seed,
        steps=prepared.report.steps,
        versions={name: importlib.metadata.version(name) for name in PACKAGES},
        base_fingerprint=flight.base.fingerprint,
        data_sha256=prepared.data_hash,
        template_sha256=flight.renderer.template_hash,
    )


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
    finally:
        run.write_info(state=state, error=problem or None)


def record(run: RunDir, event: Event) -> None:
    """Append an event, and the row ids of a step, to the run's files."""
    if "row_ids" in event:
        run.append_step_rows(event["step"], event["row_ids"])
    run.append({key: value for key, value in event.items() if key != "row_ids"})


def save_checkpoint(
    step: int, *, run: RunDir, state: checkpoint.State, flight: Preflight, save_total_limit: int
) -> None:
    """Write the checkpoint of a step, then remove the oldest."""
    write_extra = partial(_write_use, flight=flight, base_name=state.identity["base"])
    checkpoint.save(run.checkpoints, step, state=state, write_extra=write_extra)
    checkpoint.prune(run.checkpoints, save_total_limit)


def _write_use(folder: Path, *, flight: Preflight, base_name: str) -> None:
    """Write beside an adapter what its use needs: template, probes."""
    (folder / TEMPLATE_FILE).write_text(flight.renderer.chat_template, encoding="utf-8")
    rows = [*flight.prepared.held_out[: identity.NUM_PROBES], *flight.prepared.train[: identity.NUM_PROBES]]
    base = {"name": base_name, "fingerprint": flight.base.fingerprint}
    identity.write(folder, flight.renderer, prompts=[row.prompt for row in rows], base=base)


def write_adapter(run: RunDir, state: checkpoint.State, *, flight: Preflight) -> None:
    """Write adapter/, the result: PEFT's files, tokenizer, template, probes, card."""
    base_name = state.identity["base"]
    run.adapter.mkdir(exist_ok=True)
    checkpoint.save_adapter(state.model, run.adapter, base_name=base_name)
    flight.renderer.save_tokenizer(run.adapter)
    _write_use(run.adapter, flight=flight, base_name=base_name)
    card = {"base_model": base_name, "library_name": "peft", "pipeline_tag": "text-generation", "tags": ["lora", "sft"]}
    head = "".join(f"{key}: {to_json(value)}\n" for key, value in card.items())
    body = f"# {run.path.name}\n\nA LoRA adapter trained with Truetune. What was trained is in truetune.json.\n"
    write_atomic(run.adapter / "README.md", f"---\n{head}---\n\n{body}")
