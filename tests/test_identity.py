"""Probes: what was written beside an adapter is what its use must render."""

from __future__ import annotations

import json
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from truetune import identity
from truetune.data.template import Renderer, build_renderer
from truetune.errors import UserError

PROMPTS = [
    [{"role": "user", "content": "What is the name of the boat?"}],
    [{"role": "system", "content": "Be short."}, {"role": "user", "content": "船叫什么名字？"}],
]
BASE = {"name": "org/name", "fingerprint": "f00"}
# With tools, and without thinking.
NUM_SPECIAL = 2


@pytest.fixture(scope="module")
def renderer(qwen_tokenizer: Any) -> Renderer:
    return build_renderer(qwen_tokenizer, [151645], system="你是守塔人。", date="2026-01-02")


def write(folder: Path, renderer: Renderer, prompts: list[list[dict[str, str]]] = PROMPTS) -> dict[str, Any]:
    identity.write(folder, renderer, prompts=prompts, base=BASE)
    values = identity.read(folder)
    assert values is not None
    return values


def test_what_is_written_is_read(renderer: Renderer, tmp_path: Path) -> None:
    values = write(tmp_path, renderer)
    assert [path.name for path in tmp_path.iterdir()] == ["truetune.json"]
    assert values["base"] == BASE
    assert values["system"] == "你是守塔人。"
    assert values["chat_template_kwargs"] == {}
    assert values["template_sha256"] == renderer.template_hash
    assert values["stop_ids"] == list(renderer.stop_ids)
    # Qwen3's template reads no clock.
    assert values["date"] is None
    assert "你是守塔人。" in (tmp_path / identity.FILE).read_text(encoding="utf-8")


def test_probes_hold_messages_and_their_exact_prompt(renderer: Renderer, tmp_path: Path) -> None:
    probes = write(tmp_path, renderer)["probes"]
    assert [probe["messages"] for probe in probes[:-NUM_SPECIAL]] == [*identity.FIXED_PROBES, *PROMPTS]
    for probe in probes[:-NUM_SPECIAL]:
        assert probe["prompt_ids"] == renderer.prompt_ids(probe["messages"])
    first = renderer.tokenizer.decode(probes[0]["prompt_ids"])
    assert first.startswith("<|im_start|>system\n你是守塔人。<|im_end|>\n<|im_start|>user\nWho are you?<|im_end|>\n")
    assert first.endswith("<|im_start|>assistant\n")


def test_control_tokens_in_a_probe_stay_text(renderer: Renderer, tmp_path: Path) -> None:
    probe = write(tmp_path, renderer)["probes"][2]
    im_start = renderer.tokenizer.convert_tokens_to_ids("<|im_start|>")
    # System, three turns, and the prompt for the answer: none comes from the user's own text.
    assert probe["prompt_ids"].count(im_start) == 5


def test_a_number_of_probes_at_most(renderer: Renderer, tmp_path: Path) -> None:
    assert len(write(tmp_path, renderer, PROMPTS * 9)["probes"]) == identity.NUM_PROBES == 8
    assert len(write(tmp_path, renderer, [])["probes"]) == len(identity.FIXED_PROBES) + NUM_SPECIAL == 5


@pytest.mark.parametrize("num_prompts", [0, 1, 2])
def test_check_counts_what_agrees(num_prompts: int, renderer: Renderer, tmp_path: Path) -> None:
    values = write(tmp_path, renderer, PROMPTS[:num_prompts])
    assert identity.check(tmp_path, renderer, known=values) == 3 + num_prompts + NUM_SPECIAL


def test_check_of_nothing(renderer: Renderer, tmp_path: Path) -> None:
    assert identity.check(tmp_path, renderer, known={"probes": [], "template_sha256": renderer.template_hash}) == 0


def changed(renderer: Renderer, how: str) -> Renderer:
    template = renderer.chat_template
    marker = "<|im_start|>assistant\\n"
    assert marker in template
    kinds = {
        "template": lambda: replace(renderer, chat_template=template.replace(marker, "<|im_start|>assistant\\n\\n")),
        "system": lambda: replace(renderer, system="你是船长。"),
        "no system": lambda: replace(renderer, system=None),
        "kwargs": lambda: replace(renderer, template_kwargs={"enable_thinking": False}),
    }
    return kinds[how]()


@pytest.mark.parametrize("how", ["template", "system", "no system", "kwargs"])
def test_a_change_is_an_error(how: str, renderer: Renderer, tmp_path: Path) -> None:
    values = write(tmp_path, renderer)
    with pytest.raises(UserError) as caught:
        identity.check(tmp_path, changed(renderer, how), known=values)
    error = caught.value
    assert (error.key, error.where) == ("probe_differs", str(tmp_path / "truetune.json"))
    assert error.values["number"] == 1


def test_an_error_names_probe_and_token(renderer: Renderer, tmp_path: Path) -> None:
    values = write(tmp_path, renderer)
    values["probes"][3]["prompt_ids"][7] += 1
    with pytest.raises(UserError) as caught:
        identity.check(tmp_path, renderer, known=values)
    assert caught.value.values == {"number": 4, "at": 7}


