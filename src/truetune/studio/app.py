"""The routes of the page. The whole contract between the page and this server:

GET  /                                  the page; sets the cookie that every /api call needs
GET  /api/state                         {version, cwd, langs, lang, roots, models, presets: [{name, values}]}
GET  /api/texts?lang=                   {key: text}; faults, and commands started from here, speak that language, too
GET  /api/fields?lang=                  [{name, kind: text|number|choice|bool|list, choices, default, help}]
GET  /api/files?path=                   {path, parent, folders, files: [{name, bytes}]}
POST /api/files?name=                   the file itself as body → {path}
POST /api/jobs                          {command, words} → the job
GET  /api/jobs, /api/jobs/ID            [job]; {id, command, words, shown, state: running|done|failed|stopped,
                                        exit_code, output: [line], result: report of a check, store, run}
POST /api/jobs/ID/stop                  SIGINT
GET  /api/rows?store=&side=&start=&count=&search=    {total, start, rows: [{index, where, messages, pairs}]}
                                        pairs: [{ids, texts, learned, specials, is_rejected?}]; messages: [{…, learned}]
GET  /api/refused?store=&start=&count=  {total, start, rows: [{where, reason, fix}]}
GET  /api/duplicates?store=&start=&count=   the same; each of its rows has again: {count, others: [where]}
GET  /api/lengths?store=                {bars: [{from, to, count}], longest, pairs, max_length}
GET  /api/runs, /api/runs/NAME          [run]; + info, config, checkpoints, report, store, events, keys, has_report_page
GET  /api/runs/NAME/series?keys=&from=&to=&points=   {step: […], KEY: […], eval: [[step, loss]], total}
GET  /api/runs/NAME/live?after=         server-sent events: those of events.jsonl, {kind: "state", state}, {kind: "cut"}
GET  /api/runs/NAME/steps/STEP          {event, rows}
GET  /api/runs/NAME/samples             [sample event]
GET  /api/runs/NAME/report.html         the report card, in a sandbox
POST /api/runs/NAME/stop                SIGINT to whoever writes it
POST /api/talk                          {run, side: base|tuned, messages, temperature, …} → server-sent events:
                                        {status: "loading"}, then OpenAI's chunks and [DONE], or {error}
POST /api/talk/ids                      {run, messages} → {ids, texts}
POST /api/talk/save                     {messages, path} → {path}

A fault is {error: {key, where, message, fix}}. Nothing here imports torch: what computes is a process of its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles

from truetune.disk import to_json
from truetune.errors import MachineError, TruetuneError, UserError
from truetune.messages import CATALOGUES
from truetune.report import PAGE
from truetune.serve.guard import BODY, headers_of
from truetune.studio import fields as forms
from truetune.studio import rows as stored
from truetune.studio.door import HEADERS, LANG_COOKIE, lang_of
from truetune.studio.jobs import Jobs
from truetune.studio.live import live
from truetune.studio.places import Places
from truetune.studio.runs import Runs, row_places
from truetune.studio.talk import Talk

STATUS = {"studio_outside": 403, "studio_missing": 404, "studio_step": 404, "studio_no_rows": 404, "no_folder": 404}
"""Of faults; others are 400, those of the machine 503."""
REPORT_POLICY = "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'self'"
DEFAULT_POINTS = 2000
EVENTS = "text/event-stream"


@dataclass
class Studio:
    """What the routes share."""

    places: Places
    lang: str
    runs: Runs = field(init=False)
    stores: stored.Stores = field(init=False)
    jobs: Jobs = field(init=False)
    talk: Talk = field(init=False)

    def __post_init__(self) -> None:
        self.runs, self.stores = Runs(self.places.roots), stored.Stores()
        self.jobs, self.talk = Jobs(self.places), Talk(self.places, self.stores)


def create_app(studio: Studio) -> FastAPI:
    """Return the application; its Door is put around it by whoever runs it."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    static = Path(str(files("truetune"))) / "studio" / "static"

    def page() -> Response:
        return FileResponse(static / "index.html", media_type="text/html; charset=utf-8")

    async def failed(request: Request, error: Exception) -> Response:
        return _refusal(error, lang_of(headers_of(dict(request.scope)), studio.lang))

    app.add_api_route("/", page, methods=["GET", "HEAD"])
    app.add_api_route("/health", lambda: JSONResponse({"status": "ok"}), methods=["GET"])
    app.mount("/static", StaticFiles(directory=static))
    for add in (_about, _files, _jobs, _rows, _runs, _talk):
        add(studio, app)
    for kind in (TruetuneError, HTTPException, RequestValidationError, OSError):
        app.add_exception_handler(kind, failed)
    return app


