"""S7: what the page may see, against every way out that is known."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from truetune.errors import UserError
from truetune.studio.places import Places, safe_name

ESCAPES = [
    *("..", "../other", "/etc/passwd", "runs/../../other", "link/secret", "~", "~root/x", "~nobody-there/x"),
    *("a\0b", "/proc/self/environ", "loop/x", "runs/./../../other/secret", "homeless/x/../../../other", "//etc/passwd"),
]


@pytest.fixture
def places(tmp_path: Path) -> Places:
    """A home folder beside a folder that is not open, with links that lead there."""
    home = tmp_path / "home"
    for folder in (home / "runs", tmp_path / "other", tmp_path / "homely", tmp_path / "more" / "deep"):
        folder.mkdir(parents=True)
    (tmp_path / "other" / "secret").write_text("no")
    (home / "link").symlink_to(tmp_path / "other")
    (home / "loop").symlink_to(home / "loop")
    (home / ".hidden").write_text("no")
    (home / "<img src=x onerror=alert(1)>.json").write_text("[]")
    return Places(home, [tmp_path / "more"])


@pytest.mark.parametrize("path", ESCAPES)
def test_s07_no_way_out(path: str, places: Places) -> None:
    for ask in (places.inside, places.listing):
        with pytest.raises(UserError) as caught:
            ask(path)
        assert caught.value.key == "studio_outside"


def test_a_folder_whose_name_only_begins_alike_is_outside(places: Places) -> None:
    with pytest.raises(UserError):
        places.inside(str(places.home) + "ly")
    assert places.inside(str(places.home)) == places.home


def test_other_roots_and_what_is_listed(places: Places) -> None:
    more = str(places.roots[1])
    told = places.listing("")
    assert told["folders"] == ["runs", more]
    assert told["files"] == [{"name": "<img src=x onerror=alert(1)>.json", "bytes": 2}]
    assert told["parent"] is None
    assert places.listing(more)["folders"] == ["deep"]
    assert places.listing(f"{more}/deep")["parent"] == more


def test_names_of_uploads() -> None:
    bad = ["", ".", "..", "/", "../x", "a/../../b", "-rf", ".bashrc", "x\n.json", "C:\\x\\y.json", "名" * 300, "\0"]
    for name in bad:
        safe = safe_name(name)
        assert safe
        assert not set(safe) & set("/\\\0\n")
        assert not safe.startswith((".", "-"))
        assert len(safe.encode()) <= 200


async def pieces(*parts: bytes, fails: bool = False) -> AsyncIterator[bytes]:
    """A body as it comes."""
    for part in parts:
        yield part
    if fails:
        raise ConnectionResetError


def test_an_upload_is_whole_or_not_there(places: Places) -> None:
    first = asyncio.run(places.upload("../../a.json", pieces(b"[1", b"]")))
    second = asyncio.run(places.upload("a.json", pieces(b"[2]")))
    assert (first.name, second.name) == ("a.json", "a-2.json")
    assert (first.read_bytes(), second.read_bytes()) == (b"[1]", b"[2]")
    assert first.parent == second.parent == places.uploads
    with pytest.raises(ConnectionResetError):
        asyncio.run(places.upload("b.json", pieces(b"[", fails=True)))
    assert sorted(path.name for path in places.uploads.iterdir()) == ["a-2.json", "a.json"]
