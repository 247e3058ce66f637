"""What a run leaves in its folder: its start, its checkpoints, its result, its end."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from truetune import checkpoint, identity
from truetune.config import Settings, dump
from truetune.data.feed import Feed
from truetune.data.prepare import hash_files
from truetune.data.report import as_refusal
from truetune.data.template import TEMPLATE_FILE
from truetune.disk import damage, read_manifest, staged, to_json, write_atomic
from truetune.errors import RowError, Stopped, TruetuneError
from truetune.loop import Event
from truetune.preflight import Preflight
from truetune.rundir import RunDir


def write_start(run: RunDir, settings: Settings, *, flight: Preflight, result: str) -> None:
    """Make the run's folder: configuration, data, and what runs. `result`: the name of the result's folder."""
    prepared = flight.prepared
    # First of all: a folder with run.json can be resumed, whatever else a kill prevents.
    run.write_info(**_info(run, settings, flight), result=result)
    run.create()
    run.append({"kind": "state", "state": "running", "time": _now()})
    write_atomic(run.config, dump(settings.config))
    if damage(run.data) is None and read_manifest(run.data)["data"] == prepared.data_hash:
        return
    write_data(run.data, flight, max_length=settings.config.max_length)


def write_data(target: Path, flight: Preflight, *, max_length: int) -> None:
    """Write the prepared rows as a folder; its manifest says where the tokenizer lies that can read them."""
    prepared, tokenizer = flight.prepared, (flight.base.folder / "tokenizer.json").absolute()
    with staged(target, data=prepared.data_hash, tokenizer=str(tokenizer), max_length=max_length) as folder:
        prepared.train.write(folder / "train.arrow")
        prepared.held_out.write(folder / "eval.arrow")
        refused = [{"where": row.where, "reason": row.reason, "fix": row.fix} for row in prepared.report.refused]
        write_atomic(folder / "refused.jsonl", "".join(to_json(row) + "\n" for row in refused))
        with (folder / "duplicates.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(f"{to_json(dataclasses.asdict(group))}\n" for group in prepared.duplicates())
        if not tokenizer.is_file():
            flight.renderer.save_tokenizer(folder)


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
        "versions": checkpoint.versions(),
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
    except OSError as error:
        problem = str(error)
        raise
    except KeyboardInterrupt:
        # The second Ctrl-C ends at once; the checkpoints before it stand.
        state = "stopped"
        raise
    finally:
        # On a full disk the fault itself is what matters; a run whose state still says "running" is resumed as well.
        with suppress(OSError) if state != "done" else nullcontext():
            run.append({"kind": "state", "state": state, "time": _now()})
            run.sync_lines()
            run.write_info(state=state, error=problem or None)


def record(run: RunDir, event: Event) -> None:
    """Append an event, and the row ids of a step, to the run's files."""
    if "row_ids" in event:
        run.append_step_rows(event["step"], event["row_ids"], places=event.get("row_places"))
    # Those of a step stand in steps.jsonl.
    is_step = event["kind"] == "step"
    run.append({key: value for key, value in event.items() if not (is_step and key.startswith("row_"))})


def keep_refused(run: RunDir, feed: Feed, *, lang: str, tell: Callable[[int], None]) -> None:
    """Have what is left out of a stream written into the run's folder. `tell`: told how many that are so far."""

    count = sum(1 for _ in run.read_refused())

    def keep(step: int, rows: Sequence[RowError]) -> None:
        nonlocal count
        run.append_refused(step, [as_refusal(row, lang) for row in rows])
        count += len(rows)
        tell(count)

    feed.on_left_out = keep


@dataclass(frozen=True)
class Saver:
    """Writes what a run must not lose: checkpoints, and from one of them the result."""

    run: RunDir
    state: checkpoint.State
    flight: Preflight
    save_total_limit: int
    loss: str = "sft"

    def rehearse(self) -> None:
        """Find out before step 1 whether checkpoints can be written."""
        checkpoint.rehearse(self.run.checkpoints, state=self.state, write_extra=self._write_use)

    def save(self, step: int, *, best: int | None) -> None:
        """Write the checkpoint of a step, then remove the oldest; the one of step `best` stays."""
        self.run.sync_lines()
        checkpoint.save(self.run.checkpoints, step, state=self.state, write_extra=self._write_use)
        checkpoint.prune(self.run.checkpoints, keep=self.save_total_limit, best=best)

    def write_result(self, *, best: int | None) -> Path | None:
        """Make the result of the checkpoint of step `best`, else of the newest; return that checkpoint.

        Weights, tokenizer, template, probes and card.
        """
        chosen, _ = checkpoint.find(self.run.checkpoints)
        wanted = checkpoint.path_of(self.run.checkpoints, best or 0)
        if checkpoint.broken_file(wanted) is None:
            chosen = wanted
        if chosen is None:
            return None
        trained = self.state.trained
        with staged(self.run.path / trained.place, step=checkpoint.step_of(chosen)) as folder:
            trained.write_result(chosen, folder, left_out=checkpoint.OF_THE_RUN)
            self.flight.renderer.save_tokenizer(folder)
            _write_card(
                folder, base=self.state.base["name"], name=self.run.path.name, place=trained.place, loss=self.loss
            )
        return chosen

    def _write_use(self, folder: Path) -> None:
        """Write beside weights what their use needs: template, probes; beside whole models also what a base brings."""
        prepared, renderer = self.flight.prepared, self.flight.renderer
        if self.state.trained.place == "model":
            renderer.save_tokenizer(folder)
            identity.write_ending(folder, renderer)
        (folder / TEMPLATE_FILE).write_text(renderer.chat_template, encoding="utf-8")
        rows = [*prepared.held_out[: identity.NUM_PROBES], *prepared.train[: identity.NUM_PROBES]]
        prompts = [row.prompt for row in rows if row.prompt]
        identity.write(folder, renderer, prompts=prompts, base=self.flight.base.reference())


CARDS = {
    "adapter": ("peft", "lora", "A LoRA adapter"),
    "model": ("transformers", "full-fine-tuning", "A model of which all weights were"),
}
"""What the model card says of each kind of result: library, tag, the beginning of its sentence."""


def _write_card(folder: Path, *, base: str, name: str, place: str, loss: str) -> None:
    library, tag, begin = CARDS[place]
    card = {
        "base_model": base,
        "library_name": library,
        "pipeline_tag": "text-generation",
        "tags": [tag, loss],
    }
    head = "".join(f"{key}: {to_json(value)}\n" for key, value in card.items())
    body = f"# {name}\n\n{begin} trained with Truetune. What was trained is in truetune.json.\n"
    write_atomic(folder / "README.md", f"---\n{head}---\n\n{body}")
