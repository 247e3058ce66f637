"""Several processes that train one model: what they tell each other, and how all of them end when one does.

Rank 0 leads: it alone prints and writes. A process alone is a group of one, for which all of this does nothing.
"""

from __future__ import annotations

import datetime
import gc
import json
import os
import re
import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import distributed as dist

from truetune.errors import MachineError, NumericsError, ToldElsewhere, TruetuneError
from truetune.place import LOST_CODE, Place, has_own_threads, hidden_from_libraries, read_place

PATIENCE = datetime.timedelta(hours=2)
"""How long a rank waits for another one: rank 0 prepares data and takes samples meanwhile. One that dies is seen at
once, by its closed connection."""

LEAVE_S = 60.0
"""How long the others wait for rank 0 to save, where all of them found the same fault."""

TELLING_S = 1.0
"""A rank that leaves a fault to another one gives it time to tell: then torchrun ends all that are left."""

_BROKEN = re.compile(r"closed by peer|connection (reset|refused|closed)|broken pipe|gloo|nccl|socket", re.IGNORECASE)


class PeerLost(MachineError):
    """The connection to another rank broke: it died, or its machine did."""

    def __init__(self) -> None:
        super().__init__("rank_lost", where="ranks", fix="rank_lost")


@dataclass(frozen=True)
class Ranks:
    """A process among those that train together; by default it is alone. `parent`: process id of who started it."""

    place: Place = field(default_factory=Place)
    parent: int = 0

    @property
    def rank(self) -> int:
        """This process's number."""
        return self.place.rank

    @property
    def size(self) -> int:
        """How many processes there are."""
        return self.place.size

    @property
    def is_main(self) -> bool:
        """True for rank 0, which prints and writes."""
        return self.place.rank == 0

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter], numbers: Sequence[float]) -> list[float]:
        """Replace each parameter's gradient by its sum over all ranks, and return the sums of `numbers`.

        One reduction of one flat fp32 buffer. A rank without a gradient adds zeros. Sums, not means: the loss is
        divided by the learned tokens of all ranks already.
        """
        if self.size == 1:
            return list(numbers)
        parts = [parameter for parameter in parameters if parameter.requires_grad]
        gradients = [part.grad if part.grad is not None else torch.zeros_like(part) for part in parts]
        extra = torch.tensor(numbers, dtype=torch.float32, device=gradients[0].device)
        buffer = torch.cat([*(gradient.flatten().float() for gradient in gradients), extra])
        with watched():
            dist.all_reduce(buffer)
        start = 0
        for part, gradient in zip(parts, gradients, strict=True):
            part.grad = buffer[start : start + part.numel()].view_as(part).to(gradient.dtype)
            start += part.numel()
        return [float(number) for number in buffer[start:].tolist()]

    def sum(self, numbers: Sequence[float]) -> list[float]:
        """Return the sums of `numbers` over all ranks (fp64)."""
        return self._reduced(numbers, dist.ReduceOp.SUM)

    def most(self, number: float) -> float:
        """Return the largest of the ranks' numbers."""
        return self._reduced([number], dist.ReduceOp.MAX)[0]

    def least(self, number: float) -> float:
        """Return the smallest of the ranks' numbers."""
        return self._reduced([number], dist.ReduceOp.MIN)[0]

    def _reduced(self, numbers: Sequence[float], operation: Any) -> list[float]:
        if self.size == 1:
            return list(numbers)
        values = torch.tensor(numbers, dtype=torch.float64)
        with watched():
            dist.all_reduce(values, op=operation)
        return [float(value) for value in values.tolist()]

    def tell(self, value: Any = None) -> Any:
        """Return what rank 0 gives: plain values, as JSON."""
        if self.size == 1:
            return value
        content = json.dumps(value, ensure_ascii=False).encode() if self.is_main else b""
        length = torch.tensor([len(content)])
        with watched():
            dist.broadcast(length, src=0)
            raw = torch.empty(int(length), dtype=torch.uint8)
            if self.is_main:
                raw.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
            dist.broadcast(raw, src=0)
        return json.loads(raw.numpy().tobytes())

    def give(self, tensors: Iterable[torch.Tensor]) -> None:
        """Give every rank the values of rank 0's tensors; they have one shape everywhere."""
        if self.size > 1:
            with watched(), torch.no_grad():
                for tensor in tensors:
                    dist.broadcast(tensor, src=0)

    def asked(self, number: int | None) -> int | None:
        """Return the signal that this process got; SIGTERM if who started the ranks is gone, so that none is left."""
        is_orphan = self.size > 1 and number is None and os.getppid() != self.parent
        return int(signal.SIGTERM) if is_orphan else number

    def wait(self) -> None:
        """Wait until all ranks have come here."""
        self.sum([0.0])

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """Let the ranks of a machine run the block one after the other, so that its memory is needed once.

        Nothing in the block may wait for other ranks.
        """
        for turn in range(int(self.most(self.place.local_size))):
            if turn == self.place.local_rank:
                yield
            self.wait()


