"""Messages → token ids, for training and for use: the sole caller of `apply_chat_template`.

One renderer gives the prompt that inference sends and the pairs that training learns, so the two cannot differ:

    prompt    <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n                     add_generation_prompt=True
    full      <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nHello<|im_end|>\\n    with the answer
    rest                                                             Hello<|im_end|>\\n    = full minus prompt
    answer                                                           Hello<|im_end|>      up to the first stop token

Control tokens in the user's own text stay text: they are marked before rendering and encoded apart (encode.py). Rows
are rendered and encoded many at a time: `render`, `encode`, `finish`.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from truetune.data.encode import MARKERS, Encoded, Encoder
from truetune.data.jinja import TEMPLATE_ERRORS, TEMPLATES, compiled, freeze_clock, is_simple, render_simple
from truetune.data.turns import is_target
from truetune.errors import RowError, UserError
from truetune.records import Conversation, Message, Pair, first_difference
from truetune.signals import limited

OPEN_THINKING, CLOSE_THINKING = "<think>", "\n</think>\n\n"
TEMPLATE_FILE = "chat_template.jinja"
CHATML_STOP = "<|im_end|>"
TIME_LIMIT_S = 20
"""Of one call of a template; a template from a model folder may loop for ever."""

Tools = Sequence[dict[str, Any]] | None


@dataclass(frozen=True, slots=True)
class Draft:
    """The texts of one pair, before they are tokens. `given`: what of `rest` the row itself holds; None: plain text."""

    prompt: str
    rest: str
    given: tuple[str, ...] | None


@dataclass(frozen=True, slots=True)
class _Turn:
    """One learned turn: the row's messages up to it, control tokens marked; the last one is the answer."""

    where: str
    messages: list[Message]
    tools: Tools


