"""Templates as such: our own two, the clock of one, what one may raise, and how long it may take."""

from __future__ import annotations

import datetime
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jinja2.exceptions import TemplateError

from truetune.errors import UserError

TEMPLATE_ERRORS = (
    *(TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError),
)
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


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """End the block with a ValueError after some time. Only the main thread can be interrupted; elsewhere no limit."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_: Any) -> None:
        raise ValueError(f"the template was not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


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
