"""The catalogue is whole: same keys and braces in both languages, every key used, every used key there."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from string import Formatter

import pytest

import truetune
from truetune import errors
from truetune.cli import COMMANDS
from truetune.config import Config
from truetune.messages import CATALOGUES, text

ENGLISH, CHINESE = CATALOGUES["en"], CATALOGUES["zh"]
SOURCE = Path(truetune.__file__).parent
PREFIXES = {key.partition(".")[0] for key in ENGLISH}
KEY = re.compile(rf"({'|'.join(sorted(PREFIXES))})\.[a-z0-9_]+")
FAULTS = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, Exception)}
# Built with an f-string; what may follow the dot stands as a string somewhere in the source.
DYNAMIC = ("api", "field", "command", "dtype", "diagnosis", "column", "finding", "card")
# Looks like a key, and is none.
NO_KEYS = {
    *("train.arrow", "eval.arrow", "check.html", "report.json", "report.md", "report.html", "chat.jsonl"),
    "chat.completion",
    "chat.completion.chunk",
    *("tune.html", "tune.md", "tune.json"),
}
# The same in both languages: nothing in them is a word of either.
SAME = {
    "error.machine",
    "error.usage",
    "fix.extra_missing",
    "label.python",
    "label.cpu",
    "label.gpu",
    "train.prompt",
    "train.answer",
}


@cache
def trees() -> dict[str, ast.Module]:
    """The syntax tree of every source file but the catalogue."""
    files = [path for path in sorted(SOURCE.rglob("*.py")) if path.parent.name != "messages"]
    return {str(path.relative_to(SOURCE)): ast.parse(path.read_text(encoding="utf-8")) for path in files}


def calls() -> Iterator[tuple[str, ast.Call, str]]:
    """Yield (place, call, name of what is called)."""
    for name, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                yield f"{name}:{node.lineno}", node, called


def literals(node: ast.AST | None) -> list[str]:
    """Return the strings that an expression can be, as far as they are written out in it."""
    if isinstance(node, ast.IfExp):
        return literals(node.body) + literals(node.orelse)
    return [node.value] if isinstance(node, ast.Constant) and isinstance(node.value, str) else []


def keyword(call: ast.Call, name: str) -> ast.AST | None:
    """Return the value of a keyword argument."""
    return next((argument.value for argument in call.keywords if argument.arg == name), None)


def fault_keys() -> Iterator[tuple[str, ast.Call, list[str]]]:
    """Yield (place, call, its catalogue keys) of each fault whose key is written out."""
    for place, call, called in calls():
        if called == "refuse" and len(call.args) >= 2:
            found = call.args[1], keyword(call, "fix")
        elif called in FAULTS or (called == "__init__" and place.startswith("errors.py")):
            found = (call.args[0] if call.args else None), keyword(call, "fix")
        else:
            continue
        whats, fixes = literals(found[0]), literals(found[1])
        if whats:
            yield place, call, [*(f"error.{key}" for key in whats), *(f"fix.{key}" for key in fixes)]


def strings() -> set[str]:
    """Every string in the source."""
    return {
        node.value
        for tree in trees().values()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }


def key_literals() -> set[str]:
    """Every string in the source that looks like a key of the catalogue."""
    return {value for value in strings() if KEY.fullmatch(value)} - NO_KEYS


def fields(template: str) -> set[tuple[str, str]]:
    """Return the braces of a text: (name, format)."""
    return {(name, spec or "") for _, name, spec, _ in Formatter().parse(template) if name is not None}


def test_both_languages_hold_the_same_keys_in_the_same_order() -> None:
    assert list(ENGLISH) == list(CHINESE)
    assert len(ENGLISH) > 100
    assert set(CATALOGUES) == {"en", "zh"}


def test_both_languages_fill_the_same_braces() -> None:
    differing = {key for key in ENGLISH if fields(ENGLISH[key]) != fields(CHINESE[key])}
    assert not differing
    assert sum(bool(fields(value)) for value in ENGLISH.values()) > 50


def test_no_text_is_left_untranslated() -> None:
    same = {key for key in ENGLISH if ENGLISH[key] == CHINESE[key]}
    assert same == SAME


def test_chinese_texts_are_chinese_and_english_ones_are_not() -> None:
    han = re.compile("[\u4e00-\u9fff]")
    assert {key for key, value in CHINESE.items() if not han.search(value)} == SAME | {"train.choice"}
    assert not {key for key, value in ENGLISH.items() if han.search(value)}


def test_every_key_named_in_the_source_is_in_the_catalogue() -> None:
    found = key_literals()
    assert found - set(ENGLISH) == set()
    assert len(found) > 80


def test_every_fault_in_the_source_has_its_text_and_its_fix() -> None:
    found = {key: place for place, _, keys in fault_keys() for key in keys}
    assert {key: place for key, place in found.items() if key not in ENGLISH} == {}
    assert sum(key.startswith("error.") for key in found) > 60
    assert sum(key.startswith("fix.") for key in found) > 60


def test_every_fault_gives_what_its_texts_need() -> None:
    checked, lacking = 0, []
    for place, call, keys in fault_keys():
        given = {argument.arg for argument in call.keywords}
        if None in given:
            continue
        needed = {name for key in keys for name, _ in fields(ENGLISH[key])}
        checked += 1
        lacking += [(place, keys, name) for name in needed - given]
    assert not lacking
    assert checked > 60


def test_every_message_gives_what_its_text_needs() -> None:
    checked, lacking = 0, []
    for place, call, called in calls():
        given = {argument.arg for argument in call.keywords}
        if called not in ("say", "text", "status") or not call.args or None in given:
            continue
        for key in literals(call.args[0]):
            needed = {name for name, _ in fields(ENGLISH[key])}
            checked += 1
            lacking += [(place, key, name) for name in needed - given]
    assert not lacking
    assert checked > 50


def page_strings() -> set[str]:
    """Every string in the modules of the studio's page: "key" or `start_${...}`, the latter with its underscore."""
    files = [path for path in (SOURCE / "studio" / "static").rglob("*.js") if path.parent.name != "vendor"]
    code = "".join(path.read_text(encoding="utf-8") for path in files)
    return set(re.findall(r'"([a-z0-9_]+)"', code)) | set(re.findall(r"\bt\(`([a-z]+_)\$", code))


