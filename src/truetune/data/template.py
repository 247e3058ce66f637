"""Messages → token ids, for training and for use: the sole caller of `apply_chat_template`.

One renderer gives the prompt that inference sends and the pairs that training learns, so the two cannot differ:

    prompt    <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n                     add_generation_prompt=True
    full      <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nHello<|im_end|>\\n    with the answer
    rest                                                             Hello<|im_end|>\\n    = full minus prompt
    answer                                                           Hello<|im_end|>      up to the first stop token

Control tokens in the user's own text stay text: transformers marks them before rendering and encodes them apart
(`mark_control_tokens`, `encode_marked_chat` in transformers 5.23, utils/chat_template_utils.py:477).
"""

from __future__ import annotations

import datetime
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError

from truetune.data.formats import is_target
from truetune.errors import RowError, UserError
from truetune.records import Conversation, Message, Pair, first_difference

TEMPLATES = {
    "chatml": (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
        " + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "instruction-response": (
        "{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] + '\n\n' }}"
        "{% elif message['role'] == 'user' %}{{ '### Instruction:\n' + message['content'] + '\n\n' }}"
        "{% else %}{{ '### Response:\n' + message['content'] + (eos_token or '') + '\n\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
    ),
}
"""For tokenizers without a chat template of their own; written out with the adapter."""