ALONE = Ranks()


@contextmanager
def watched() -> Iterator[None]:
    """Make a broken connection inside the block a fault that says so.

    Raises: PeerLost.
    """
    try:
        yield
    except RuntimeError as error:
        if dist.is_initialized() and _BROKEN.search(str(error)):
            raise PeerLost from error
        raise


class connected:  # noqa: N801 (a context manager)
    """Inside the block the processes that torchrun started are one group; a process alone is one, too.

    At a fault one rank tells it; the others leave with `ToldElsewhere` and the same exit code.

    Raises: UserError if they cannot meet.
    """

    def __enter__(self) -> Ranks:
        self._stack = ExitStack()
        self._store: Any = None
        self._place = place = read_place()
        if place.size == 1:
            return ALONE
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        if torch.cuda.is_available():
            torch.cuda.set_device(place.local_rank)
        elif not has_own_threads():
            torch.set_num_threads(max(torch.get_num_threads() // place.local_size, 1))
        self._store, _, _ = next(dist.rendezvous("env://"))
        group = dist.PrefixStore("truetune", self._store)
        dist.init_process_group(backend, store=group, rank=place.rank, world_size=place.size, timeout=PATIENCE)
        self._stack.enter_context(hidden_from_libraries())
        return Ranks(place, os.getppid())

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._place.size == 1:
            return
        try:
            self._leave(error)
        finally:
            self._stack.close()
            # A sharded model holds the group, too, in a cycle.
            gc.collect()
            if dist.is_initialized():
                dist.destroy_process_group()

    def _leave(self, error: BaseException | None) -> None:
        """Raise what this rank is to end with, where that is not `error` itself.

        Where all found the same fault, the others wait for rank 0: torchrun ends it as soon as one of them has failed.
        """
        is_main, store = self._place.rank == 0, self._store
        if isinstance(error, NumericsError) and not is_main:
            with _unheard():
                store.wait(["left"], datetime.timedelta(seconds=LEAVE_S))
        if isinstance(error, RuntimeError) and _BROKEN.search(str(error)):
            error = PeerLost()
        teller = self._claim(error) if error is not None else ""
        if is_main:
            with _unheard():
                store.set("left", "1")
        if error is None:
            return
        own = f"{self._place.rank}:"
        if teller and not teller.startswith(own):
            time.sleep(TELLING_S)
            raise ToldElsewhere(int(teller.partition(":")[2])) from error
        if isinstance(error, PeerLost):
            raise (ToldElsewhere(LOST_CODE) if self._place.is_launched else error)

    def _claim(self, error: BaseException) -> str:
        """Return "rank:exit code" of the rank that tells a fault: the first that asks, and at NumericsError rank 0."""
        if isinstance(error, PeerLost) and self._place.is_launched:
            with _unheard():
                return str(self._store.get("told").decode()) if self._store.check(["told"]) else ""
            return ""
        code = error.exit_code if isinstance(error, TruetuneError) else 130 if _is_interrupt(error) else 1
        with _unheard():
            return str(self._store.compare_set("told", "", f"{self._place.rank}:{code}").decode())
        return ""


def _is_interrupt(error: BaseException) -> bool:
    return isinstance(error, KeyboardInterrupt)


@contextmanager
def _unheard() -> Iterator[None]:
    """Go on where the store is gone: its process died, which is told by who started it."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError):
            raise
