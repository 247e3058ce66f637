"""The short way to render; clocks and our own templates: test_template.py."""

from __future__ import annotations

import datetime
import itertools
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from truetune.data.jinja import TEMPLATE_ERRORS, TEMPLATES, freeze_clock, is_simple, render_simple

# --- simple conversations, rendered without copies ---

ROLES = ("system", "user", "assistant")
NAMES = (
    "{{ m.items() | list }}",
    "{{ m.keys }}",
    "{{ m.get('role') }}",
    "{{ m.role }}{{ m['content'] }}{{ m.absent }}",
)
ODD = [
    "{% for m in messages %}"
    + name
    + "{% endfor %}{{ add_generation_prompt }}{{ tools is none }}{{ documents is none }}"
    for name in NAMES
]
ODD += [
    "{% for m in messages %}{{ m.content.__class__ }}{% endfor %}",
    "{% for m in messages %}{{ m.__class__.__mro__ }}{% endfor %}",
    "{{ messages[0].update({'role': 'x'}) }}",
    "{{ messages.append(1) }}",
    "{{ '{0.__class__}'.format(messages[0]) }}",
    "{% generation %}{{ messages[-1].content }}{% endgeneration %}{{ eos_token }}",
]


def _shown(render: Callable[[], list[str]]) -> list[str] | str:
    """Return what is rendered, or what is raised, without what is different in every process."""
    try:
        return [re.sub(r" at 0x[0-9a-f]+", "", text) for text in render()]
    except TEMPLATE_ERRORS as error:
        return f"{type(error).__name__}: {re.sub(r' at 0x[0-9a-f]+', '', str(error))}"


@pytest.mark.parametrize("template", [*ODD, *TEMPLATES.values(), None])
def test_simple_is_as_transformers_renders(template: str | None, qwen_tokenizer: Any) -> None:
    """Also what is refused: the sandbox is theirs."""
    template = freeze_clock(template or qwen_tokenizer.chat_template, datetime.date(2024, 11, 25))
    words = ("Hi", " 你好 {{ x }}\n", "", "<think>\na\n</think>\n\nb")
    chats = [
        [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
        for roles in (ROLES[1:2], ROLES[1:], ROLES, (*ROLES, *ROLES[1:]))
        for contents in itertools.islice(itertools.product(words, repeat=len(roles)), 40)
    ]
    assert all(map(is_simple, chats))
    different = set()
    for chat in chats:
        for prompt in (False, True):
            variables = {"add_generation_prompt": prompt, "enable_thinking": True}
            given = qwen_tokenizer.special_tokens_map | variables
            ours = _shown(partial(render_simple, template, [chat], given=given))
            public = partial(qwen_tokenizer.apply_chat_template, [chat], tokenize=False, chat_template=template)
            theirs = _shown(partial(public, **variables))
            assert ours == theirs
            different.add(str(ours))
    assert len(different) > len(words) or template in ODD[4:]


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user"},
        {"role": "user", "content": None},
        {"role": "user", "content": ["a"]},
        {"role": "assistant", "content": "a", "reasoning_content": "b"},
        {"role": "assistant", "content": "a", "tool_calls": []},
        {"role": type("Role", (str,), {})("user"), "content": "a"},
    ],
)
def test_not_simple(message: dict[str, Any]) -> None:
    assert is_simple([{"role": "user", "content": "a"}])
    assert not is_simple([{"role": "user", "content": "a"}, message])
