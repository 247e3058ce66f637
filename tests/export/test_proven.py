"""A file gets its name when it is proven, and not before: kills, things in the way, the ids that it names (F3)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.layer import Killed, Layer, faults
from tests.small import small_model
from truetune.errors import MachineError, UserError
from truetune.export import llama
from truetune.export.proven import begins_with_bos, ending, export_gguf
from truetune.source import find

# What is killed leaves its open file to the collector.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def _without_llama(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama, "is_installed", lambda: False)


def operations(folder: Path) -> int:
    """The operations on files that an export takes."""
    source = find(str(small_model(folder / "base")))
    (folder / "places").mkdir()
    with faults(Layer(folder / "places")) as layer:
        export_gguf(source, output=folder / "places" / "whole.gguf", kind="F32")
    return len(layer.log)


@pytest.mark.parametrize(
    "num_places", [pytest.param(4, marks=pytest.mark.slow), pytest.param(None, marks=pytest.mark.faults)]
)
def test_killed_anywhere_the_file_is_absent_or_complete(num_places: int | None, tmp_path: Path) -> None:
    """F3: before every operation, or four of them."""
    count = operations(tmp_path)
    assert count > 8
    source, places = find(str(tmp_path / "base")), tmp_path / "places"
    whole = (places / "whole.gguf").read_bytes()
    target = places / "out.gguf"
    killed = 0
    for at in range(1, count + 1, 1 if num_places is None else max(count // num_places, 1)):
        with pytest.raises(Killed), faults(Layer(places, at=at)):
            export_gguf(source, output=target, kind="F32")
        assert not target.exists() or target.read_bytes() == whole
        export_gguf(source, output=target, kind="F32")
        assert target.read_bytes() == whole
        assert sorted(path.name for path in places.iterdir()) == ["out.gguf", "whole.gguf"]
        target.unlink()
        killed += 1
    assert killed >= (num_places or count)


@pytest.mark.slow
def test_a_full_disk_is_told_with_the_numbers(tmp_path: Path) -> None:
    count = operations(tmp_path)
    source, places = find(str(tmp_path / "base")), tmp_path / "places"
    with pytest.raises(MachineError) as caught, faults(Layer(places, at=count // 2, fault="full")):
        export_gguf(source, output=places / "out.gguf", kind="F32")
    assert caught.value.key == "disk_full"
    assert [path.name for path in places.iterdir()] == ["whole.gguf"]


def test_something_in_the_way(tmp_path: Path) -> None:
    """An earlier export is replaced; a folder, or a file of another kind, is not."""
    source = find(str(small_model(tmp_path / "base")))
    (tmp_path / "mine.txt").write_text("mine")
    for path in (tmp_path / "base", tmp_path / "mine.txt"):
        with pytest.raises(UserError) as caught:
            export_gguf(source, output=path, kind="F32")
        assert caught.value.key == "export_in_the_way"
    for kind in ("F32", "F16"):
        export_gguf(source, output=tmp_path / "x.gguf", kind=kind)
    assert (tmp_path / "x.gguf").stat().st_size < 600_000


@pytest.mark.parametrize(
    ("family", "bos", "eot"),
    [("llama", True, "<|eot_id|>"), ("gemma3", True, "<end_of_turn>"), ("qwen3", False, "<|im_end|>")],
)
def test_what_the_file_names(family: str, bos: bool, eot: str, tmp_path: Path) -> None:
    """The end of a turn is what the template writes behind an answer, whatever else may end one."""
    source = find(str(small_model(tmp_path / "base", family)))
    end = ending(source)
    assert source.renderer.tokenizer.convert_ids_to_tokens(end.eot) == eot
    assert end.adds_bos is bos is begins_with_bos(source)


@pytest.mark.real
def test_a_token_of_turns_that_is_called_bos(smol: Path) -> None:
    """SmolLM2 calls <|im_start|> bos: to add it would put a second one before each prompt."""
    source = find(str(smol))
    assert source.renderer.tokenizer.bos_token == "<|im_start|>"
    assert not begins_with_bos(source)