OPEN_THINKING, CLOSE_THINKING = "<think>", "\n</think>\n\n"
TEMPLATE_FILE = "chat_template.jinja"
CHATML_STOP = "<|im_end|>"
_TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, KeyError)
_CLOCK = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
# Characters that transformers' markers use; a row that holds them itself would lose them.
_MARKERS = re.compile("[\U000f0000\U000f0001]")


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
    def appends_stop(self) -> bool:
        """True if the template ends an answer without a stop token (GLM-4's shape), so that one is appended."""
        turns = self._with_system([{"role": "user", "content": "."}, {"role": "assistant", "content": "."}])
        try:
            full, prompt = self._render(turns, prompt=False), self._render(turns[:-1], prompt=True)
        except _TEMPLATE_ERRORS:
            return False
        return not set(self.stop_ids) & set(self._encode(full[len(prompt) :]))

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids that inference sends for `messages`, the generation prompt last.

        Raises: UserError if the template refuses the messages.
        """
        try:
            return self._encode(self._render(self._with_system(messages), prompt=True))
        except _TEMPLATE_ERRORS as error:
            raise UserError("template_raised", where="chat template", fix="template_raised", problem=error) from None

    def pairs(self, conversation: Conversation, *, last_turn_only: bool = False) -> list[Pair]:
        """Return one Pair for every learned turn of the conversation.

        Raises: RowError if the template cannot show a turn as prompt + answer + stop token, without loss.
        """
        messages = self._with_system(conversation.messages)
        turns = [number for number, message in enumerate(messages) if is_target(message)]
        return [self._pair(conversation.where, messages, turn) for turn in turns[-1 if last_turn_only else 0 :]]

    def save_tokenizer(self, folder: Path) -> None:
        """Write the tokenizer with this template, so that every tool renders what was trained."""
        self.tokenizer.chat_template = self.chat_template
        self.tokenizer.save_pretrained(str(folder))

    def _with_system(self, messages: Sequence[Message]) -> list[Message]:
        """Put the run's system prompt before messages that have none."""
        if self.system is None or (messages and messages[0]["role"] == "system"):
            return list(messages)
        return [{"role": "system", "content": self.system}, *messages]

    def _pair(self, where: str, messages: list[Message], turn: int) -> Pair:
        """Return the pair of the assistant's message at index `turn`."""
        texts = [str(value) for message in messages[: turn + 1] for value in message.values()]
        if any(map(_MARKERS.search, texts)):
            raise RowError("row_private_character", where=where, fix="row_bad_character")
        try:
            prompt = self._render(messages[:turn], prompt=True)
            full = self._render(messages[: turn + 1], prompt=False)
        except _TEMPLATE_ERRORS as error:
            raise RowError("template_raised", where=where, fix="template_raised", problem=error) from None
        rest: str | None = full[len(prompt) :]
        if not full.startswith(prompt):
            rest = self._behind_open_thinking(prompt, full, messages[turn])
        if rest is None:
            raise self._not_a_prefix(where, prompt, full, messages[turn])
        given = [self._marked(str(messages[turn].get(key, ""))) for key in ("content", "reasoning_content")]
        if any(text.strip() not in rest for text in given):
            raise RowError("template_loses_text", where=where, fix="template_loses_text", rest=_shown(rest))
        answer_ids = self._until_stop(where, self._encode(rest))
        num_given_tokens = sum(len(self._encode(text if text in rest else text.strip())) for text in given)
        num_template_tokens = max(len(answer_ids) - num_given_tokens, 1)
        return Pair(tuple(self._encode(prompt)), tuple(answer_ids), num_template_tokens)

    @property
    def opens_thinking(self) -> bool:
        """True if the prompt ends inside a thinking block (DeepSeek-R1's distills, QwQ)."""
        try:
            return self._render([{"role": "user", "content": "."}], prompt=True).rstrip().endswith(OPEN_THINKING)
        except _TEMPLATE_ERRORS:
            return False

    def _behind_open_thinking(self, prompt: str, full: str, message: Message) -> str | None:
        """Return what follows a prompt that opens a thinking block which the full text drops, else None.

        prompt   <user>Q<assistant><think>\\n
        full     <user>Q<assistant>answer<stop>
        rest     reasoning\\n</think>\\n\\nanswer<stop>      without reasoning the block is empty
        """
        before, thinking, behind = prompt.rpartition(OPEN_THINKING)
        content = self._marked(str(message["content"])).strip()
        shown = full[len(before) :]
        if not thinking or behind.strip() or not full.startswith(before) or content not in shown:
            return None
        reasoning = self._marked(str(message.get("reasoning_content", "")))
        return f"{reasoning}{CLOSE_THINKING}{content}{shown[shown.index(content) + len(content) :]}"

    def _until_stop(self, where: str, rest_ids: list[int]) -> list[int]:
        """Cut behind the first stop id; where the template writes none (GLM-4's shape), append the first declared."""
        end = next((number for number, token in enumerate(rest_ids) if token in self.stop_ids), None)
        if end is None:
            return [*rest_ids, self.stop_ids[0]]
        behind = [token for token in rest_ids[end + 1 :] if token not in self.stop_ids]
        if self.tokenizer.decode(behind).strip():
            text = _shown(self.tokenizer.decode(rest_ids[end + 1 :]))
            raise RowError("template_text_behind_stop", where=where, fix="template_loses_text", rest=text)
        return rest_ids[: end + 1]

    def _not_a_prefix(self, where: str, prompt: str, full: str, message: Message) -> RowError:
        start = max(first_difference(prompt, full) - 20, 0)
        shown = {"prompt": _shown(prompt[start:]), "full": _shown(full[start:])}
        has_reasoning = bool(message.get("reasoning_content")) or CLOSE_THINKING.strip() in str(message["content"])
        if has_reasoning and self.template_kwargs.get("enable_thinking") is False:
            return RowError("template_not_prefix", where=where, fix="template_thinking_off", **shown)
        return RowError("template_not_prefix", where=where, fix="template_not_prefix", **shown)

    def _marked(self, content: str) -> str:
        """Return the text with its control tokens marked, as the renderer sees it."""
        from transformers.utils.chat_template_utils import mark_control_tokens

        marked: str = mark_control_tokens(content, self._control_tokens)
        return marked

    @cached_property
    def _control_tokens(self) -> re.Pattern[str]:
        """Matches each control token. Private names of transformers 5.23: a test compares with its public path."""
        from transformers.utils.chat_template_utils import _get_control_token_patterns

        tokens = self.tokenizer._get_control_tokens(self.chat_template)
        pattern: re.Pattern[str] = _get_control_token_patterns(tokens)[0]
        return pattern

    def _render(self, messages: Sequence[Message], *, prompt: bool) -> str:
        """Return the rendered text, the user's control tokens marked."""
        from transformers.utils.chat_template_utils import mark_control_tokens

        pattern = self._control_tokens
        known = [{key: value for key, value in message.items() if key != "is_target"} for message in messages]
        text: str = self.tokenizer.apply_chat_template(
            mark_control_tokens(known, pattern),
            tokenize=False,
            add_generation_prompt=prompt,
            chat_template=self.chat_template,
            **mark_control_tokens(self.template_kwargs, pattern),
        )
        return text

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, sanitize_control_tokens=True)["input_ids"]
        return ids


def _shown(text: str, width: int = 60) -> str:
    """Return the start of a text for an error message, markers dropped."""
    text = _MARKERS.sub("", text)
    return repr(text if len(text) <= width else text[:width] + "…")


def freeze_clock(chat_template: str, date: datetime.date) -> str:
    """Return the template with every `strftime_now("...")` replaced by the date, so that all tools render it alike.

    Raises: UserError if the template reads its clock in another way.

    >>> freeze_clock("{{ strftime_now('%d %b %Y') }}", datetime.date(2024, 11, 25))
    '{{ "25 Nov 2024" }}'
    """
    frozen = _CLOCK.sub(lambda match: f'"{date.strftime(match[2])}"', chat_template)
    if "strftime_now(" in frozen:
        raise UserError("template_clock", where="chat template", fix="template_clock")
    return frozen


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
    frozen_at = today.isoformat() if frozen != chat_template else None
    return Renderer(tokenizer, frozen, tuple(stop_ids), system, template_kwargs or {}, frozen_at)
