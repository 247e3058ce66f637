"""What a request may say. Every field is used, or refused by its name; one that asks for nothing is let through."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from truetune.records import Message

MAX_MESSAGES, MAX_TOOLS, MAX_CHOICES, MAX_STOPS, MAX_STOP_CHARACTERS, MAX_LOGPROBS = 1024, 128, 8, 4, 256, 20

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0, 0.0),
    "presence_penalty": (0, 0.0),
    "repetition_penalty": (1, 1.0),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "parallel_tool_calls": (True,),
    "store": (False,),
    "metadata": ({},),
    "service_tier": ("auto", "default"),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
}
"""Fields that are not supported, and the values that ask for what happens anyway; null asks for nothing, too."""


class Refused(Exception):
    """A request that is not answered. `key`: of the text api.KEY; `param`: the field; `code`: for programs."""

    def __init__(
        self, key: str, *, status: int = 400, param: str | None = None, code: str | None = None, **values: Any
    ) -> None:
        super().__init__(key)
        self.key, self.status, self.param, self.code, self.values = key, status, param, code, values

    @property
    def type(self) -> str:
        """The kind of error, in OpenAI's words."""
        kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
        return kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class _Part(_Strict):
    type: Literal["text"]
    text: str


class _Function(_Strict):
    name: Annotated[str, Field(min_length=1)]
    arguments: str


class _Call(_Strict):
    id: str
    type: Literal["function"]
    function: _Function


class _Message(_Strict):
    role: Literal["system", "user", "assistant", "tool"]
    content: str | Annotated[list[_Part], Field(min_length=1)] | None = None
    reasoning_content: str | None = None
    tool_calls: list[_Call] | None = None
    tool_call_id: str | None = None