def test_a_prompt_that_goes_on_or_ends_early_is_an_error(renderer: Renderer, tmp_path: Path) -> None:
    values = write(tmp_path, renderer)
    ids = values["probes"][0]["prompt_ids"]
    for trained, at in ((ids[:-1], len(ids) - 1), ([*ids, 3], len(ids))):
        with pytest.raises(UserError) as caught:
            identity.check(
                tmp_path, renderer, known=values | {"probes": [{**values["probes"][0], "prompt_ids": trained}]}
            )
        assert caught.value.values == {"number": 1, "at": at}


def test_a_foreign_adapter_has_no_probes(tmp_path: Path) -> None:
    assert identity.read(tmp_path) is None


def test_the_date_of_a_template_that_writes_it_is_kept(qwen_tokenizer: Any, tmp_path: Path) -> None:
    clocked = copy(qwen_tokenizer)
    clocked.chat_template = "{{ strftime_now('%Y-%m-%d') }}" + qwen_tokenizer.chat_template
    values = write(tmp_path, build_renderer(clocked, [151645], date="2026-01-02"))
    assert values["date"] == "2026-01-02"
    assert qwen_tokenizer.decode(values["probes"][0]["prompt_ids"]).startswith("2026-01-02<|im_start|>")
    renderer = build_renderer(clocked, [151645], date=values["date"])
    assert identity.check(tmp_path, renderer, known=values) == 5 + NUM_SPECIAL
    with pytest.raises(UserError) as caught:
        identity.check(tmp_path, build_renderer(clocked, [151645], date="2026-01-03"), known=values)
    assert (caught.value.key, caught.value.values["number"]) == ("probe_differs", 1)


def test_the_file_is_strict_json(renderer: Renderer, tmp_path: Path) -> None:
    write(tmp_path, renderer)
    content = (tmp_path / identity.FILE).read_text(encoding="utf-8")
    assert content.endswith("}\n")
    assert json.loads(content)["format"] == identity.FORMAT == 2


def test_probes_with_tools_and_with_other_arguments(renderer: Renderer, tmp_path: Path) -> None:
    """Qwen3's template writes tools into the system turn, and an empty thinking block when thinking is off."""
    tools, thinking = write(tmp_path, renderer)["probes"][-NUM_SPECIAL:]
    decode = renderer.tokenizer.decode
    assert "<tools>" in decode(tools["prompt_ids"])
    assert '"name": "tide"' in decode(tools["prompt_ids"])
    assert thinking["chat_template_kwargs"] == {"enable_thinking": False}
    assert decode(thinking["prompt_ids"]).endswith("<think>\n\n</think>\n\n")


@pytest.mark.parametrize("number", [-2, -1])
def test_a_change_that_only_a_special_probe_sees(number: int, renderer: Renderer, tmp_path: Path) -> None:
    values = write(tmp_path, renderer)
    old = ("You may call one or more functions", "<think>\\n\\n</think>")[number]
    assert old in renderer.chat_template
    other = replace(
        renderer, chat_template=renderer.chat_template.replace(old, old.replace("<", "<x").replace("may", "can"))
    )
    with pytest.raises(UserError) as caught:
        identity.check(tmp_path, other, known=values)
    assert (caught.value.key, caught.value.values["number"]) == ("probe_differs", len(values["probes"]) + number + 1)


def test_a_template_that_ignores_tools_gets_no_probe_of_them(renderer: Renderer, tmp_path: Path) -> None:
    plain = replace(renderer, chat_template="{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}")
    assert len(write(tmp_path, plain)["probes"]) == len(identity.FIXED_PROBES) + len(PROMPTS)


def test_a_changed_template_is_told_even_if_no_probe_sees_it(renderer: Renderer, tmp_path: Path) -> None:
    values = write(tmp_path, renderer)
    other = replace(renderer, chat_template=renderer.chat_template + "{% if false %}{% endif %}")
    with pytest.raises(UserError) as caught:
        identity.check(tmp_path, other, known=values)
    assert caught.value.key == "template_changed"


def test_another_base_is_refused_with_both_names(renderer: Renderer, tmp_path: Path) -> None:
    values = write(tmp_path, renderer)
    identity.check_base(tmp_path, values, name="x", fingerprint="f00")
    with pytest.raises(UserError) as caught:
        identity.check_base(tmp_path, values, name="org/other", fingerprint="f01")
    assert caught.value.key == "other_base"
    assert "org/name" in str(caught.value)
    assert "org/other" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "key"), [('{"format": 1}', "identity_format"), ("{", "identity_damaged"), ("[]", "identity_damaged")]
)
def test_a_file_of_another_format_is_named(content: str, key: str, tmp_path: Path) -> None:
    (tmp_path / identity.FILE).write_text(content)
    with pytest.raises(UserError) as caught:
        identity.read(tmp_path)
    assert (caught.value.key, caught.value.where) == (key, str(tmp_path / identity.FILE))
