"""Hub ids: a real download from a local server, the cache without it, and a quick answer where there is no network."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
import types
from collections.abc import Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import pytest

from truetune import hub
from truetune.errors import UserError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
MODEL = "org/tiny"
WANTED = {
    "config.json": b'{"model_type": "qwen3"}',
    "generation_config.json": b"{}",
    "model.safetensors": bytes(range(256)) * 300,
    "tokenizer.json": '{"词": 1}'.encode(),
    "tokenizer.model": b"\x00sentencepiece",
    "merges.txt": b"a b\n",
    "chat_template.jinja": b"{{ messages }}",
    "sub/config.json": b"{}",
}
UNWANTED = {
    "pytorch_model.bin": b"pickle",
    "modeling_tiny.py": b"import os",
    "model.pt": b"pickle",
    "weights.pkl": b"pickle",
    "README.md": b"# tiny",
    "run.sh": b"rm",
}


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


# --- can_connect ---


def test_a_listening_port_can_be_reached() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        assert hub.can_connect(f"http://127.0.0.1:{server.getsockname()[1]}")


def test_a_closed_port_cannot_be_reached() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        port = server.getsockname()[1]
    assert not hub.can_connect(f"http://127.0.0.1:{port}")


def test_a_name_that_does_not_exist_cannot_be_reached() -> None:
    began = time.monotonic()
    assert not hub.can_connect("https://hub.invalid")
    assert time.monotonic() - began < 5


def test_an_endpoint_that_hangs_is_given_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    release, began = threading.Event(), time.monotonic()

    def hang(*_: Any, **__: Any) -> None:
        release.wait(60)
        raise OSError

    monkeypatch.setattr(socket, "create_connection", hang)
    try:
        assert not hub.can_connect("https://hub.example", timeout_s=0.1)
        assert time.monotonic() - began < 5
    finally:
        release.set()


def test_the_time_limit_is_about_two_seconds() -> None:
    assert 1 <= hub.CONNECT_TIMEOUT_S <= 2


@pytest.mark.parametrize(
    ("endpoint", "proxies", "address"),
    [
        ("https://huggingface.co", {}, ("huggingface.co", 443)),
        ("http://mirror.example/hf", {}, ("mirror.example", 80)),
        ("http://mirror.example:8080", {}, ("mirror.example", 8080)),
        ("https://huggingface.co", {"https_proxy": "http://proxy.example:3128"}, ("proxy.example", 3128)),
        ("https://huggingface.co", {"http_proxy": "http://proxy.example:3128"}, ("huggingface.co", 443)),
        ("http://mirror.example", {"http_proxy": "http://proxy.example"}, ("proxy.example", 80)),
    ],
)
def test_the_endpoint_or_its_proxy_is_tried(
    endpoint: str, proxies: dict[str, str], address: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[Any] = []

    def connect(where: tuple[str, int], timeout: float) -> Any:
        tried.append((where, timeout))
        return SimpleNamespace(close=lambda: None)

    for name, value in proxies.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(socket, "create_connection", connect)
    assert hub.can_connect(endpoint, timeout_s=3)
    assert tried == [(address, 3)]


# --- Hugging Face ---


class Handler(BaseHTTPRequestHandler):
    """Answers as the Hugging Face hub does, for one model."""

    files = WANTED | UNWANTED

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        path = urlsplit(self.path).path
        self.server.requests.append((self.command, path))  # type: ignore[attr-defined]
        is_data = path.startswith(("/api/datasets/", "/datasets/"))
        api, resolve = f"/api/models/{MODEL}", f"/{MODEL}/resolve/{COMMIT}/"
        if is_data:
            api, resolve = f"/api/datasets/{MODEL}", f"/datasets/{MODEL}/resolve/{COMMIT}/"
        headers = {"X-Repo-Commit": COMMIT}
        if path == f"{api}/revision/main":
            siblings = [{"rfilename": name} for name in self.files]
            self._send(200, json.dumps({"id": MODEL, "sha": COMMIT, "siblings": siblings}).encode(), headers)
        elif path == f"{api}/tree/{COMMIT}":
            entries = [
                {"type": "file", "path": name, "size": len(content), "oid": f"{number:040x}"}
                for number, (name, content) in enumerate(self.files.items())
            ]
            self._send(200, json.dumps(entries).encode(), headers)
        elif path.removeprefix(resolve) in self.files:
            name = path.removeprefix(resolve)
            etag = {"ETag": f'"{list(self.files).index(name):040x}"'}
            self._send(200, self.files[name], headers | etag, with_body=with_body)
        else:
            missing = {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
            self._send(404, b"{}", missing, with_body=with_body)

    def _send(self, status: int, content: bytes, headers: dict[str, str], *, with_body: bool = True) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Keep the test's output clean."""


