"""The routes: a request → prompt ids → jobs → a reply."""

from __future__ import annotations

import asyncio
import copy
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException

from truetune.data.jinja import variables
from truetune.data.template import Renderer
from truetune.errors import UserError
from truetune.serve import schema
from truetune.serve.guard import BODY, error_object
from truetune.serve.replies import Choice, Reply, event
from truetune.serve.sampler import Draw
from truetune.serve.schema import ChatRequest, Refused, TextRequest
from truetune.serve.text import OPEN_THINKING, ReplyReader
from truetune.serve.worker import Full, Job, Piece, Worker
from truetune.use import Voice

DEFAULT_MAX_TOKENS = 512
"""Where the request sets no limit; `truetune chat` has the same."""
CLIENT_GONE = 499
MOST_ARGUMENT_CHARACTERS = 1000

Log = Callable[..., None]


@dataclass
class Service:
    """What the routes share. `context`: tokens of a prompt and its answer. `log`: hears of each request."""

    worker: Worker
    voices: dict[str, Voice]
    context: int
    lang: str
    log: Log
    started: float = field(default_factory=time.time)

    def __post_init__(self) -> None:
        # Prompts are rendered in one thread: transformers switches the tokenizer while it encodes marked texts. The
        # worker decodes with tokenizers of its own.
        self.renderers = ThreadPoolExecutor(1, "renderer")
        self.tokenizers = {name: copy.deepcopy(voice.renderer.tokenizer) for name, voice in self.voices.items()}
        self.statuses: Counter[int] = Counter()

    def told(self, status: int, *, read: int = 0, made: int = 0, seconds: float = 0.0) -> None:
        """Count and log how a request ended."""
        self.statuses[status] += 1
        self.log(status=status, read=read, made=made, seconds=f"{seconds:.2f}")

    def voice(self, name: str) -> Voice:
        """Return the model of that name.

        Raises: Refused if there is none.
        """
        if name not in self.voices:
            names = ", ".join(self.voices)
            raise Refused("model", status=404, param="model", code="model_not_found", name=name, names=names)
        return self.voices[name]

    def job(self, ask: schema.Request, prompt_ids: list[int], *, number: int, emit: Callable[[Piece], None]) -> Job:
        """Return the job of the answer with that number to one prompt."""
        voice = self.voice(ask.model)
        draw = Draw(
            temperature=ask.temperature or 0.0,
            top_p=1.0 if ask.top_p is None else ask.top_p,
            # The first answer is the one that n = 1 gives.
            seed=None if ask.seed is None else ask.seed + number,
            num_logprobs=ask.num_logprobs,  # type: ignore[attr-defined]
        )
        return Job(
            adapter=voice.adapter,
            prompt_ids=prompt_ids,
            max_tokens=self._max_tokens(ask, len(prompt_ids)),
            draw=draw,
            stop_ids=frozenset(voice.renderer.stop_ids),
            stops=ask.stops,
            tokenizer=self.tokenizers[ask.model],
            emit=emit,
        )

    def _max_tokens(self, ask: schema.Request, num_prompt: int) -> int:
        name, wanted = ask.token_limit  # type: ignore[attr-defined]
        room = self.context - num_prompt
        if room < 1 or (wanted is not None and wanted > room):
            values = {"prompt": num_prompt, "wanted": wanted or 1, "context": self.context}
            raise Refused("context", param=name if room > 0 else "messages", code="context_length_exceeded", **values)
        return min(DEFAULT_MAX_TOKENS, room) if wanted is None else int(wanted)


