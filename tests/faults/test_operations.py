"""A whole run, with a fault at every operation on its files: killed there, the disk full or read-only from there on.

After each: `--resume` (or, if nothing was begun, the same command) finishes, and the result is that of the run that
nothing happened to. `make test-faults` takes every operation, `make test` a sample.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from hurt import assert_same, orphans, words
from layer import Killed, Layer, faults

from truetune import checkpoint
from truetune.cli import run

pytestmark = pytest.mark.slow

SAMPLE = 41
PARTS = 8
"""Into which all operations are divided, so that they run side by side."""


def _run(command: list[str], layer: Layer) -> int | None:
    """The exit code; None if it was killed."""
    try:
        with faults(layer):
            return run(command)
    except Killed:
        return None


@pytest.fixture(scope="module")
def operations(
    data: Path, held_out: Path, tiny_base: Path, whole: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[tuple[str, str]]:
    """All operations of the run, in order; counting them changes nothing."""
    out = tmp_path_factory.mktemp("counted") / "out"
    layer = Layer(out.parent)
    assert _run(words(data, tiny_base, out, eval_data=held_out), layer) == 0
    assert_same(out, whole)
    kinds = {name for name, _ in layer.log}
    assert {"write", "create", "fsync", "rename", "replace", "unlink", "rmdir", "mkdir"} <= kinds
    assert len(layer.log) > 250
    return layer.log


def _hurt(at: int, fault: str, out: Path, data: Path, *, held_out: Path, model: Path) -> int | None:
    """Run with a fault, then resume; return the first exit code."""
    command = words(data, model, out, eval_data=held_out)
    code = _run(command, Layer(out.parent, at=at, fault=fault))
    if code != 0:
        if (out / "run.json").is_file():
            assert run(["verify", str(out)]) == 0
        good = checkpoint.find(out / "checkpoints")[0]
        assert run([*command, "--resume"] if list(out.glob("*")) or orphans(out) else command) == 0
        assert good is None or checkpoint.step_of(good) in (3, 6)
    return code


def _hurt_at(numbers: list[int], fault: str, tmp_path: Path, whole: Path, **made: Path) -> list[int | None]:
    codes = []
    for at in numbers:
        out = tmp_path / str(at) / "out"
        codes.append(_hurt(at, fault, out, made["data"], held_out=made["held_out"], model=made["model"]))
        assert_same(out, whole)
    return codes


@pytest.mark.parametrize("fault", ["kill", "full", "read-only"])
def test_some(
    fault: str,
    operations: list[tuple[str, str]],
    data: Path,
    held_out: Path,
    tiny_base: Path,
    whole: Path,
    tmp_path: Path,
) -> None:
    """Every SAMPLE-th operation, and the first ones, when hardly anything is there."""
    numbers = [1, 2, 3, *range(5, len(operations) + 1, SAMPLE * (1 if fault == "kill" else 3))]
    codes = _hurt_at(numbers, fault, tmp_path, whole, data=data, held_out=held_out, model=tiny_base)
    assert len(codes) >= 6
    # Where only lines of the log fail, a full disk ends nothing.
    assert set(codes) <= ({None} if fault == "kill" else {0, 3})
    assert 3 in codes or fault == "kill"


@pytest.mark.faults
@pytest.mark.parametrize("fault", ["kill", "full", "read-only"])
@pytest.mark.parametrize("part", range(PARTS))
def test_every(
    part: int,
    fault: str,
    operations: list[tuple[str, str]],
    data: Path,
    held_out: Path,
    tiny_base: Path,
    whole: Path,
    tmp_path: Path,
) -> None:
    numbers = list(range(1 + part, len(operations) + 1, PARTS))
    codes = _hurt_at(numbers, fault, tmp_path, whole, data=data, held_out=held_out, model=tiny_base)
    assert len(codes) == len(numbers) > 30
    assert set(codes) <= ({None} if fault == "kill" else {0, 3})