class Server(ThreadingHTTPServer):
    """Remembers what was asked for."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[tuple[str, str]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@pytest.fixture
def server() -> Iterator[Server]:
    """A hub on this machine."""
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


FETCH = """
import json, sys, time
from truetune.errors import UserError
from truetune.hub import fetch
results = []
for name in sys.argv[1:]:
    began = time.monotonic()
    try:
        result = {"folder": str(fetch(name, revision="main", hub="huggingface"))}
    except UserError as error:
        result = {"key": error.key, "where": error.where, "text": str(error)}
    results.append(result | {"seconds": time.monotonic() - began})
print(json.dumps(results))
"""


def fetch(endpoint: str, home: Path, *names: str, **variables: str) -> list[dict[str, Any]]:
    """Fetch models in a process of its own, since huggingface_hub reads the environment when it is imported."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGINGFACE_"))}
    own = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "*"}
    result = subprocess.run(
        [sys.executable, "-c", FETCH, *names], capture_output=True, text=True, env=inherited | own | variables
    )
    assert result.returncode == 0, result.stderr
    found: list[dict[str, Any]] = json.loads(result.stdout)
    return found


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_model_is_downloaded_once_and_then_found_without_network(server: Server, tmp_path: Path) -> None:
    first, missing = fetch(server.url, tmp_path, MODEL, "org/no-such-model")
    folder = Path(first["folder"])
    assert content(folder) == WANTED
    assert folder.is_relative_to(tmp_path)
    asked = {path for _, path in server.requests}
    assert [name for name in UNWANTED if any(name in path for path in asked)] == []
    assert sum("/resolve/" in path for path in asked) == len(WANTED) == 8

    assert (missing["key"], missing["where"]) == ("hub_refused", "org/no-such-model")
    assert "404" in missing["text"]

    # The hub is gone: nobody listens at this port.
    with closing(socket.create_server(("127.0.0.1", 0))) as closed:
        port = closed.getsockname()[1]
    gone = f"http://127.0.0.1:{port}"
    again, unknown = fetch(gone, tmp_path, MODEL, "org/other")
    assert Path(again["folder"]) == folder
    assert (unknown["key"], unknown["where"]) == ("hub_offline", "org/other")
    assert gone in unknown["text"]
    assert unknown["seconds"] < 5


DATA = """
import json, sys
from truetune.data.sources import find_files, read_rows
from truetune.errors import UserError
results = []
for name in sys.argv[1:]:
    try:
        sources = find_files([name])
        rows = [row.value for source in sources for row in read_rows(source)]
        results.append({"files": [source.path.name for source in sources], "rows": rows})
    except UserError as error:
        results.append({"key": error.key, "where": error.where, "text": str(error)})
print(json.dumps(results))
"""