class _Declared(_Strict):
    name: Annotated[str, Field(min_length=1)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Literal[False] | None = None


class _Tool(_Strict):
    type: Literal["function"]
    function: _Declared


class _StreamOptions(_Strict):
    include_usage: bool = False


Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
Id = Annotated[int, Field(ge=0)]


class Request(_Strict):
    """What both kinds of completion take. Temperature 0 by default: the likeliest answer, as `truetune chat` gives."""

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    # Who asks: there is nothing to do with it.
    user: str | None = None

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def has_usage(self) -> bool:
        """True if a stream is to end with the count of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(Request):
    """The body of /v1/chat/completions. `chat_template_kwargs`: for the template, over those of the run."""

    messages: Annotated[list[_Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: Annotated[list[_Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    chat_template_kwargs: dict[str, bool | int | str] | None = None

    @property
    def num_logprobs(self) -> int | None:
        """Likeliest tokens to tell with each token; None: no log probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def token_limit(self) -> tuple[str, int | None]:
        """The field that limits the answer, and its value."""
        if self.max_completion_tokens is not None:
            return "max_completion_tokens", self.max_completion_tokens
        return "max_tokens", self.max_tokens

    def plain_messages(self) -> list[Message]:
        """Return the messages as the renderer takes them: content is one text, parts are joined."""
        return [_plain(message) for message in self.messages]

    def plain_tools(self) -> list[dict[str, Any]]:
        """Return the tools that the prompt is to show: none if none may be called."""
        if self.tool_choice == "none":
            return []
        return [tool.model_dump(exclude_none=True) for tool in self.tools or []]


class TextRequest(Request):
    """The body of /v1/completions: plain text, or token ids, without a template."""

    prompt: str | list[str] | list[Id] | list[list[Id]]
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @property
    def num_logprobs(self) -> int | None:
        """Likeliest tokens to tell with each token; None: no log probabilities."""
        return self.logprobs

    @property
    def token_limit(self) -> tuple[str, int | None]:
        """The field that limits the answer, and its value."""
        return "max_tokens", self.max_tokens

    def prompts(self) -> Sequence[str | list[int]]:
        """Return each prompt."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        several = [one for one in self.prompt if not isinstance(one, int)]
        return several or [[one for one in self.prompt if isinstance(one, int)]]


Kind = TypeVar("Kind", bound=Request)


def parse(kind: type[Kind], body: bytes) -> Kind:
    """Return the request in a body.

    Raises: Refused, naming the field.
    """
    values = _read_json(body)
    _drop_neutral(values, kind, "")
    messages = values.get("messages")
    for number, message in enumerate(messages if isinstance(messages, list) else ()):
        if isinstance(message, dict):
            # What a client sends back of an answer: refusal, audio, annotations, all null.
            _drop_neutral(message, _Message, f"messages[{number}].", {"annotations": ([],), "tool_calls": ([],)})
    try:
        request = kind.model_validate(values)
    except ValidationError as error:
        raise _refusal(error) from None
    _check(request)
    return request


def _read_json(body: bytes) -> dict[str, Any]:
    try:
        values = json.loads(body, parse_constant=_no_constant, object_pairs_hook=_object)
        # A lone half of a character ("\\ud83d") is no text.
        json.dumps(values, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise Refused("json", problem=str(error)[:200]) from None
    if not isinstance(values, dict):
        raise Refused("json", problem="not an object")
    return values


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a key comes twice")
    return values


def _drop_neutral(
    values: dict[str, Any], kind: type[BaseModel], place: str, neutral: dict[str, tuple[Any, ...]] = NEUTRAL
) -> None:
    """Remove the fields that ask for nothing; refuse others that are not supported."""
    for name in [name for name in values if name not in kind.model_fields or values[name] == []]:
        value = values[name]
        asks = value is not None and not any(
            value == known and isinstance(value, bool) == isinstance(known, bool) for known in neutral.get(name, ())
        )
        if not asks:
            del values[name]
        elif name not in kind.model_fields:
            raise Refused("unsupported", param=place + name, code="unsupported_field", name=place + name)


def _refusal(error: ValidationError) -> Refused:
    # Of a value that may be of several kinds, the kind that came nearest.
    fault = max(error.errors(include_url=False, include_input=False), key=lambda one: len(one["loc"]))
    place = ""
    for part in fault["loc"]:
        if isinstance(part, int):
            place += f"[{part}]"
        elif part in Request.model_fields or (part.isidentifier() and part not in ("str", "int", "bool")):
            place += f".{part}" if place else part
    if fault["type"] == "extra_forbidden":
        return Refused("unsupported", param=place, code="unsupported_field", name=place)
    if fault["type"] == "missing":
        return Refused("missing", param=place, code="missing_field", name=place)
    return Refused("value", param=place, code="invalid_value", name=place, problem=fault["msg"])


def _plain(message: _Message) -> Message:
    values = message.model_dump(exclude_none=True, exclude={"content"})
    content = message.content
    if isinstance(content, list):
        content = "".join(part.text for part in content)
    return {"role": message.role, "content": content or "", **values}


def _check(request: Request) -> None:
    """Refuse what is well formed and makes no sense."""
    if request.stream_options is not None and not request.stream:
        raise Refused("needs", param="stream_options", name="stream_options", other="stream")
    if not isinstance(request, ChatRequest):
        return
    if request.top_logprobs is not None and not request.logprobs:
        raise Refused("needs", param="top_logprobs", name="top_logprobs", other="logprobs")
    if request.max_tokens is not None and request.max_completion_tokens not in (None, request.max_tokens):
        raise Refused("both_limits", param="max_tokens")
    for number, message in enumerate(request.messages):
        _check_message(f"messages[{number}]", request.messages[:number], message)
    if request.messages[-1].role == "assistant":
        raise Refused("last_turn", param=f"messages[{len(request.messages) - 1}].role")


def _check_message(place: str, before: Sequence[_Message], message: _Message) -> None:
    role = message.role
    if role == "system" and before:
        raise Refused("late_system", param=f"{place}.role")
    if message.content is None and not message.tool_calls:
        raise Refused("no_content", param=f"{place}.content", name=f"{place}.content")
    for name in ("tool_calls", "reasoning_content"):
        if getattr(message, name) is not None and role != "assistant":
            raise Refused("of_role", param=f"{place}.{name}", name=f"{place}.{name}", role="assistant")
    if (message.tool_call_id is not None) != (role == "tool"):
        raise Refused("of_role", param=f"{place}.tool_call_id", name=f"{place}.tool_call_id", role="tool")
    if role == "tool":
        made = [call.id for turn in before for call in turn.tool_calls or []]
        if message.tool_call_id not in made:
            raise Refused("no_call", param=f"{place}.tool_call_id", id=message.tool_call_id)
    for number, call in enumerate(message.tool_calls or []):
        arguments = _parsed(call.function.arguments)
        if not isinstance(arguments, dict):
            field = f"{place}.tool_calls[{number}].function.arguments"
            raise Refused("arguments", param=field, name=field)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