def create_app(service: Service) -> FastAPI:
    """Return the application; its Guard is put around it by whoever runs it."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)

    async def chat(request: Request) -> Response:
        return await _answered(service, request, ChatRequest)

    async def complete(request: Request) -> Response:
        return await _answered(service, request, TextRequest)

    async def tokenize(request: Request) -> Response:
        return await _tokenized(service, request)

    async def models() -> Response:
        made = int(service.started)
        data = [{"id": name, "object": "model", "created": made, "owned_by": "truetune"} for name in service.voices]
        return JSONResponse({"object": "list", "data": data})

    async def model(name: str) -> Response:
        service.voice(name)
        return JSONResponse({"id": name, "object": "model", "created": int(service.started), "owned_by": "truetune"})

    async def health() -> Response:
        return JSONResponse({"status": "ok"})

    async def metrics() -> Response:
        return PlainTextResponse(_metrics(service), media_type="text/plain; version=0.0.4")

    async def refused(_request: Request, error: Exception) -> Response:
        return _refusal(service, _as_refused(error))

    app.add_api_route("/v1/chat/completions", chat, methods=["POST"])
    app.add_api_route("/v1/completions", complete, methods=["POST"])
    app.add_api_route("/tokenize", tokenize, methods=["POST"])
    app.add_api_route("/v1/models", models, methods=["GET", "HEAD"])
    app.add_api_route("/v1/models/{name:path}", model, methods=["GET", "HEAD"])
    app.add_api_route("/health", health, methods=["GET", "HEAD"])
    app.add_api_route("/metrics", metrics, methods=["GET", "HEAD"])
    app.add_exception_handler(HTTPException, refused)
    app.add_exception_handler(Refused, refused)
    app.add_exception_handler(Exception, refused)
    return app


def _as_refused(error: Exception) -> Refused:
    if isinstance(error, HTTPException):
        key = "method" if error.status_code == 405 else "path"
        return Refused(key, status=error.status_code, code="method_not_allowed" if key == "method" else "not_found")
    return error if isinstance(error, Refused) else Refused("failed", status=500, problem=type(error).__name__)


def _refusal(service: Service, error: Refused) -> Response:
    service.told(error.status)
    headers = {"Retry-After": "1"} if error.status == 429 else None
    return JSONResponse(error_object(error, service.lang), error.status, headers)


async def _answered(service: Service, request: Request, kind: type[ChatRequest] | type[TextRequest]) -> Response:
    """Answer one request, and log how long that took and how many tokens it was."""
    began = time.perf_counter()
    ask = schema.parse(kind, request.scope[BODY])
    service.voice(ask.model)
    if service.worker.is_full:
        # Before its prompt is rendered, which takes half a second for a body of 1 MiB.
        raise Refused("busy", status=429, code="busy")
    loop = asyncio.get_running_loop()
    prompts, reader = await loop.run_in_executor(service.renderers, _read, service, ask)
    reply = Reply(
        ask.model,
        isinstance(ask, ChatRequest),
        sum(map(len, prompts)),
        service.tokenizers[ask.model].decode,
        has_usage=ask.has_usage,
    )
    answer = _Answer(service, reply, began)
    for prompt_ids in prompts:
        for number in range(ask.n or 1):
            choice = Choice(len(answer.choices), reply, reader=reader(), num_logprobs=ask.num_logprobs)
            answer.choices.append(choice)
            answer.jobs.append(service.job(ask, prompt_ids, number=number, emit=answer.emitter(loop, choice.index)))
    if len(answer.jobs) > schema.MAX_CHOICES:
        raise Refused("choices", param="prompt", most=schema.MAX_CHOICES)
    try:
        service.worker.submit(answer.jobs)
    except Full:
        raise Refused("busy", status=429, code="busy") from None
    if ask.stream:
        return _Stream(answer)
    return await answer.whole(request.receive)


async def _tokenized(service: Service, request: Request) -> Response:
    """Return the ids of a chat request's prompt, in the words of vLLM's /tokenize."""
    ask = schema.parse(ChatRequest, request.scope[BODY])
    service.voice(ask.model)
    loop = asyncio.get_running_loop()
    (ids,), _ = await loop.run_in_executor(service.renderers, _read, service, ask)
    return JSONResponse({"count": len(ids), "max_model_len": service.context, "tokens": ids})


def _read(service: Service, ask: ChatRequest | TextRequest) -> tuple[list[list[int]], Callable[[], ReplyReader | None]]:
    """Return the ids of each prompt, and what makes a reader for each answer. Runs in the renderers' thread.

    Raises: Refused if the template refuses the messages, or a prompt is empty or holds ids that do not exist.
    """
    voice = service.voice(ask.model)
    if isinstance(ask, TextRequest):
        size = len(voice.renderer.tokenizer)
        prompts = [voice.renderer.text_ids(one) if isinstance(one, str) else one for one in ask.prompts()]
        if not prompts or not all(prompts) or any(token >= size for ids in prompts for token in ids):
            raise Refused("prompt", param="prompt", size=size)
        return prompts, lambda: None
    renderer = _renderer_for(voice, ask)
    tools = ask.plain_tools()
    if tools and "tools" not in variables(renderer.chat_template):
        raise Refused("no_tools", param="tools")
    try:
        ids = renderer.prompt_ids(ask.plain_messages(), tools=tools or None)
    except UserError as error:
        raise Refused("template", param="messages", problem=error.values.get("problem", error)) from None
    tail = renderer.tokenizer.decode(ids[-8:]).rstrip()
    names = [tool["function"]["name"] for tool in tools]
    return [ids], lambda: ReplyReader(opens_thinking=tail.endswith(OPEN_THINKING), tool_names=names)


def _renderer_for(voice: Voice, ask: ChatRequest) -> Renderer:
    """Return the run's renderer, with the request's own values for the template.

    Raises: Refused if the template does not read one of them.
    """
    asked = ask.chat_template_kwargs or {}
    known = variables(voice.renderer.chat_template) - {"tools"}
    for name, value in asked.items():
        if name not in known or len(str(value)) > MOST_ARGUMENT_CHARACTERS:
            place = f"chat_template_kwargs.{name}"
            raise Refused("argument", param=place, name=place, names=", ".join(sorted(known)))
    if not asked:
        return voice.renderer
    return replace(voice.renderer, template_kwargs=voice.renderer.template_kwargs | asked)


@dataclass
class _Answer:
    """The jobs of one request and what they give. Whoever leaves early has them cancelled."""

    service: Service
    reply: Reply
    began: float
    choices: list[Choice] = field(default_factory=list)
    jobs: list[Job] = field(default_factory=list)
    queue: asyncio.Queue[tuple[int, Piece] | None] = field(default_factory=asyncio.Queue)

    def emitter(self, loop: asyncio.AbstractEventLoop, index: int) -> Callable[[Piece], None]:
        """Return what the worker's thread calls for each piece of a choice."""

        def emit(piece: Piece) -> None:
            # The loop is closed when the server has ended.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(self.queue.put_nowait, (index, piece))

        return emit

    async def pieces(self, receive: Any) -> AsyncGenerator[tuple[int, Piece], None]:
        """Yield the pieces of all choices until they are done.

        Raises: _Gone if the client leaves, Refused if the worker fails.
        """
        watch = asyncio.ensure_future(self._watch(receive))
        status = CLIENT_GONE
        try:
            num_left = len(self.jobs)
            while num_left:
                got = await self.queue.get()
                if got is None:
                    raise _Gone
                if got[1].problem is not None:
                    status = 503
                    raise Refused("failed", status=503, code="failed", problem=got[1].problem)
                yield got
                num_left -= got[1].finish is not None
            status = 200
        finally:
            watch.cancel()
            if status != 200:
                self.service.worker.cancel(self.jobs)
            self._log(status)

    async def _watch(self, receive: Any) -> None:
        while (await receive())["type"] != "http.disconnect":
            continue
        self.queue.put_nowait(None)

    def _log(self, status: int) -> None:
        usage = self.reply.usage(self.choices)
        read, made = usage["prompt_tokens"], usage["completion_tokens"]
        self.service.told(status, read=read, made=made, seconds=time.perf_counter() - self.began)

    async def whole(self, receive: Any) -> Response:
        """Return the reply once it is whole."""
        try:
            async for index, piece in self.pieces(receive):
                self.choices[index].add(piece)
        except _Gone:
            return Response(status_code=CLIENT_GONE)
        except Refused as error:
            return JSONResponse(error_object(error, self.service.lang), error.status)
        return JSONResponse(self.reply.whole(self.choices))


