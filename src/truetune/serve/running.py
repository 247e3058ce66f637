"""Everything from voices to a server that answers, and its end."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Sequence
from typing import Any

import psutil
import torch

from truetune.errors import UserError
from truetune.messages import text
from truetune.serve.app import Service, create_app
from truetune.serve.cache import FULL, SLIDING, layer_kinds
from truetune.serve.guard import Guard
from truetune.serve.listen import Listener
from truetune.serve.worker import Worker
from truetune.use import Voice

GRACE_S = 4.0
"""Time that running answers have after SIGINT or SIGTERM."""
MAX_ROWS = {"cpu": 16, "cuda": 64}
WAITING_PER_ROW = 8
CACHE_SHARE = 0.5
"""Of the memory that is free at the start, for keys and values."""


def make_service(model: Any, voices: Sequence[Voice], *, lang: str, log: Callable[..., None]) -> Service:
    """Return what answers for the voices of a loaded model; its worker is not started.

    Raises: UserError if the model has layers whose cache is not of keys and values alone.
    """
    is_adapted = any(voice.adapter for voice in voices)
    causal = model.get_base_model() if is_adapted else model
    config = causal.config.get_text_config()
    unknown = layer_kinds(config) - {FULL, SLIDING}
    if unknown:
        raise UserError("serve_layers", where="model", fix="serve_layers", names=", ".join(sorted(unknown)))
    room = max_cached_tokens(config, causal)
    max_rows = MAX_ROWS.get(next(causal.parameters()).device.type, MAX_ROWS["cpu"])
    worker = Worker(
        causal,
        select=Selector(model) if is_adapted else lambda _: None,
        max_rows=max_rows,
        max_waiting=max_rows * WAITING_PER_ROW,
        max_cached_tokens=room,
    )
    context = min(getattr(config, "max_position_embeddings", None) or room, room)
    return Service(worker, {voice.name: voice for voice in voices}, context, lang, log)


def max_cached_tokens(config: Any, model: Any) -> int:
    """Return how many tokens' keys and values fit into CACHE_SHARE of the free memory."""
    num_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token_bytes: int = 2 * config.num_hidden_layers * num_heads * head_size * model.dtype.itemsize
    device = next(model.parameters()).device
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return max(int(free * CACHE_SHARE) // token_bytes, 1)


class Selector:
    """Makes an adapter active, or none of them, if it is not yet so."""

    def __init__(self, model: Any) -> None:
        self._model, self._current, self._is_off = model, "", False

    def __call__(self, adapter: str | None) -> None:
        """Let the next forward be that of an adapter, or of the base (None)."""
        if (adapter is None) != self._is_off:
            self._is_off = adapter is None
            tuner = self._model.base_model
            tuner.disable_adapter_layers() if self._is_off else tuner.enable_adapter_layers()
        if adapter not in (None, self._current):
            self._model.set_adapter(adapter, inference_mode=True)
            self._current = adapter


class Server(Listener):
    """Listens for a service, and ends its worker when it ends."""

    def __init__(self, service: Service, *, token: str | None, on_ready: Callable[[], None]) -> None:
        app = Guard(create_app(service), token=token, lang=service.lang)
        super().__init__(app, on_ready=on_ready, shutdown_s=int(GRACE_S) + 3)
        self._service = service

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more requests; answers that are not done after GRACE_S end with an error that says why."""
        closing = asyncio.ensure_future(self._close_worker())
        await super().shutdown(sockets)
        closing.cancel()

    async def _close_worker(self) -> None:
        await asyncio.sleep(GRACE_S)
        await asyncio.to_thread(self._service.worker.close, text("api.stopping", self._service.lang))


def serve(service: Service, *, bound: socket.socket, token: str | None, on_ready: Callable[[], None]) -> int:
    """Answer requests until a signal; return the exit code that it means."""
    server = Server(service, token=token, on_ready=on_ready)
    service.worker.start()
    try:
        server.run(sockets=[bound])
    finally:
        service.worker.close(text("api.stopping", service.lang))
    return server.exit_code