def _refusal(error: Exception, lang: str) -> Response:
    if isinstance(error, HTTPException):
        return JSONResponse({"error": {"key": "http", "message": error.detail}}, error.status_code)
    if isinstance(error, RequestValidationError):
        where = ", ".join(".".join(map(str, fault["loc"])) for fault in error.errors())
        error = UserError("studio_words", where=where, fix="studio_words")
    if isinstance(error, OSError):
        error = MachineError("machine", where=str(error.filename or "truetune"), fix="machine", problem=error)
    if not isinstance(error, TruetuneError):
        raise error
    status = STATUS.get(error.key, 503 if isinstance(error, MachineError) else 400)
    return JSONResponse({"error": forms.fault(error, lang)}, status)


def _body(request: Request, *names: str) -> list[Any]:
    """Return the named values of a JSON body, None where one is not given.

    Raises: UserError if the body is no JSON object.
    """
    try:
        body = json.loads(request.scope[BODY] or b"{}")
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        raise UserError("studio_words", where=request.url.path, fix="studio_words")
    return [body.get(name) for name in names] if names else [body]


def _lang(request: Request, studio: Studio) -> str:
    return lang_of(headers_of(dict(request.scope)), studio.lang)


def _about(studio: Studio, app: FastAPI) -> None:
    def state(request: Request) -> Response:
        used = [run["model"] for run in studio.runs.listed()]
        told = {
            "version": _version(),
            "cwd": str(studio.places.home),
            "langs": list(CATALOGUES),
            "lang": _lang(request, studio),
            "roots": [str(root) for root in studio.places.roots],
            "models": forms.models(studio.places.home, [*studio.jobs.models(), *used]),
            "presets": forms.presets(),
        }
        return JSONResponse(told)

    def texts(request: Request, lang: str = "") -> Response:
        response = JSONResponse(forms.texts(lang or _lang(request, studio)))
        if lang in CATALOGUES:
            response.set_cookie(LANG_COOKIE, lang, httponly=True, samesite="strict", max_age=365 * 86400)
        return response

    def fields(request: Request, lang: str = "") -> Response:
        return JSONResponse(forms.fields(lang if lang in CATALOGUES else _lang(request, studio)))

    _get(app, {"/api/state": state, "/api/texts": texts, "/api/fields": fields})


def _version() -> str:
    with suppress(PackageNotFoundError):
        return version("truetune")
    return "source"


def _files(studio: Studio, app: FastAPI) -> None:
    def listing(path: str = "") -> Response:
        return JSONResponse(studio.places.listing(path))

    async def upload(request: Request, name: str) -> Response:
        return JSONResponse({"path": str(await studio.places.upload(name, request.stream()))})

    _get(app, {"/api/files": listing})
    app.add_api_route("/api/files", upload, methods=["POST"])


def _jobs(studio: Studio, app: FastAPI) -> None:
    def start(request: Request) -> Response:
        command, words = _body(request, "command", "words")
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise UserError("studio_words", where=str(command), fix="studio_words")
        return JSONResponse(studio.jobs.start(str(command), words, lang=_lang(request, studio)))

    def stop(name: str) -> Response:
        studio.jobs.stop(name)
        return JSONResponse({})

    _get(
        app,
        {
            "/api/jobs": lambda: JSONResponse(studio.jobs.listed()),
            "/api/jobs/{name}": _told(studio.jobs.told),
        },
    )
    app.add_api_route("/api/jobs", start, methods=["POST"])
    app.add_api_route("/api/jobs/{name}/stop", stop, methods=["POST"])


def _told(tell: Callable[[str], Any]) -> Callable[..., Response]:
    def told(name: str) -> Response:
        return JSONResponse(tell(name))

    return told


