"""`truetune train --devices N`: the same command in N processes of this machine, by torchrun's own launcher.

By itself that ends with exit code 1 and the launcher's traceback, whatever the fault was; here the code is the run's.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

import psutil

from truetune.config import hand_down
from truetune.errors import MachineError
from truetune.place import LAUNCHED, LOST_CODE

SHUTDOWN_S = 600
"""A rank that was told to stop has this long to finish its step and save; then it is killed. torchrun's own: 30 s."""


def launch(words: Sequence[str], num_processes: int) -> int:
    """Run `truetune WORDS` in `num_processes` processes and return the exit code.

    Raises: MachineError naming a rank that was killed; no other fault, since the ranks tell theirs.
    """
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    hand_down(LAUNCHED, "1")
    plan = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_processes,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        max_restarts=0,
        shutdown_timeout=SHUTDOWN_S,
        signals_to_handle=",".join(_signals()),
        # Else a folder stays in /tmp.
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),
    )
    try:
        elastic_launch(plan, sys.executable)("-m", "truetune", *words)
    except SignalException as error:
        # None is left, but after a second signal, which ends all at once.
        for child in psutil.Process().children(recursive=True):
            child.kill()
        return 128 + int(error.sigval)
    except ChildFailedError as error:
        return _code_of(error.failures)
    return 0


def _signals() -> list[str]:
    """Return the signals that are handed on; under nohup a closed terminal is to be ignored."""
    numbers = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT]
    return [number.name for number in numbers if signal.getsignal(number) != signal.SIG_IGN]


def _code_of(failures: dict[int, Any]) -> int:
    """Return the exit code of the ranks' own fault.

    Raises: MachineError if there is none: a rank was killed, and the others only lost it.
    """
    codes = {rank: int(failure.exitcode) for rank, failure in sorted(failures.items())}
    killed = {rank: -code for rank, code in codes.items() if code < 0}
    told = [code for code in codes.values() if code > 0 and code != LOST_CODE]
    if told:
        return told[0]
    if not killed:
        raise MachineError("rank_lost", where="ranks", fix="rank_lost")
    # When the first one had died, torchrun ended the others by SIGTERM.
    rank = min(killed, key=lambda rank: (killed[rank] == signal.SIGTERM, rank))
    name = signal.Signals(killed[rank]).name
    raise MachineError("rank_killed", where=f"rank {rank}", fix="rank_lost", rank=rank, signal=name)
