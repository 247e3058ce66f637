"""What the tests of several processes share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

FOLDER = Path(__file__).resolve().parent
SOURCE = FOLDER.parents[1] / "src"

Told = tuple[list[dict[str, Any]], dict[str, torch.Tensor]]


def environment(**more: str) -> dict[str, str]:
    """The environment of the processes: this source, no place of an outer torchrun."""
    paths = os.pathsep.join([str(SOURCE), os.environ.get("PYTHONPATH", "")])
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return {**kept, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error::UserWarning", **more}


def torchrun(num_ranks: int, *words: str) -> list[str]:
    """The command of torchrun on this machine."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}", *words]


def work(folder: Path, jobs: Sequence[dict[str, Any]], *, num_ranks: int) -> list[tuple[Told, dict[str, Any]]]:
    """Run jobs in `num_ranks` processes; return each one's (events, adapter) and facts of its weights."""
    path = folder / "jobs.json"
    path.write_text(json.dumps(list(jobs)))
    command = torchrun(num_ranks, str(FOLDER / "worker.py"), str(path))
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found = []
    for number in range(len(jobs)):
        told = json.loads((folder / f"{num_ranks}-{number}.json").read_text())
        adapter = load_file(folder / f"{num_ranks}-{number}.safetensors")
        found.append(((told["events"], adapter), told["facts"]))
    return found


def apart(one: Told, other: Told) -> dict[str, float]:
    """The largest relative difference of losses, grad norms and held-out losses, and of the adapters by norm."""
    figures: dict[str, float] = {}
    for kind, name in (("step", "loss"), ("step", "grad_norm"), ("eval", "eval_loss")):
        pairs = zip(*([e[name] for e in told[0] if e["kind"] == kind] for told in (one, other)), strict=True)
        figures[name] = max((abs(a / b - 1) for a, b in pairs), default=0.0)
    difference = torch.cat([(one[1][name] - other[1][name]).flatten() for name in one[1]])
    whole = torch.cat([tensor.flatten() for tensor in other[1].values()])
    assert one[1].keys() == other[1].keys()
    return figures | {"adapter": float(difference.norm() / whole.norm())}
