"""Templates as such: our own two, the clock of one, what one may raise, and simple conversations rendered fast."""

from __future__ import annotations

import datetime
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from jinja2 import meta
from jinja2.exceptions import TemplateError

from truetune.errors import UserError
from truetune.records import Message

TEMPLATE_ERRORS = (
    *(TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError),
)
SIMPLE_KEYS = {"role", "content"}
OF_EVERY_TEMPLATE = {
    *("messages", "documents", "add_generation_prompt", "bos_token", "eos_token", "pad_token", "unk_token"),
    *("raise_exception", "strftime_now", "tojson", "namespace", "range", "dict", "lipsum", "cycler", "joiner"),
}
OF_EVERY_DICT = frozenset(dir(dict))
_CLOCK = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")

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


def is_simple(messages: Sequence[Message]) -> bool:
    """Return whether all messages are a role and a text and nothing else, so that `render_simple` may render them."""
    return all(
        message.keys() == SIMPLE_KEYS and type(message["role"]) is str and type(message["content"]) is str
        for message in messages
    )


def render_simple(chat_template: str, chats: Sequence[list[Message]], *, given: dict[str, Any]) -> list[str]:
    """Return what `apply_chat_template` returns for simple conversations, without copying every value three times.

    `given` is all else that the template sees.
    """
    template = compiled(chat_template)
    return [template.render(messages=chat, tools=None, documents=None, **given) for chat in chats]


@lru_cache(maxsize=8)
def variables(chat_template: str) -> frozenset[str]:
    """Return what a template reads of the values it is given, other than what every template gets.

    >>> sorted(variables("{% if tools %}{{ tools }}{% endif %}{{ messages }}{{ mood }}"))
    ['mood', 'tools']
    """
    tree = compiled(chat_template).environment.parse(chat_template)
    return frozenset(meta.find_undeclared_variables(tree) - OF_EVERY_TEMPLATE)


@lru_cache(maxsize=8)
def compiled(chat_template: str) -> Any:
    """Return the template in transformers' own sandbox, where a key of a message is found faster.

    For `message.role` Jinja asks the dict for an attribute first, and the fault this raises costs more than the rest.

    Raises: TemplateError if it is no template.
    """
    from transformers.utils.chat_template_utils import _compile_jinja_template

    environment = _compile_jinja_template(chat_template).environment.overlay()
    careful = environment.getattr

    def get(value: Any, name: str) -> Any:
        return (
            value[name] if type(value) is dict and name not in OF_EVERY_DICT and name in value else careful(value, name)
        )

    environment.getattr = get
    return environment.from_string(chat_template)
