"""Events as columns, against a plain reading of the same file; curves that keep their extremes."""

from __future__ import annotations

import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from truetune.rundir import RunDir
from truetune.studio.series import COLUMNS, KEYS, EventLog, thinned


def step_event(step: int, loss: float | None = None) -> dict[str, Any]:
    """An event as training writes it."""
    draw = random.Random(step)
    values = {name: draw.choice([draw.random(), draw.randint(0, 9), 1e-9 * draw.random()]) for name in COLUMNS}
    return {
        "kind": "step",
        "step": step,
        **values,
        "loss": loss or draw.random() + 1,
        "gpu_percent": None,
        "seconds": 2,
    }


def plain(path: Path, name: str) -> list[float]:
    """A column of the steps, read line by line."""
    steps = [event for event in RunDir(path.parent).read_events() if event["kind"] == "step"]
    return [math.nan if event.get(name) is None else float(event[name]) for event in steps]


def test_columns_are_what_the_lines_say_while_they_are_written(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    log = EventLog(run.events)
    assert len(log.refresh().column("step")) == 0
    for step in range(1, 60):
        run.append(step_event(step))
        if step % 7 == 0:
            run.append({"kind": "eval", "step": step, "eval_loss": 1 / step})
        if step % 5 == 0:
            log.refresh()
    # A line that is half written, then whole.
    line = json.dumps(step_event(60)) + "\n"
    for part in (line[:40], line[40:]):
        with run.events.open("a") as file:
            file.write(part)
        log.refresh()
    for name in ("step", *COLUMNS):
        assert np.array_equal(log.column(name), plain(run.events, name), equal_nan=True), name
    assert len(log.column("step")) == 60
    assert [event["eval_loss"] for event in log.others] == [1 / step for step in range(7, 60, 7)]
    assert np.array_equal(log.column("rows_per_s"), np.array(plain(run.events, "rows")) / 2)


def test_a_resume_that_cuts_the_file_is_seen(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    log = EventLog(run.events)
    for step in range(1, 10):
        run.append(step_event(step))
    log.refresh()
    run.cut_back(4)
    for step in range(5, 30):
        run.append(step_event(step, loss=50.0 + step))
    assert log.refresh().column("loss").tolist() == plain(run.events, "loss")
    assert log.column("step").tolist() == list(range(1, 30))


def test_a_line_that_a_kill_cut_is_left_out(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    for step in range(1, 5):
        run.append(step_event(step))
    with run.events.open("a") as file:
        file.write('{"kind": "step", "step": 5, "lo\n')
    run.append(step_event(6))
    assert EventLog(run.events).refresh().column("step").tolist() == [1, 2, 3, 4, 6]


@pytest.mark.parametrize("size", [1, 2, 5, 1999, 2001, 50_000])
@pytest.mark.parametrize("num_curves", [1, 4])
def test_no_extreme_is_lost(size: int, num_curves: int) -> None:
    draw = np.random.default_rng(size)
    curves = [draw.normal(size=size) for _ in range(num_curves)]
    spikes = draw.choice(size, min(20, size), replace=False)
    for at, spike in enumerate(spikes):
        curves[at % num_curves][spike] = 100 + at if at % 2 else -100 - at
    curves[-1][draw.choice(size, size // 3, replace=False)] = np.nan
    chosen = thinned(curves, 2000)
    assert len(chosen) <= 2002
    assert {0, size - 1} <= set(chosen.tolist())
    assert np.all(np.diff(chosen) > 0)
    for values in curves:
        if not np.isnan(values).all():
            assert np.nanmax(values[chosen]) == np.nanmax(values)
            assert np.nanmin(values[chosen]) == np.nanmin(values)
    # Every stretch of the curve, not only the whole of it.
    if size > 2000:
        num_stretches = 2000 // (2 * num_curves)
        bounds = np.linspace(0, size, num_stretches + 1).astype(int)
        for start, stop in itertools.pairwise(bounds):
            inside = chosen[(chosen >= start) & (chosen < stop)]
            assert curves[0][inside].max() == curves[0][start:stop].max() or num_curves == 1


def test_keys_are_those_that_training_writes(home: Path) -> None:
    event = next(event for event in RunDir(home / "runs" / "one").read_events() if event["kind"] == "step")
    of_preferences = {"rewards_chosen", "rewards_rejected", "reward_accuracy", "reward_margin"}
    assert set(COLUMNS) - of_preferences == set(event) - {"kind", "step"}
    assert of_preferences < set(COLUMNS)
    assert len(KEYS) == len(COLUMNS) + 2
    line = (home / "runs" / "one" / "events.jsonl").read_bytes().split(b"\n")
    assert sum(some.startswith(b'{"kind": "step"') for some in line) == 6
