"""The shapes of well-known families' templates, written anew: each turn's prompt is inference's, each answer is whole.

Only what matters for training is re-created: where a turn opens and ends, what is stripped, raised, dated or left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from truetune.data import template as template_module
from truetune.data.jinja import render_simple
from truetune.data.template import Renderer, build_renderer
from truetune.errors import RowError
from truetune.records import Conversation, Message

ROLE = "{{ m['role'] }}"


class Shape(NamedTuple):
    """A template and its special tokens, the first of `stops` is the eos token. `before`: what stands before an answer.

    `strips`: whether white space at the ends of a text is lost; `has_system`: whether a system message is allowed.
    """

    template: str
    stops: tuple[str, ...]
    specials: tuple[str, ...]
    strips: bool = False
    has_system: bool = True
    before: str = ""
    opens_thinking: bool = False
    appends_stop: bool = False


SHAPES = {
    "Llama 3, dated": Shape(
        "<s>[h]system[/h]\n\nToday Date: {{ strftime_now('%d %b %Y') }}\n\n"
        "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] | trim }}{% endif %}[eot]"
        "{% for m in messages if m['role'] != 'system' %}"
        "[h]{{ m['role'] }}[/h]\n\n{{ m['content'] | trim }}[eot]{% endfor %}"
        "{% if add_generation_prompt %}[h]assistant[/h]\n\n{% endif %}",
        ("[eot]",),
        ("<s>", "[h]", "[/h]"),
        strips=True,
    ),
    "Gemma": Shape(
        "<s>{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for m in messages %}<sot>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
        "{{ m['content'] | trim }}<eot>\n{% endfor %}{% if add_generation_prompt %}<sot>model\n{% endif %}",
        ("<eot>",),
        ("<s>", "<sot>"),
        strips=True,
        has_system=False,
    ),
    "Mistral": Shape(
        "<s>{% for m in messages %}{% if m['role'] == 'assistant' %} {{ m['content'] }}</s>"
        "{% elif m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
        "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}",
        ("</s>",),
        ("<s>", "[INST]", "[/INST]"),
        has_system=False,
        before=" ",
    ),
    "Phi-3": Shape(
        "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}<|endoftext|>{% endif %}",
        ("<|endoftext|>", "<|end|>"),
        ("<|user|>", "<|assistant|>", "<|system|>"),
    ),
    "GLM-4": Shape(
        "[gMASK]<sop>{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        ("<|user|>", "<|endoftext|>"),
        ("[gMASK]", "<sop>", "<|assistant|>", "<|system|>"),
        appends_stop=True,
    ),
    "QwQ": Shape(
        "{% for m in messages %}{% if m['role'] == 'assistant' %}"
        "<im>assistant\n{{ m['content'].split('</think>')[-1] }}</im>\n"
        "{% else %}<im>{{ m['role'] }}\n{{ m['content'] }}</im>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<im>assistant\n<think>\n{% endif %}",
        ("</im>",),
        ("<im>",),
        before="\n</think>\n\n",
        opens_thinking=True,
    ),
    "DeepSeek-R1": Shape(
        "<s>{% for m in messages %}{% if m['role'] == 'assistant' %}<A>{{ m['content'].split('</think>')[-1] }}</s>"
        "{% elif m['role'] == 'user' %}<U>{{ m['content'] }}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<A><think>\n{% endif %}",
        ("</s>",),
        ("<s>", "<A>", "<U>"),
        before="\n</think>\n\n",
        opens_thinking=True,
    ),
}

TURNS: tuple[Message, ...] = (
    {"role": "user", "content": "Hi 你好"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "So long.\n\n  def f():\n      pass"},
)


def _renderer(shape: Shape, small_tokenizer: Callable[..., Any], **more: Any) -> Renderer:
    tokenizer = small_tokenizer(shape.template, specials=(*shape.specials, *shape.stops), eos_token=shape.stops[0])
    ids = [tokenizer.convert_tokens_to_ids(stop) for stop in shape.stops]
    return build_renderer(tokenizer, ids, date="2024-11-25", **more)


@pytest.fixture(scope="module")
def renderers(small_tokenizers: Callable[..., Any]) -> dict[str, Renderer]:
    """A renderer of each shape."""
    return {name: _renderer(shape, small_tokenizers) for name, shape in SHAPES.items()}


def _check(renderer: Renderer, shape: Shape, messages: tuple[Message, ...]) -> int:
    """Check every pair of a conversation against what inference sends, and count them."""
    decode = renderer.tokenizer.decode
    turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    pairs = renderer.pairs(Conversation("x:1", messages))
    for pair, turn in zip(pairs, turns, strict=True):
        public = renderer.tokenizer.apply_chat_template(
            [dict(message) for message in messages[:turn]],
            add_generation_prompt=True,
            chat_template=renderer.chat_template,
            sanitize_control_tokens=True,
            return_dict=False,
        )
        assert list(pair.prompt_ids) == renderer.prompt_ids(messages[:turn]) == public
        given = messages[turn]["content"]
        shown = given.strip() if shape.strips else given
        stop = decode(pair.answer_ids[-1:])
        assert stop in shape.stops
        assert decode(pair.answer_ids) == shape.before + shown + stop
        assert not set(renderer.stop_ids) & set(pair.answer_ids[:-1])
    return len(pairs)


@pytest.mark.parametrize("name", SHAPES)
def test_every_turn_of_a_conversation(name: str, renderers: dict[str, Renderer]) -> None:
    shape, renderer = SHAPES[name], renderers[name]
    assert _check(renderer, shape, TURNS) == 2
    assert (renderer.opens_thinking, renderer.appends_stop) == (shape.opens_thinking, shape.appends_stop)
    assert (renderer.date == "2024-11-25") == ("dated" in name)
    system: Message = {"role": "system", "content": "Be brief."}
    if shape.has_system:
        assert _check(renderer, shape, (system, *TURNS)) == 2
        return
    with pytest.raises(RowError) as caught:
        renderer.pairs(Conversation("x:1", (system, *TURNS)))
    assert caught.value.key == "template_raised"


TEXT = st.text(min_size=1).filter(lambda text: text.strip() and not set(text) & {"\U000f0000", "\U000f0001"})
HARD = [
    "</s>",
    "[eot]",
    "<eot>\n",
    "<|end|>",
    "{{ 7*7 }}",
    "[INST] x [/INST]",
    "👩\u200d🚀",
    "e\u0301 שלום\u202e",
    "\r\n\tx",
]


@pytest.mark.parametrize("name", SHAPES)
def test_simple_is_as_transformers_renders(name: str, renderers: dict[str, Renderer]) -> None:
    renderer = renderers[name]
    for prompt, turns in ((True, TURNS[:1]), (True, TURNS[:3]), (False, TURNS[:2]), (False, TURNS)):
        variables = {"add_generation_prompt": prompt, "enable_thinking": False}
        given = renderer.tokenizer.special_tokens_map | variables
        (ours,) = render_simple(renderer.chat_template, [list(turns)], given=given)
        assert ours == renderer.tokenizer.apply_chat_template(
            list(turns), tokenize=False, chat_template=renderer.chat_template, **variables
        )


@pytest.mark.parametrize("name", SHAPES)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(question=TEXT | st.sampled_from(HARD), answer=TEXT | st.sampled_from(HARD))
def test_any_text(name: str, question: str, answer: str, renderers: dict[str, Renderer]) -> None:
    """Whatever is said is learned and asked as it is; control tokens in it stay text."""
    messages: tuple[Message, ...] = ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
    if SHAPES[name].opens_thinking and "</think>" in answer:
        return
    assert _check(renderers[name], SHAPES[name], messages) == 1


@pytest.mark.parametrize("name", [name for name, shape in SHAPES.items() if shape.opens_thinking])
def test_reasoning_behind_an_open_thought(name: str, renderers: dict[str, Renderer]) -> None:
    answer: Message = {"role": "assistant", "content": "four", "reasoning_content": "2 and 2"}
    (pair,) = renderers[name].pairs(Conversation("x:1", (TURNS[0], answer)))
    assert renderers[name].tokenizer.decode(pair.answer_ids) == f"2 and 2\n</think>\n\nfour{SHAPES[name].stops[0]}"


@pytest.mark.parametrize(
    "loop",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(10 ** 9) %}{% endfor %}",
        "{{ messages[0].__class__.__mro__[1].__subclasses__() }}",
        "{{ messages[7]['content'] }}",
        "{{ 1 // 0 }}",
    ],
)
def test_template_that_loops_or_breaks(
    loop: str, small_tokenizer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is stopped, and the row is refused with what went wrong."""
    monkeypatch.setattr(template_module, "TIME_LIMIT_S", 0.3)
    renderer = build_renderer(small_tokenizer(loop + SHAPES["Mistral"].template), [])
    with pytest.raises(RowError) as caught:
        renderer.pairs(Conversation("x:1", TURNS[:2]))
    assert caught.value.key == "template_raised"


