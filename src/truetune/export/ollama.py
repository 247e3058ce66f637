"""A Modelfile for Ollama whose template gives the prompts of training: found by asking our renderer, then proven.

Each turn of a template of the usual shapes is a text before and a text behind its content, and they are found by
rendering marks. Ollama's templates are Go's; only the few words of it that are written here are read back (`render`),
and what they give must be the text of every probe.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from truetune.data.template import Renderer
from truetune.errors import UserError
from truetune.records import Message

SYSTEM, USER, ANSWER, LATER = "⟪system⟫", "⟪user⟫", "⟪answer⟫", "⟪later⟫"
RANGE = "{{ range $i, $_ := .Messages }}"
FIRST, LAST = "(eq $i 1)", "(eq (len (slice $.Messages $i)) 1)"


@dataclass(frozen=True)
class Wrap:
    """The text before and behind a turn's content."""

    before: str
    behind: str


@dataclass(frozen=True)
class Shape:
    """How a template writes turns.

    `system`: None if the system prompt stands inside a user's turn (`place`), with `join` behind it. `default`: what is
    written where there is no system prompt. `opening`: what an answer begins with.
    """

    user: Wrap
    answer: Wrap
    opening: str
    default: str
    system: Wrap | None
    place: str = ""
    join: str = ""


def modelfile(renderer: Renderer, *, probes: Sequence[dict[str, Any]], weights: str, skip: str = "") -> str:
    """Return the Modelfile. `weights`: name of the GGUF file. `skip`: text of the token that llama.cpp adds in front.

    Raises: UserError if the template is of another shape, or a probe is rendered otherwise.
    """
    template = go_template(renderer, skip=skip)
    prove(template, renderer, probes=probes, skip=skip)
    stops = [renderer.tokenizer.decode([number]) for number in renderer.stop_ids]
    lines = [f"FROM ./{weights}", f"TEMPLATE {_quoted(template)}"]
    lines += [f"SYSTEM {_quoted(renderer.system)}"] if renderer.system else []
    lines += [f'PARAMETER stop "{stop}"' for stop in dict.fromkeys(stops)]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    if '"""' in text:
        raise UserError("ollama_shape", where="SYSTEM", fix="ollama_shape", problem='"""')
    return f'"""{text}"""'


def prove(template: str, renderer: Renderer, *, probes: Sequence[dict[str, Any]], skip: str = "") -> int:
    """Render every probe without tools by `template` and compare texts; return how many there were.

    Raises: UserError at the first that differs.
    """
    num_compared = 0
    for number, probe in enumerate(probes, start=1):
        if probe.get("tools") or probe.get("chat_template_kwargs"):
            continue
        messages = list(probe["messages"])
        if renderer.system is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": renderer.system})
        ids = probe["prompt_ids"]
        if skip + render(template, messages) != renderer.tokenizer.decode(ids, skip_special_tokens=False):
            raise UserError("ollama_prompt", where="TEMPLATE", fix="ollama_shape", number=number, problem="")
        num_compared += 1
    return num_compared


def go_template(renderer: Renderer, *, skip: str = "") -> str:
    """Return a Go template of the renderer's shape.

    Raises: UserError if it is none of the shapes known here.
    """
    shape = find_shape(renderer, skip=skip)
    texts = [shape.user, shape.answer, *([shape.system] if shape.system else [])]
    if any("{{" in part or "}}" in part for wrap in texts for part in (wrap.before, wrap.behind)):
        raise UserError("ollama_shape", where="chat template", fix="ollama_shape", problem="{{")
    inside = (
        f"{{{{ if and $.System {shape.place} }}}}{{{{ $.System }}}}{shape.join}{{{{ end }}}}" if shape.place else ""
    )
    head = f"{{{{ if not .System }}}}{shape.default}{{{{ end }}}}" if shape.default else ""
    system = shape.system
    branch = f'if eq .Role "system" }}}}{system.before}{{{{ .Content }}}}{system.behind}{{{{ else ' if system else ""
    return (
        f"{head}{RANGE}{{{{ {branch}"
        f'if eq .Role "user" }}}}{shape.user.before}{inside}{{{{ .Content }}}}{shape.user.behind}'
        f'{{{{ else if eq .Role "assistant" }}}}{shape.answer.before}{{{{ .Content }}}}{shape.answer.behind}'
        f"{{{{ end }}}}{{{{ end }}}}{shape.opening}"
    )