def _rows(studio: Studio, app: FastAPI) -> None:
    def rows(store: str, side: str = "train", start: int = 0, count: int = 20, search: str = "") -> Response:
        folder = studio.places.inside(store)
        return JSONResponse(studio.stores.page(folder, side, start=start, count=count, search=search))

    def refused(store: str, start: int = 0, count: int = 20) -> Response:
        return JSONResponse(stored.refused(studio.places.inside(store), start=start, count=count))

    def duplicates(store: str, start: int = 0, count: int = 20) -> Response:
        return JSONResponse(studio.stores.duplicates(studio.places.inside(store), start=start, count=count))

    def lengths(store: str) -> Response:
        return JSONResponse(studio.stores.lengths(studio.places.inside(store)))

    listed: dict[str, Callable[..., Response]] = {
        "/api/rows": rows,
        "/api/refused": refused,
        "/api/duplicates": duplicates,
        "/api/lengths": lengths,
    }
    _get(app, listed)


def _runs(studio: Studio, app: FastAPI) -> None:
    def series(request: Request, name: str, keys: str = "loss", points: int = DEFAULT_POINTS) -> Response:
        first, last = (request.query_params.get(bound) for bound in ("from", "to"))
        try:
            start, stop = int(first or 0), int(last) if last else None
        except ValueError:
            raise UserError("studio_words", where="from, to", fix="studio_words") from None
        wanted = [key for key in keys.split(",") if key]
        # to_json: numbers are finite, or this fails.
        found = studio.runs.series(name, wanted, first=start, last=stop, points=max(points, 2))
        return Response(to_json(found), media_type="application/json")

    def step(name: str, step: int) -> Response:
        run, event, row_ids = studio.runs.step(name, step)
        rows = studio.stores.of_step(run.data, row_ids)
        return JSONResponse({"event": event, "rows": rows, "places": row_places(run, step)})

    def events(request: Request, name: str, after: int = -1) -> Response:
        seen = request.headers.get("last-event-id", "")
        return StreamingResponse(live(studio.runs.run(name), after=after, seen=seen), media_type=EVENTS)

    def report(name: str) -> Response:
        path = studio.runs.run(name).path / PAGE
        if not path.is_file():
            raise UserError("studio_missing", where=str(path), fix="studio_missing")
        headers = {**HEADERS, "Content-Security-Policy": REPORT_POLICY}
        return FileResponse(path, media_type="text/html; charset=utf-8", headers=headers)

    def stop(name: str) -> Response:
        studio.runs.stop(name)
        return JSONResponse({})

    _get(
        app,
        {
            "/api/runs": lambda: JSONResponse(studio.runs.listed()),
            "/api/runs/{name}": _told(studio.runs.whole),
            "/api/runs/{name}/series": series,
            "/api/runs/{name}/steps/{step}": step,
            "/api/runs/{name}/samples": _told(studio.runs.samples),
            "/api/runs/{name}/live": events,
            "/api/runs/{name}/report.html": report,
        },
    )
    app.add_api_route("/api/runs/{name}/stop", stop, methods=["POST"])


def _talk(studio: Studio, app: FastAPI) -> None:
    def talk(request: Request) -> Response:
        (ask,) = _body(request)
        run = studio.runs.run(str(ask.get("run")))
        pieces = studio.talk.stream(run, ask, lang=_lang(request, studio))
        return StreamingResponse(pieces, media_type=EVENTS)

    async def ids(request: Request) -> Response:
        name, messages = _body(request, "run", "messages")
        return JSONResponse(await studio.talk.ids(studio.runs.run(str(name)), messages))

    def save(request: Request) -> Response:
        messages, path = _body(request, "messages", "path")
        return JSONResponse({"path": str(studio.talk.save(messages, str(path) if path else None))})

    app.add_api_route("/api/talk", talk, methods=["POST"])
    app.add_api_route("/api/talk/ids", ids, methods=["POST"])
    app.add_api_route("/api/talk/save", save, methods=["POST"])


def _get(app: FastAPI, routes: dict[str, Callable[..., Any]]) -> None:
    for path, route in routes.items():
        app.add_api_route(path, route, methods=["GET"])
