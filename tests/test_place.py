"""What torchrun's variables say, and what is refused."""

from __future__ import annotations

import os

import pytest

from truetune.errors import UserError
from truetune.place import LAUNCHED, VARIABLES, Place, has_own_threads, hidden_from_libraries, read_place

FOUND = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
MEETING = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture(autouse=True)
def _nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*VARIABLES, *MEETING, LAUNCHED, "TORCHELASTIC_MAX_RESTARTS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)


def put(monkeypatch: pytest.MonkeyPatch, **values: str) -> None:
    for name, value in values.items():
        monkeypatch.setenv(name, value)


def test_alone() -> None:
    assert read_place() == Place()


@pytest.mark.parametrize("size", ["1", ""])
def test_a_group_of_one_is_alone(size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, WORLD_SIZE=size, RANK="0")
    assert read_place() == Place()


def test_one_of_four(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, **FOUND, **MEETING)
    assert read_place() == Place(rank=3, size=4, local_rank=1, local_size=2)


def test_who_started_it(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, **FOUND, **MEETING, TORCHELASTIC_MAX_RESTARTS="2", **{LAUNCHED: "1"})
    place = read_place()
    assert (place.may_restart, place.is_launched) == (True, True)


@pytest.mark.parametrize("missing", ["RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_several_that_cannot_meet_are_refused(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, **{name: value for name, value in (FOUND | MEETING).items() if name != missing})
    with pytest.raises(UserError) as error:
        read_place()
    assert (error.value.key, error.value.values["names"]) == ("ranks_incomplete", missing)


def test_what_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, WORLD_SIZE="two")
    with pytest.raises(UserError) as error:
        read_place()
    assert (error.value.key, error.value.where) == ("ranks_number", "WORLD_SIZE")


def test_hidden_and_back(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, **FOUND)
    with hidden_from_libraries():
        assert read_place() == Place()
    assert {name: os.environ[name] for name in VARIABLES} == FOUND


def test_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not has_own_threads()
    put(monkeypatch, OMP_NUM_THREADS="1")
    assert has_own_threads()