def test_rows_beside_a_bad_one_are_rendered(renderers: dict[str, Renderer]) -> None:
    """A row that the template refuses takes none of its batch with it."""
    bad = Conversation("x:2", ({"role": "system", "content": "s"}, *TURNS))
    good = Conversation("x:1", TURNS)
    found = renderers["Gemma"].render([good, bad, good])
    assert [isinstance(some, RowError) for some in found] == [False, True, False]
    assert found[0] == found[2] == renderers["Gemma"].render([good])[0]


@pytest.mark.parametrize("arguments", [{"x": 1}, '{"x":  1}'])
def test_arguments_of_calls_are_objects_for_the_template(arguments: Any, small_tokenizer: Callable[..., Any]) -> None:
    """OpenAI's JSON text would be written as text in quotes by a template that writes JSON (Qwen2.5, Llama 3.1)."""
    template = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% for call in m.get('tool_calls', []) %}"
        "{{ call['function'] | tojson }}{% endfor %}</s>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    renderer = build_renderer(small_tokenizer(template), [])
    call: Message = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": arguments}}],
    }
    messages = (TURNS[0], call, {"role": "tool", "content": "2"}, TURNS[1])
    first, second = renderer.pairs(Conversation("x:1", messages))
    shown = '{"name": "f", "arguments": {"x": 1}}</s>'
    assert renderer.tokenizer.decode(first.answer_ids) == shown
    assert list(second.prompt_ids) == renderer.prompt_ids(messages[:3])
    assert shown in renderer.tokenizer.decode(second.prompt_ids)
    assert call["tool_calls"][0]["function"]["arguments"] == arguments


def test_marks_anywhere_in_a_row_are_refused(renderers: dict[str, Renderer]) -> None:
    tools = ({"function": {"name": "f", "description": "\U000f0000"}},)
    for some in (
        Conversation("x:1", TURNS, tools=tools),
        Conversation("x:1", TURNS, rejected=(TURNS[0], {"role": "assistant", "content": "\U000f0001"})),
        Conversation("x:1", (), text="\U000f0000"),
    ):
        with pytest.raises(RowError) as caught:
            renderers["Phi-3"].pairs(some)
        assert caught.value.key == "row_private_character"
