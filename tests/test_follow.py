"""How many ranks a run has, and what a rank that follows needs; whole runs are in tests/distributed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from truetune.config import resolve
from truetune.errors import UserError
from truetune.follow import follow, tell_start, with_devices
from truetune.place import Place
from truetune.ranks import ALONE, Ranks


def settings(**flags: Any) -> Any:
    """Settings of a run."""
    return resolve({"data": ["d.json"], "model": "m", **flags})


TWO = Ranks(Place(rank=0, size=2))


@pytest.mark.parametrize(
    ("flags", "ranks", "wanted"),
    [
        ({}, ALONE, (1, "default")),
        ({}, TWO, (2, "torchrun")),
        ({"devices": 2}, TWO, (2, "--devices")),
        ({"devices": 1}, ALONE, (1, "--devices")),
        ({"strategy": "shard"}, TWO, (2, "torchrun")),
    ],
)
def test_as_many_as_there_are(flags: dict[str, Any], ranks: Ranks, wanted: tuple[int, str]) -> None:
    found = with_devices(settings(**flags), ranks)
    assert (found.config.devices, found.origins["devices"]) == wanted


@pytest.mark.parametrize(
    ("flags", "ranks", "key"),
    [
        ({"devices": 2}, ALONE, "devices_not_started"),
        ({"devices": 3}, TWO, "devices_twice"),
        ({"strategy": "shard"}, ALONE, "shard_alone"),
    ],
)
def test_another_number_is_refused(flags: dict[str, Any], ranks: Ranks, key: str) -> None:
    with pytest.raises(UserError) as error:
        with_devices(settings(**flags), ranks)
    assert error.value.key == key


def test_a_run_of_two_goes_on_with_three(tmp_path: Path) -> None:
    """The number in the run's own file is what it was, not what is asked for."""
    (tmp_path / "config.yaml").write_text("devices: 2\nmodel: m\n")
    found = with_devices(resolve({}, tmp_path / "config.yaml"), Ranks(replace(TWO.place, size=3)))
    assert (found.config.devices, found.origins["devices"]) == (3, "torchrun")


class Told(Ranks):
    """A rank that is told one thing."""

    def tell(self, value: Any = None) -> Any:
        return value


def test_nothing_to_follow() -> None:
    """Rank 0 found the run finished."""
    assert follow(Told(Place(rank=1, size=2)), lang="en", skip_bad=0).steps == 0


def test_what_is_told_makes_the_same_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    from truetune.config import Config

    said: list[Any] = []
    monkeypatch.setattr(Ranks, "tell", lambda self, value=None: said.append(value))
    config = settings(lora_r=4, sample_prompts="none", chat_template_kwargs="{a: 1}")
    tell_start(TWO, config, path=Path("runs/x"), date=None, is_begun=False)
    assert Config(**said[0]["config"]) == config.config
    assert said[0]["path"] == "runs/x"
