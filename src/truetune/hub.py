"""Hub id → local folder, with huggingface_hub or modelscope. Nothing else here opens a connection."""

from __future__ import annotations

import socket
import threading
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from truetune.errors import UserError

CONNECT_TIMEOUT_S = 1.5
"""How long to wait for the hub before saying so; huggingface_hub alone retries for a minute."""

# No code and no pickled weights.
PATTERNS = {
    "model": ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"],
    "dataset": ["*.json", "*.jsonl", "*.ndjson", "*.csv", "*.tsv", "*.parquet", "*.gz", "*.zst"],
}
Kind = Literal["model", "dataset"]
MODELSCOPE_ENDPOINT = "https://modelscope.cn"


def fetch(name: str, *, revision: str, hub: str, kind: Kind = "model") -> Path:
    """Download the model or data set `name` (or find it in the cache) and return its folder.

    Raises: UserError within about two seconds if the hub cannot be reached and `name` is not in the cache.
    """
    return (_from_modelscope if hub == "modelscope" else _from_huggingface)(name, revision, kind)


def _from_huggingface(name: str, revision: str, kind: Kind) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    # The program turns the library's own bars off; a download of gigabytes keeps one.
    arguments: dict[str, Any] = {"revision": revision, "repo_type": kind, "tqdm_class": _bar()}
    online = not constants.HF_HUB_OFFLINE and can_connect(constants.ENDPOINT)
    try:
        return Path(snapshot_download(name, allow_patterns=PATTERNS[kind], local_files_only=not online, **arguments))
    except LocalEntryNotFoundError:
        raise UserError("hub_offline", where=name, fix="hub_offline", endpoint=constants.ENDPOINT) from None
    except HFValidationError as error:
        if kind == "dataset":
            raise UserError("data_hub_name", where=name, fix="data_hub_name") from error
        raise UserError("model_missing", where=name, fix="model_missing") from error
    except HfHubHTTPError as error:
        raise UserError("hub_refused", where=name, fix="hub_refused", problem=str(error).splitlines()[0]) from None


def _bar() -> Any:
    """Return a progress bar that shows although the program turns the libraries' own bars off."""
    from tqdm.auto import tqdm

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs | {"disable": None})

    return Bar


def _from_modelscope(name: str, revision: str, kind: Kind) -> Path:
    try:
        import modelscope
        from modelscope_hub.errors import HubError
    except ImportError:
        raise UserError("extra_missing", where="hub: modelscope", fix="extra_missing", extra="modelscope") from None
    revision = "master" if revision == "main" else revision
    online = can_connect(MODELSCOPE_ENDPOINT)
    download = modelscope.snapshot_download if kind == "model" else modelscope.dataset_snapshot_download
    arguments: dict[str, Any] = {"allow_patterns": PATTERNS[kind], "local_files_only": not online}
    try:
        return Path(download(name, revision=revision, **arguments))
    except (HubError, ValueError, OSError) as error:
        # requests' own errors are OSErrors.
        if online:
            raise UserError("hub_refused", where=name, fix="hub_refused", problem=str(error)) from None
        raise UserError("hub_offline", where=name, fix="hub_offline", endpoint=MODELSCOPE_ENDPOINT) from None


def can_connect(endpoint: str, timeout_s: float = CONNECT_TIMEOUT_S) -> bool:
    """Return True if a connection to the endpoint (or to the proxy that leads there) opens within `timeout_s`.

    In a thread of its own, since looking up a name has no time limit.
    """
    host = urlsplit(endpoint).hostname or ""
    proxy = None if proxy_bypass(host) else getproxies().get(urlsplit(endpoint).scheme)
    parts = urlsplit(proxy or endpoint)
    address = (parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80))
    connected = threading.Event()

    def connect() -> None:
        try:
            socket.create_connection(address, timeout=timeout_s).close()
        except OSError:
            return
        connected.set()

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(timeout_s)
    return connected.is_set()