class _Gone(Exception):
    """The client left."""


class _Stream(Response):
    """Server-sent events; the client's leaving is heard while the model still reads the prompt."""

    def __init__(self, answer: _Answer) -> None:
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._answer = answer

    async def __call__(self, _scope: Any, receive: Any, send: Any) -> None:
        answer = self._answer
        headers = [(name, value) for name, value in self.raw_headers if name != b"content-length"]
        pieces = answer.pieces(receive)
        try:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            for choice in answer.choices if answer.reply.is_chat else ():
                await _send(send, answer.reply.chunk([choice.first()]))
            async for index, piece in pieces:
                for part in answer.choices[index].add(piece):
                    await _send(send, answer.reply.chunk([part]))
            if answer.reply.has_usage:
                await _send(send, answer.reply.chunk([], answer.reply.usage(answer.choices)))
            await _send(send, b"data: [DONE]\n\n", is_last=True)
        except Refused as error:
            await _send(send, event(error_object(error, answer.service.lang)), is_last=True)
        except (_Gone, TimeoutError):
            return
        finally:
            await pieces.aclose()
            answer.service.worker.cancel(answer.jobs)


async def _send(send: Any, body: bytes, *, is_last: bool = False) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": not is_last})


def _metrics(service: Service) -> str:
    """Return Prometheus' text: counters since the start, and what goes on."""
    worker = service.worker
    lines = []
    for name, value in (("running", worker.num_running), ("waiting", worker.num_waiting)):
        lines += [f"# TYPE truetune_{name} gauge", f"truetune_{name} {value}"]
    for name in ("prompt_tokens", "reused_tokens", "answer_tokens", "cancelled", "failed_turns", "steps"):
        lines += [f"# TYPE truetune_{name}_total counter", f"truetune_{name}_total {worker.counts[name]}"]
    lines.append("# TYPE truetune_answers_total counter")
    lines += [f'truetune_answers_total{{status="{status}"}} {count}' for status, count in service.statuses.items()]
    return "\n".join(lines) + "\n"
