"""What ranks tell each other, and how all of them end when one does; without torchrun, rank 0 holds the store."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from truetune.ranks import ALONE, PeerLost, connected, watched

SOURCE = Path(__file__).resolve().parents[1] / "src"

SCRIPT = """
import json, os, sys, time
import torch
from truetune.errors import NumericsError, ToldElsewhere, TruetuneError, UserError
from truetune.ranks import connected

def talk(ranks):
    parts = [torch.nn.Parameter(part) for part in (torch.zeros(2, 2), torch.zeros(3), torch.ones(1))]
    parts[2].requires_grad_(False)
    if ranks.rank == 0:
        parts[0].grad = torch.arange(4.0).view(2, 2)
    parts[1].grad = torch.full((3,), 10.0 + ranks.rank)
    numbers = ranks.sum_gradients(parts, [1.0, 2.0 * ranks.rank])
    weight = torch.full((2,), float(ranks.rank))
    ranks.give([weight])
    order = []
    with ranks.in_turn():
        order.append(time.monotonic())
        time.sleep(0.2)
    return {
        "grads": [part.grad.tolist() for part in parts[:2]], "numbers": numbers, "weight": weight.tolist(),
        "sum": ranks.sum([1.0, 1e-9 * ranks.rank]), "most": ranks.most(ranks.rank), "least": ranks.least(ranks.rank),
        "told": ranks.tell({"a": [1, None, "\u8d70"]} if ranks.is_main else "mine"), "began": order[0],
        "hidden": "WORLD_SIZE" not in os.environ,
    }

case = sys.argv[1]
try:
    with connected() as ranks:
        found = talk(ranks) if case == "talk" else None
        if case == "user" and ranks.rank == 1:
            raise UserError("no_data", where="data", fix="no_data")
        if case == "numerics":
            raise NumericsError("held_out_not_finite", where="step 1", fix="held_out_not_finite", loss=0.0)
        if case == "killed" and ranks.rank == 1:
            os.kill(os.getpid(), 9)
        if case in ("user", "killed"):
            ranks.wait()
    told, code = found, 0
except TruetuneError as error:
    told, code = type(error).__name__, error.exit_code
print(json.dumps([told, code, os.environ["WORLD_SIZE"]]), flush=True)
"""


def run_two(case: str, **more: str) -> list[list[object] | int]:
    """Run the script in two processes; what each one printed, or the code that it died with."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = []
    for rank in range(2):
        own = {**os.environ, **common, **more, "RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": str(SOURCE)}
        words = [sys.executable, "-c", SCRIPT, case]
        processes.append(subprocess.Popen(words, env=own, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    found: list[list[object] | int] = []
    for process in processes:
        out, errors = process.communicate(timeout=120)
        assert "Traceback" not in errors, errors
        found.append(json.loads(out) if process.returncode == 0 else process.returncode)
    return found


@pytest.mark.slow
def test_what_ranks_tell_each_other() -> None:
    """Sums in place, zeros for a missing gradient, fp64 sums, rank 0's values, one after the other."""
    (one, two) = [found[0] for found in run_two("talk")]  # type: ignore[index]
    assert isinstance(one, dict)
    assert isinstance(two, dict)
    began = one.pop("began"), two.pop("began")
    assert one == two
    assert one == {
        "grads": [[[0.0, 1.0], [2.0, 3.0]], [21.0, 21.0, 21.0]],
        "numbers": [2.0, 2.0],
        "weight": [0.0, 0.0],
        "sum": [2.0, 1e-9],
        "most": 1.0,
        "least": 0.0,
        "told": {"a": [1, None, "走"]},
        "hidden": True,
    }
    assert began[1] - began[0] >= 0.2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "wanted"),
    [
        pytest.param("user", [["ToldElsewhere", 2, "2"], ["UserError", 2, "2"]], marks=pytest.mark.faults),
        ("numerics", [["NumericsError", 4, "2"], ["ToldElsewhere", 4, "2"]]),
        pytest.param("killed", [["PeerLost", 3, "2"], -9], marks=pytest.mark.faults),
    ],
)
def test_one_rank_tells(case: str, wanted: list[object]) -> None:
    """The one that has the fault, rank 0 where all have it; a lost one is told by who is left."""
    assert run_two(case) == wanted


@pytest.mark.slow
@pytest.mark.faults
def test_in_our_own_launch_the_launcher_tells_of_a_lost_rank() -> None:
    assert run_two("killed", TRUETUNE_LAUNCHED="1") == [["ToldElsewhere", 75, "2"], -9]


def test_alone_nothing_is_done() -> None:
    """A process alone keeps its gradient as it is, and its numbers unrounded."""
    part = torch.nn.Parameter(torch.zeros(2))
    part.grad = gradient = torch.tensor([1.0, 2.0])
    assert ALONE.sum_gradients([part], [0.1]) == [0.1]
    assert part.grad is gradient
    assert (ALONE.sum([0.1]), ALONE.most(0.1), ALONE.least(0.1), ALONE.tell("x")) == ([0.1], 0.1, 0.1, "x")
    assert (ALONE.is_main, ALONE.size, ALONE.rank) == (True, 1, 0)
    with ALONE.in_turn():
        ALONE.wait()
    with connected() as ranks:
        assert ranks is ALONE


def test_other_errors_pass() -> None:
    """Without a group there is no peer to lose."""
    with pytest.raises(RuntimeError, match="closed by peer") as error, watched():
        raise RuntimeError("Connection closed by peer")
    assert not isinstance(error.value, PeerLost)