@dataclass(frozen=True)
class Renderer:
    """A tokenizer with its template, and all that changes what is rendered.

    `stop_ids`: ids that end a turn (generation_config's, then the tokenizer's). `system`: for conversations without a
    system message. `template_kwargs`: passed to the template. `date`: what its clock is frozen at (ISO), if it has one.
    """

    tokenizer: Any
    chat_template: str
    stop_ids: tuple[int, ...]
    system: str | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    date: str | None = None

    @property
    def template_hash(self) -> str:
        """sha256 of the template's text."""
        return hashlib.sha256(self.chat_template.encode()).hexdigest()

    @property
    def tokenizer_hash(self) -> str:
        """sha256 of the tokenizer: of its Rust part, or of its files where it has none."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        told = backend.to_str() if backend is not None else str(sorted(self.tokenizer.get_vocab().items()))
        told += str(sorted(self.tokenizer.special_tokens_map.items()))
        return hashlib.sha256(told.encode()).hexdigest()

    @property
    def appends_stop(self) -> bool:
        """True if the template ends an answer without a stop token (GLM-4's shape), so that one is appended."""
        turns = self._with_system([{"role": "user", "content": "."}, {"role": "assistant", "content": "."}])
        try:
            prompt, full = self._render(turns[:-1], prompt=True), self._render(turns, prompt=False)
        except TEMPLATE_ERRORS:
            return False
        rest = full[len(prompt) :] if full.startswith(prompt) else self._behind_open_thinking(prompt, full, turns[-1])
        return not set(self.stop_ids) & set(self._encoder.encode_marked(rest or full))

    @property
    def opens_thinking(self) -> bool:
        """True if the prompt ends inside a thinking block (DeepSeek-R1's distills, QwQ)."""
        try:
            return self._render([{"role": "user", "content": "."}], prompt=True).rstrip().endswith(OPEN_THINKING)
        except TEMPLATE_ERRORS:
            return False

    def prompt_ids(self, messages: Sequence[Message], *, tools: Tools = None) -> list[int]:
        """Return the ids that inference sends for `messages`, the generation prompt last.

        Raises: UserError if the template refuses the messages.
        """
        marked = self._encoder.marked(_known(self._with_system(messages)))
        try:
            return self._encoder.encode_marked(self._render(marked, prompt=True, tools=tools))
        except TEMPLATE_ERRORS as error:
            raise UserError("template_raised", where="chat template", fix="template_raised", problem=error) from None

    def text_ids(self, text: str) -> list[int]:
        """Return the ids of plain text, without a template: control tokens only where a text begins with one."""
        return [*self.begin_ids, *self._encoder.encode_marked(self._encoder.marked(text))]

    def pairs(self, conversation: Conversation, *, last_turn_only: bool = False) -> list[Pair]:
        """Return one Pair for every learned turn of the conversation; of a preference pair, the rejected one last.

        Raises: RowError if the template cannot show a turn as prompt + answer + stop token, without loss.
        """
        (drafts,) = self.render([conversation], last_turn_only=last_turn_only)
        if isinstance(drafts, RowError):
            raise drafts
        return self.finish(drafts, self.encode(drafts), where=conversation.where)

    def render(
        self, conversations: Sequence[Conversation], *, last_turn_only: bool = False
    ) -> list[list[Draft] | RowError]:
        """Return the texts of each conversation's pairs, or why the template cannot show them."""
        jobs = [self._turns(conversation, last_turn_only=last_turn_only) for conversation in conversations]
        # One call of the template's library for all rows without tools: the call costs as much as several rows.
        plain = [turn for job in jobs if not isinstance(job, RowError) for turn in job if turn.tools is None]
        shown = dict(zip(map(id, plain), self._texts(plain), strict=True))
        results: list[list[Draft] | RowError] = []
        for conversation, job in zip(conversations, jobs, strict=True):
            if isinstance(job, RowError):
                results.append(job)
                continue
            try:
                drafts = [self._draft(turn, shown.get(id(turn)) or self._texts([turn])[0]) for turn in job]
                results.append(drafts if conversation.text is None else [self._whole(conversation.text)])
            except RowError as error:
                results.append(error)
        return results

    def encode(self, drafts: Sequence[Draft]) -> list[tuple[Encoded, Encoded]]:
        """Return the tokens of each draft's prompt and rest. Another thread may call it."""
        prompts = self._encoder.encode([draft.prompt for draft in drafts])
        rests = self._encoder.encode([draft.rest for draft in drafts], with_places=True)
        return list(zip(prompts, rests, strict=True))

    def finish(self, drafts: Sequence[Draft], encoded: Sequence[tuple[Encoded, Encoded]], *, where: str) -> list[Pair]:
        """Return the pairs of one conversation.

        Raises: RowError if text follows an answer's stop token.
        """
        return [self._pair(where, draft, *tokens) for draft, tokens in zip(drafts, encoded, strict=True)]

    def save_tokenizer(self, folder: Path) -> None:
        """Write the tokenizer with this template, so that every tool renders what was trained."""
        self.tokenizer.chat_template = self.chat_template
        self.tokenizer.save_pretrained(str(folder))

    @cached_property
    def begin_ids(self) -> tuple[int, ...]:
        """The token bos if the tokenizer itself puts it before plain text, else nothing (SmolLM2's begins turns)."""
        ids, bos_id = self.tokenizer("")["input_ids"], self.tokenizer.bos_token_id
        return (bos_id,) if bos_id is not None and ids[:1] == [bos_id] else ()

    @cached_property
    def _encoder(self) -> Encoder:
        return Encoder(self.tokenizer, self.chat_template)

    @cached_property
    def _system_message(self) -> list[Message]:
        """The run's system prompt as a message, marked (to mark it twice changes nothing); [] if there is none."""
        return [] if self.system is None else [{"role": "system", "content": self._encoder.marked(self.system)}]

    def _with_system(self, messages: Sequence[Message]) -> list[Message]:
        """Put the run's system prompt before messages that have none."""
        has_system = bool(messages) and messages[0]["role"] == "system"
        return list(messages) if has_system else [*self._system_message, *messages]

    def _turns(self, conversation: Conversation, *, last_turn_only: bool) -> list[_Turn] | RowError:
        """Return the turns that are learned; behind them, of a preference pair, the rejected answer."""
        said = "\n".join(_texts_in((conversation.messages, conversation.rejected, conversation.tools)))
        if MARKERS.search(said) or (conversation.text is not None and MARKERS.search(conversation.text)):
            return RowError("row_private_character", where=conversation.where, fix="row_bad_character")
        has_control_token = self._encoder.has_control_token(said)
        turns: list[_Turn] = []
        for messages in filter(None, (conversation.messages, conversation.rejected)):
            targets = [number for number, message in enumerate(messages) if is_target(message)]
            known = _known(messages)
            shown = self._with_system(self._encoder.marked(known) if has_control_token else known)
            added = len(shown) - len(messages)
            is_last_only = last_turn_only or messages is conversation.rejected
            turns += [
                _Turn(conversation.where, shown[: number + added + 1], conversation.tools)
                for number in targets[-1 if is_last_only else 0 :]
            ]
        return turns

    def _texts(self, turns: Sequence[_Turn]) -> list[tuple[str, str] | Exception]:
        """Return (prompt, full text) of each turn, or what the template raised; turns have the same tools."""
        if not turns:
            return []
        tools = turns[0].tools
        try:
            prompts = self._render_many([turn.messages[:-1] for turn in turns], prompt=True, tools=tools)
            fulls = self._render_many([turn.messages for turn in turns], prompt=False, tools=tools)
        except TEMPLATE_ERRORS as error:
            return [error] if len(turns) == 1 else [text for turn in turns for text in self._texts([turn])]
        return list(zip(prompts, fulls, strict=True))

    def _draft(self, turn: _Turn, texts: tuple[str, str] | Exception) -> Draft:
        """Return the texts of a turn, if the full text is its prompt and its answer, with nothing lost."""
        if isinstance(texts, Exception):
            raise RowError("template_raised", where=turn.where, fix="template_raised", problem=texts)
        prompt, full = texts
        answer = turn.messages[-1]
        rest: str | None = full[len(prompt) :]
        if not full.startswith(prompt):
            rest = self._behind_open_thinking(prompt, full, answer)
        if rest is None:
            raise self._not_a_prefix(turn.where, prompt, full, answer)
        calls = [call["function"]["name"] for call in answer.get("tool_calls", ())]
        given = [str(answer.get("content", "")), str(answer.get("reasoning_content", "")), *calls]
        if any(text.strip() not in rest for text in given):
            raise RowError("template_loses_text", where=turn.where, fix="template_loses_text", rest=_shown(rest))
        return Draft(prompt, rest, tuple(given[:2]))

    def _whole(self, text: str) -> Draft:
        """Return plain text as it is: without a template, control tokens marked."""
        return Draft("", self._encoder.marked(text), None)

    def _pair(self, where: str, draft: Draft, prompt: Encoded, rest: Encoded) -> Pair:
        problem = prompt.problem or rest.problem
        if problem:
            raise RowError("template_raised", where=where, fix="template_raised", problem=problem)
        if draft.given is None:
            ids = [*self.begin_ids, *rest.ids, self.stop_ids[0]]
            return Pair((ids[0],), tuple(ids[1:]), 1)
        answer_ids = self._until_stop(where, rest.ids)
        num_given_tokens = sum(_num_given_tokens(self._encoder, draft, rest, text) for text in draft.given)
        return Pair(tuple(prompt.ids), tuple(answer_ids), max(len(answer_ids) - num_given_tokens, 1))

    def _behind_open_thinking(self, prompt: str, full: str, message: Message) -> str | None:
        """Return what follows a prompt that opens a thinking block which the full text drops, else None.

        prompt   <user>Q<assistant><think>\\n
        full     <user>Q<assistant>answer<stop>
        rest     reasoning\\n</think>\\n\\nanswer<stop>      without reasoning the block is empty
        """
        before, thinking, behind = prompt.rpartition(OPEN_THINKING)
        content, shown = str(message["content"]), full[len(before) :]
        if content not in shown:
            content = content.strip()
        if not thinking or behind.strip() or not full.startswith(before) or content not in shown:
            return None
        reasoning = str(message.get("reasoning_content", ""))
        return f"{reasoning}{CLOSE_THINKING}{content}{shown[shown.index(content) + len(content) :]}"

    def _until_stop(self, where: str, rest_ids: list[int]) -> list[int]:
        """Cut behind the first stop id; where the template writes none (GLM-4's shape), append the first declared."""
        end = min((rest_ids.index(stop) for stop in self.stop_ids if stop in rest_ids), default=None)
        if end is None:
            return [*rest_ids, self.stop_ids[0]]
        behind = tuple(token for token in rest_ids[end + 1 :] if token not in self.stop_ids)
        if not self._is_blank(behind):
            text = _shown(self.tokenizer.decode(rest_ids[end + 1 :]))
            raise RowError("template_text_behind_stop", where=where, fix="template_loses_text", rest=text)
        return rest_ids[: end + 1]

    @cached_property
    def _is_blank(self) -> Callable[[tuple[int, ...]], bool]:
        """Whether ids show nothing but white space: nearly always the same few ids behind a stop token."""
        return lru_cache(maxsize=256)(lambda ids: not self.tokenizer.decode(ids).strip())

    def _not_a_prefix(self, where: str, prompt: str, full: str, message: Message) -> RowError:
        start = max(first_difference(prompt, full) - 20, 0)
        shown = {"prompt": _shown(prompt[start:]), "full": _shown(full[start:])}
        has_reasoning = bool(message.get("reasoning_content")) or CLOSE_THINKING.strip() in str(message["content"])
        if has_reasoning and self.template_kwargs.get("enable_thinking") is False:
            return RowError("template_not_prefix", where=where, fix="template_thinking_off", **shown)
        return RowError("template_not_prefix", where=where, fix="template_not_prefix", **shown)

    def _render(self, messages: list[Message], *, prompt: bool, tools: Tools = None) -> str:
        return self._render_many([messages], prompt=prompt, tools=tools)[0]

    def _render_many(self, conversations: list[list[Message]], *, prompt: bool, tools: Tools = None) -> list[str]:
        """Return the rendered texts of marked conversations."""
        given: dict[str, Any] = {"add_generation_prompt": prompt, **self._encoder.marked(self.template_kwargs)}
        with limited(TIME_LIMIT_S, ValueError(f"the template was not done after {TIME_LIMIT_S} s")):
            if tools is None and all(map(is_simple, conversations)):
                variables = self.tokenizer.special_tokens_map | given
                return render_simple(self.chat_template, conversations, given=variables)
            texts: list[str] = self.tokenizer.apply_chat_template(
                conversations,
                tools=None if tools is None else self._encoder.marked(list(tools)),
                tokenize=False,
                chat_template=self.chat_template,
                **given,
            )
        return texts


def _known(messages: Sequence[Message]) -> list[Message]:
    """Return messages as templates know them: without what is the program's own, arguments of calls as objects.

    OpenAI's arguments are JSON text, which a template that writes JSON would write as text in quotes.
    """
    known = []
    for message in messages:
        if "is_target" in message:
            message = {key: value for key, value in message.items() if key != "is_target"}
        if message.get("tool_calls"):
            message = message | {"tool_calls": [_parsed_call(call) for call in message["tool_calls"]]}
        known.append(message)
    return known


def _parsed_call(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    arguments = function.get("arguments")
    return call | {"function": function | {"arguments": json.loads(arguments)}} if isinstance(arguments, str) else call


def _texts_in(value: Any) -> Iterator[str]:
    """Yield every text inside a value, the names of objects apart."""
    for part in value.values() if type(value) is dict else value or ():
        if type(part) is str:
            yield part
        elif isinstance(part, (list, tuple, dict)):
            yield from _texts_in(part)


def _num_given_tokens(encoder: Encoder, draft: Draft, rest: Encoded, text: str) -> int:
    """Return how many of an answer's tokens show a text that the row gave; white space at its ends may be gone."""
    shown = text if text in draft.rest else text.strip()
    if not shown:
        return 0
    start = draft.rest.rindex(shown)
    num_tokens = rest.num_tokens(start, start + len(shown))
    return len(encoder.encode_marked(shown)) if num_tokens is None else num_tokens


def _shown(text: str, width: int = 60) -> str:
    """Return the start of a text for an error message, markers dropped."""
    text = MARKERS.sub("", text)
    return repr(text if len(text) <= width else text[:width] + "…")


def build_renderer(
    tokenizer: Any,
    eos_ids: Sequence[int],
    *,
    template: str | None = None,
    system: str | None = None,
    template_kwargs: dict[str, Any] | None = None,
    date: str | None = None,
) -> Renderer:
    """Return the renderer of a tokenizer: its own chat template, or the named one where it has none.

    `eos_ids`: the stop ids of the model's generation_config; the tokenizer's eos token is added.

    Raises: UserError if there is no template, or no token that could end an answer.
    """
    name = str(tokenizer.name_or_path)
    chat_template = TEMPLATES[template] if template else tokenizer.chat_template
    if chat_template is None:
        raise UserError("template_missing", where=name, fix="template_missing", names=", ".join(TEMPLATES))
    # A dict keeps the order and drops what is named twice.
    stop_ids = dict.fromkeys([*eos_ids, *([tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else [])])
    if template == "chatml":
        stop_id = tokenizer.added_tokens_encoder.get(CHATML_STOP)
        if stop_id is None:
            raise UserError("template_no_chatml", where=name, fix="template_no_chatml", token=CHATML_STOP)
        stop_ids = {stop_id: None} | stop_ids
    if not stop_ids:
        raise UserError("template_no_stop", where=name, fix="template_no_stop")
    today = datetime.date.fromisoformat(date) if date else datetime.date.today()
    frozen = freeze_clock(chat_template, today)
    try:
        compiled(frozen)
    except TEMPLATE_ERRORS as error:
        raise UserError("template_broken", where=name, fix="template_broken", problem=error) from None
    frozen_at = today.isoformat() if frozen != chat_template else None
    return Renderer(tokenizer, frozen, tuple(stop_ids), system, template_kwargs or {}, frozen_at)