@pytest.mark.parametrize("hub_files", [["train.jsonl", "test.jsonl"], ["rows.jsonl", "test.jsonl"], ["test.jsonl"]])
def test_data_sets(hub_files: list[str], server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training files are downloaded and read by the strict reader; nothing held out is trained unasked."""
    rows = {name: b'{"instruction": "%s", "output": "b"}\n' % name.encode() for name in hub_files}
    monkeypatch.setattr(Handler, "files", rows | UNWANTED)
    monkeypatch.setattr(sys.modules[__name__], "FETCH", DATA)
    found, test, missing = fetch(server.url, tmp_path, MODEL, f"{MODEL}:test", "org/none")
    if hub_files == ["test.jsonl"]:
        assert (found["key"], found["where"]) == ("data_hub_files", MODEL)
    else:
        assert found == {"files": hub_files[:1], "rows": [{"instruction": hub_files[0], "output": "b"}]}
    assert test["files"] == ["test.jsonl"]
    assert (missing["key"], missing["where"]) == ("hub_refused", "org/none")
    assert [name for name in UNWANTED if any(path.endswith(name) for _, path in server.requests)] == []


def test_offline_mode_asks_nobody(server: Server, tmp_path: Path) -> None:
    (refused,) = fetch(server.url, tmp_path, MODEL, HF_HUB_OFFLINE="1")
    assert (refused["key"], refused["where"]) == ("hub_offline", MODEL)
    assert refused["seconds"] < 5
    assert server.requests == []


def test_without_network_the_answer_comes_quickly(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    began = time.monotonic()
    with pytest.raises(UserError) as caught:
        hub.fetch("nobody/no-such-model", revision="main", hub="huggingface")
    assert time.monotonic() - began < 5
    assert caught.value.key == "hub_offline"
    assert caught.value.values == {"endpoint": "http://127.0.0.1:9"}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("reachable", "offline", "local_only"), [(True, False, False), (False, False, True), (True, True, True)]
)
def test_the_library_is_told_whether_there_is_a_network(
    reachable: bool, offline: bool, local_only: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []

    def snapshot_download(name: str, **kwargs: Any) -> str:
        calls.append((name, kwargs))
        return "/cache/org/tiny"

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(hub, "can_connect", lambda _endpoint: reachable)
    assert hub.fetch(MODEL, revision="v2", hub="huggingface") == Path("/cache/org/tiny")
    ((name, kwargs),) = calls
    kwargs.pop("tqdm_class")
    wanted = {"revision": "v2", "repo_type": "model", "allow_patterns": hub.PATTERNS["model"]}
    assert (name, kwargs) == (MODEL, wanted | {"local_files_only": local_only})


def test_no_pattern_lets_code_or_pickles_through() -> None:
    allowed = {kind: {pattern.removeprefix("*.") for pattern in patterns} for kind, patterns in hub.PATTERNS.items()}
    assert allowed["model"] == {"json", "safetensors", "jinja", "model", "txt"}
    assert allowed["dataset"] == {"json", "jsonl", "ndjson", "csv", "tsv", "parquet", "gz", "zst"}


# --- ModelScope ---


class ModelScope:
    """Stands in for the package; remembers how it was called."""

    def __init__(self, folder: str = "/cache/org/tiny", error: Exception | None = None) -> None:
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.folder, self.error = folder, error

    def snapshot_download(self, *args: Any, **kwargs: Any) -> str:
        self.calls.append((args, kwargs))
        if self.error:
            raise self.error
        return self.folder


class HubError(Exception):
    """The base of modelscope_hub's errors (1.40), none of which is a ValueError or an OSError by itself."""


def install(monkeypatch: pytest.MonkeyPatch, package: ModelScope | None, *, online: bool = True) -> list[str]:
    """Put the package in place, and return the list of endpoints that will be tried."""
    tried: list[str] = []

    def can_connect(endpoint: str) -> bool:
        tried.append(endpoint)
        return online

    errors = types.ModuleType("modelscope_hub.errors")
    errors.HubError = HubError  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "modelscope", package)
    monkeypatch.setitem(sys.modules, "modelscope_hub", None if package is None else types.ModuleType("modelscope_hub"))
    monkeypatch.setitem(sys.modules, "modelscope_hub.errors", None if package is None else errors)
    monkeypatch.setattr(hub, "can_connect", can_connect)
    return tried


def test_modelscope_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = install(monkeypatch, None)
    with pytest.raises(UserError) as caught:
        hub.fetch(MODEL, revision="main", hub="modelscope")
    assert caught.value.key == "extra_missing"
    assert 'pip install "truetune[modelscope]"' in str(caught.value)
    assert tried == []


@pytest.mark.parametrize(("revision", "asked"), [("main", "master"), ("v1.0", "v1.0")])
@pytest.mark.parametrize("online", [True, False])
def test_modelscope_is_asked_rightly(revision: str, asked: str, online: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    package = ModelScope()
    tried = install(monkeypatch, package, online=online)
    assert hub.fetch(MODEL, revision=revision, hub="modelscope") == Path("/cache/org/tiny")
    expected = {"revision": asked, "allow_patterns": hub.PATTERNS["model"], "local_files_only": not online}
    assert package.calls == [((MODEL,), expected)]
    assert tried == ["https://modelscope.cn"]


@pytest.mark.parametrize("error", [ValueError("Cannot find the requested files"), HubError("404"), OSError("reset")])
@pytest.mark.parametrize(("online", "key"), [(True, "hub_refused"), (False, "hub_offline")])
def test_what_modelscope_refuses(online: bool, key: str, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, ModelScope(error=error), online=online)
    with pytest.raises(UserError) as caught:
        hub.fetch(MODEL, revision="main", hub="modelscope")
    assert (caught.value.key, caught.value.where) == (key, MODEL)


@pytest.mark.parametrize("name", ["my models/qwen", "a/b c", "x/-y"])
def test_names_that_no_hub_has(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "can_connect", lambda _endpoint: False)
    with pytest.raises(UserError) as caught:
        hub.fetch(name, revision="main", hub="huggingface")
    assert caught.value.key == "model_missing"


def test_no_proxy_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
        monkeypatch.setenv("no_proxy", "")
        assert not hub.can_connect(endpoint)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        assert hub.can_connect(endpoint)
