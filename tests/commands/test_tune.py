"""`truetune tune`: its words are read, and what it needs is said."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from truetune.cli import run
from truetune.commands.tune import KEYS
from truetune.config import Config


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Collect what `tune` is called with, in place of searching."""
    calls: list[Any] = []
    fake = SimpleNamespace(
        Options=lambda **values: values,
        tune=lambda settings, console, *, options, resume: calls.append((settings, options, resume)),
    )
    monkeypatch.setitem(sys.modules, "truetune.tuning", fake)
    return calls


def test_the_words_arrive(called: list[Any]) -> None:
    size = ["--trials", "5", "--timeout-s", "60", "--rates", "1e-5,1e-3", "--ranks", "8, 16", "--max-steps", "7"]
    assert run(["tune", "d.json", "--model", "m", *size, "--resume", "--output-dir", "nowhere"]) == 0
    settings, options, resume = called[0]
    assert options == {"num_trials": 5, "timeout_s": 60.0, "rates": (1e-5, 1e-3), "ranks": (8, 16)}
    assert (settings.config.max_steps, settings.origins["max_steps"], resume) == (7, "--max-steps", True)
    assert run(["tune", "d.json", "--model", "m"]) == 0
    assert called[1][1:] == ({"num_trials": None, "timeout_s": None, "rates": None, "ranks": ()}, False)
    assert set(KEYS) <= set(Config.model_fields)


WRONG = [
    *(("--rates", value) for value in ("1e-3", "1e-3,1e-5", "a,b", "0,1e-3", "1e-3,1e-3", "1e-3,2", "nan,1", "")),
    *(("--ranks", value) for value in ("8,", "0", "-8", "8.5", "many", "", "८")),
]


@pytest.mark.parametrize(("flag", "value"), WRONG)
def test_lists_that_are_none_are_refused(flag: str, value: str, called: list[Any], capsys: Any) -> None:
    assert run(["tune", "d.json", "--model", "m", f"{flag}={value}"]) == 2
    assert capsys.readouterr().err.startswith(f"{flag}: ")
    assert called == []


@pytest.mark.parametrize("words", [["--trials", "0"], ["--timeout-s", "0"], ["--save-steps", "3"]])
def test_what_means_nothing_here_is_refused(words: list[str], called: list[Any]) -> None:
    assert run(["tune", "d.json", "--model", "m", *words]) == 2
    assert called == []


def test_without_optuna_it_says_what_to_install(
    called: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert run(["tune", "d.json", "--model", "m"]) == 2
    assert 'pip install "truetune[tune]"' in capsys.readouterr().err
    assert called == []