def find_shape(renderer: Renderer, *, skip: str = "") -> Shape:
    """Return the shape of a template, by rendering marks.

    Raises: UserError if it has no shape that is known here.
    """
    plain = Renderer(renderer.tokenizer, renderer.chat_template, renderer.stop_ids, None, renderer.template_kwargs)

    def shown(*messages: tuple[str, str]) -> str:
        turns: list[Message] = [{"role": role, "content": content} for role, content in messages]
        text = str(renderer.tokenizer.decode(plain.prompt_ids(turns), skip_special_tokens=False))
        return text.removeprefix(skip)

    one = shown(("user", USER))
    two = shown(("user", USER), ("assistant", ANSWER), ("user", LATER))
    full = shown(("system", SYSTEM), ("user", USER))
    longer = shown(("system", SYSTEM), ("user", USER), ("assistant", ANSWER), ("user", LATER))
    if any(mark not in text for text, mark in ((one, USER), (two, ANSWER), (two, LATER), (full, SYSTEM))):
        raise UserError("ollama_shape", where="chat template", fix="ollama_shape", problem="…")
    ending = one.split(USER)[1]
    between, behind_answer = two.split(ANSWER)[0].split(USER)[1], two.split(ANSWER)[1].split(LATER)[0]
    head = one.split(USER)[0]
    before_user = _common_end(head, behind_answer)
    for stop in renderer.tokenizer.batch_decode([[number] for number in renderer.stop_ids]):
        # A default system turn ends as an answer does: that end is not the beginning of a user's turn.
        before_user = before_user.rpartition(stop)[2].lstrip() if stop in before_user else before_user
    # `ending` is a user's end and the opening of an answer; `between` is that end and what stands before an answer.
    behind = _common_start(ending, between)
    with suppress(UserError):
        # Two users in a row, where the template lets them, tell where that end is.
        alone = shown(("user", USER), ("user", LATER)).split(USER)[1].split(LATER)[0].removesuffix(before_user)
        behind = alone if behind.startswith(alone) else behind
    opening, before_answer = ending[len(behind) :], between[len(behind) :]
    answer = Wrap(before_answer, behind_answer.removesuffix(before_user))
    user = Wrap(before_user, behind)
    default = head.removesuffix(before_user)
    front, rest = full.split(SYSTEM)
    if front.endswith(before_user) and not rest.split(USER)[0].endswith(before_user):
        place = FIRST if longer.index(SYSTEM) < longer.index(ANSWER) else LAST
        return Shape(user, answer, opening, default, None, place, rest.split(USER)[0])
    return Shape(user, answer, opening, default, Wrap(front, rest.split(USER)[0].removesuffix(before_user)))


def _common_start(a: str, b: str) -> str:
    count = next((at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return a[:count]


def _common_end(a: str, b: str) -> str:
    return _common_start(a[::-1], b[::-1])[::-1]


# --- the part of Go's templates that is written above ---

_PIECE = re.compile(r"\{\{ (.*?) \}\}", re.DOTALL)


def render(template: str, messages: Sequence[Message]) -> str:
    """Return what Ollama sends for messages; a system message is in .Messages and in .System.

    Raises: ValueError at a word that is not written here.
    """
    parts = _PIECE.split(template)
    # Text and actions take turns.
    tokens = [(number % 2 == 1, part) for number, part in enumerate(parts)]
    system = "".join(str(message["content"]) for message in messages if message["role"] == "system")
    text, at = _block(tokens, 0, {"messages": list(messages), "system": system})
    if at != len(tokens):
        raise ValueError("end without a beginning")
    return text


def _block(tokens: list[tuple[bool, str]], at: int, scope: dict[str, Any]) -> tuple[str, int]:
    """Return (text, place of the `else` or `end` that closes it) from place `at` on."""
    text = ""
    while at < len(tokens):
        is_action, word = tokens[at]
        if not is_action:
            text, at = text + word, at + 1
        elif word.startswith(("else", "end")):
            return text, at
        elif word.startswith("range"):
            pieces = [
                _block(tokens, at + 1, scope | {"number": number, "message": message})
                for number, message in enumerate(scope["messages"])
            ]
            text += "".join(piece for piece, _ in pieces)
            at = pieces[0][1] + 1
        elif word.startswith("if "):
            piece, at = _choice(tokens, at, scope)
            text += piece
        else:
            text, at = text + str(_value(word, scope)), at + 1
    return text, at


def _choice(tokens: list[tuple[bool, str]], at: int, scope: dict[str, Any]) -> tuple[str, int]:
    """Return (text of the branch that is taken, place behind its `end`)."""
    taken: str | None = None
    while tokens[at][1] != "end":
        condition = tokens[at][1].removeprefix("else ").removeprefix("if ")
        piece, place = _block(tokens, at + 1, scope)
        if taken is None and (tokens[at][1] == "else" or _value(condition, scope)):
            taken = piece
        at = place
    return taken or "", at + 1


def _value(word: str, scope: dict[str, Any]) -> Any:
    """Return the value of one of the expressions that are written here."""
    message = scope.get("message", {})
    known = {".Content": message.get("content", ""), "$.System": scope["system"], "not .System": not scope["system"]}
    if word in known:
        return known[word]
    if word.startswith("and $.System "):
        return bool(scope["system"]) and _value(word.removeprefix("and $.System "), scope)
    if word == FIRST:
        return scope["number"] == 1
    if word == LAST:
        return len(scope["messages"]) - scope["number"] == 1
    role = re.fullmatch(r'eq \.Role "(\w+)"', word)
    if role is None:
        raise ValueError(word)
    return message["role"] == role[1]
