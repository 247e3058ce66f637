"""Where this process stands among others that train together: what torchrun tells each of them in the environment."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from truetune.errors import UserError

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
NEEDED = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

LAUNCHED = "TRUETUNE_LAUNCHED"
"""Set for the processes of `truetune train --devices N`: who started them says which of them died."""

LOST_CODE = 75
"""Exit code of a rank that only lost another one, in a launch of ours (EX_TEMPFAIL in sysexits.h)."""


@dataclass(frozen=True)
class Place:
    """Rank 0 leads. `local_*`: among the processes of this machine.

    `may_restart`: torchrun starts all of them again if one fails. `is_launched`: by `--devices`, not by torchrun.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    may_restart: bool = False
    is_launched: bool = False


def read_place() -> Place:
    """Return this process's place; one process alone if nobody says otherwise.

    Raises: UserError if there are several processes, and no way for them to meet.
    """
    size = _number("WORLD_SIZE", 1)
    if size == 1:
        return Place(may_restart=_number("TORCHELASTIC_MAX_RESTARTS", 0) > 0)
    missing = [name for name in NEEDED if not os.environ.get(name)]
    if missing:
        names = ", ".join(missing)
        raise UserError("ranks_incomplete", where="WORLD_SIZE", fix="ranks_incomplete", n=size, names=names)
    return Place(
        rank=_number("RANK", 0),
        size=size,
        local_rank=_number("LOCAL_RANK", 0),
        local_size=_number("LOCAL_WORLD_SIZE", 1),
        may_restart=_number("TORCHELASTIC_MAX_RESTARTS", 0) > 0,
        is_launched=LAUNCHED in os.environ,
    )


def _number(name: str, default: int) -> int:
    value = os.environ.get(name) or str(default)
    if not value.isdecimal():
        raise UserError("ranks_number", where=name, fix="ranks_incomplete", value=value)
    return int(value)


def has_own_threads() -> bool:
    """Return whether the user, or torchrun, says how many threads a process has."""
    return "OMP_NUM_THREADS" in os.environ


@contextmanager
def hidden_from_libraries() -> Iterator[None]:
    """Inside the block libraries see one process: accelerate would wrap the model, and end the group of ranks."""
    saved = {name: os.environ.pop(name) for name in VARIABLES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(saved)
