"""What saving costs: the demo's training with a checkpoint every 20 steps, and how much of it went into saves.

    python -m bench.saving              about a minute

All that a run does to survive is counted: the rehearsal, each checkpoint (staged, synced, hashed, renamed), pruning,
and the result.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.recipe import RESULTS
from bench.report import describe_machine

SAVE_STEPS = 20
PARTS = ("rehearse", "save", "write_result")


def measure(folder: Path) -> dict[str, list[float]]:
    """Run the demo's training in `folder`; return the seconds of each call of each part, and of the whole."""
    from truetune.commands.demo import demo_settings
    from truetune.console import Console
    from truetune.output import Saver
    from truetune.rundir import RunDir
    from truetune.training import train

    seconds: dict[str, list[float]] = {part: [] for part in PARTS}

    def timed(part: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*rest: Any, **more: Any) -> Any:
            began = time.perf_counter()
            result = real(*rest, **more)
            seconds[part].append(time.perf_counter() - began)
            return result

        return call

    for part in PARTS:
        setattr(Saver, part, timed(part, getattr(Saver, part)))
    settings = demo_settings(output_dir=str(folder / "run")).with_chosen(save_steps=SAVE_STEPS)
    train(settings, Console(quiet=True))
    events = list(RunDir(folder / "run").read_events())
    return seconds | {"training": [event["seconds"] for event in events if event["kind"] in ("step", "eval")]}


def main() -> None:
    """Measure, print the table and write it."""
    with tempfile.TemporaryDirectory() as folder:
        seconds = measure(Path(folder))
    training = sum(seconds.pop("training"))
    saving = sum(map(sum, seconds.values()))
    machine = describe_machine()
    lines = [
        "# What saving costs",
        "",
        f"{machine['date']}, {machine['processor']}, {machine['cores']} cores. The demo's training, a checkpoint every "
        f"{SAVE_STEPS} steps and at each better evaluation.",
        "",
        "| part | times | seconds |",
        "|---|---|---|",
        *(f"| {part} | {len(times)} | {sum(times):.2f} |" for part, times in seconds.items()),
        f"| all of it beside {training:.1f} s of steps and evaluations | | {saving:.2f} ({saving / training:.1%}) |",
    ]
    text = "\n".join(lines) + "\n"
    sys.stdout.write(text)
    (RESULTS / "saving.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