def page_keys() -> set[str]:
    """Every key that the page asks for by its whole name."""
    files = [path for path in (SOURCE / "studio" / "static").rglob("*.js") if path.parent.name != "vendor"]
    found = [re.findall(r'\bt\("([a-z0-9_]+)"', path.read_text(encoding="utf-8")) for path in files]
    return {f"studio.{key}" for keys in found for key in keys}


def test_every_text_the_page_asks_for_is_in_the_catalogue() -> None:
    found = page_keys()
    assert found - set(ENGLISH) == set()
    assert len(found) > 120


def test_no_text_is_dead() -> None:
    known = strings()
    used = key_literals()
    on_page = page_strings()
    starts = {start for start in on_page if start.endswith("_")}
    for key in (key for key in ENGLISH if key.startswith("studio.")):
        name = key.removeprefix("studio.")
        start, rest = name[: name.find("_") + 1], name[name.find("_") + 1 :]
        if name in on_page or (start in starts and rest in on_page | known):
            used.add(key)
    used |= {key for _, _, keys in fault_keys() for key in keys}
    # A fix that is chosen first and handed on by name.
    used |= {key for key in ENGLISH if key.startswith("fix.") and key.removeprefix("fix.") in known}
    used |= {key for key in ENGLISH if key.partition(".")[0] in DYNAMIC and key.partition(".")[2] in known}
    used |= {f"field.{name}" for name in Config.model_fields}
    assert set(ENGLISH) - used == set()


@pytest.mark.parametrize("prefix", DYNAMIC)
def test_a_prefix_called_dynamic_is_built_in_the_source(prefix: str) -> None:
    starts = {
        node.values[0].value
        for tree in trees().values()
        for node in ast.walk(tree)
        if isinstance(node, ast.JoinedStr) and isinstance(node.values[0], ast.Constant)
    }
    assert f"{prefix}." in starts


def test_no_other_prefix_is_built_in_the_source() -> None:
    starts = {
        str(node.values[0].value).removesuffix(".")
        for tree in trees().values()
        for node in ast.walk(tree)
        if isinstance(node, ast.JoinedStr) and isinstance(node.values[0], ast.Constant)
        if str(node.values[0].value).endswith(".")
    }
    assert starts & PREFIXES == {*DYNAMIC, "error", "fix"}


def test_every_configuration_key_and_command_is_described() -> None:
    assert {f"field.{name}" for name in Config.model_fields} == {key for key in ENGLISH if key.startswith("field.")}
    assert {f"command.{name}" for name in COMMANDS} == {key for key in ENGLISH if key.startswith("command.")}


def test_every_reason_for_a_dtype_is_described() -> None:
    tree = trees()["model.py"]
    function = next(n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == "choose_dtype")
    tuples = [n.value for n in ast.walk(function) if isinstance(n, ast.Return) and isinstance(n.value, ast.Tuple)]
    reasons = {f"dtype.{literals(value.elts[1])[0]}" for value in tuples}
    assert reasons == {key for key in ENGLISH if key.startswith("dtype.")}
    assert len(reasons) == 6


def test_text_fills_values_in_the_language() -> None:
    assert text("runs.none", folder="x") == "No runs under x."
    assert text("runs.none", "zh", folder="x") == "x 下没有训练记录。"
    with pytest.raises(KeyError):
        text("no.such_key")
    with pytest.raises(KeyError):
        text("runs.none")
