"""Threads that compute, and the workers that torch lends to each of them.

On a CPU a thread that runs one operation on several cores gets a pool of OpenMP workers, and keeps it until it ends:

    main     ─ forward, backward ─   1 worker     │ 2 cores: main and its worker wait for each other awake
    another  ─ the next step's tries ─ 1 worker   │ 3 threads for 2 cores now: workers of every pool sleep between
                                                  │ any two operations: steps of DPO took 1.5 times as long

That limit is libgomp's (gomp_managed_threads and the throttled spin count in config/linux/wait.h). So one thread has
workers at a time: what is done aside is done by one core, and who hands the model over gives its workers back.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch


@contextmanager
def aside() -> Iterator[ThreadPoolExecutor]:
    """Give a thread for work beside the steps; it computes with one core and never gets workers."""
    num_threads = torch.get_num_threads()
    with ThreadPoolExecutor(max_workers=1, initializer=_take_one_core) as pool:
        pool.submit(int).result()
        # torch takes the last number that was set for threads to come, too.
        torch.set_num_threads(num_threads)
        yield pool


def _take_one_core() -> None:
    torch.set_num_threads(1)
    torch.get_num_threads()  # a thread's number is settled when it is first asked for


def give_back_workers() -> None:
    """End this thread's workers, before another thread computes; they come again when this one does.

    Only with libgomp, which is the runtime of torch's Linux builds.
    """
    try:
        library = ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOLOAD)
        pause = library.omp_pause_resource_all
    except (AttributeError, OSError):  # another system, another runtime, or one older than OpenMP 5
        return
    pause(1)  # omp_pause_soft
