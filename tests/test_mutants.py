"""The table of known bugs follows the source: each place is there once, each test file exists."""

from __future__ import annotations

from pathlib import Path

from tools.mutants import MUTANTS

ROOT = Path(__file__).resolve().parents[1]


def test_every_place_is_in_its_file_once() -> None:
    missed = [
        mutant.name
        for mutant in MUTANTS
        if (ROOT / "src" / "truetune" / mutant.file).read_text(encoding="utf-8").count(mutant.old) != 1
    ]
    assert missed == []
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) > 120


def test_every_test_is_there() -> None:
    words = [word for mutant in MUTANTS for word in mutant.tests.split() if word.startswith("tests/")]
    assert [word for word in words if not (ROOT / word.split("::")[0]).exists()] == []
    assert len(words) >= len(MUTANTS)
