"""The page's files: libraries as npm shipped them, no markup from strings, nothing from elsewhere, no import lost."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import truetune
from tools.vendor_web import WANTED, differences

STATIC = Path(truetune.__file__).parent / "studio" / "static"
MODULES = sorted(path for path in STATIC.rglob("*.js") if path.parent.name != "vendor")
MAX_LINES = 400
FORBIDDEN = re.compile(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|dangerouslySet")


@pytest.mark.parametrize("folder", WANTED, ids=lambda folder: folder.parent.name)
def test_libraries_are_what_vendor_json_says(folder: Path) -> None:
    assert differences(folder) == []
    assert len(list(folder.iterdir())) >= 3


def test_a_changed_library_is_noticed(tmp_path: Path) -> None:
    folder = next(iter(WANTED))
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "htm.js").write_bytes((tmp_path / "htm.js").read_bytes() + b" ")
    (tmp_path / "more.js").write_text("")
    assert differences(tmp_path) == ["htm.js", "more.js"]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_modules_are_small_and_write_no_markup(path: Path) -> None:
    code = path.read_text(encoding="utf-8")
    prose = re.sub(r"^\s*//.*$", "", code, flags=re.MULTILINE)
    assert not FORBIDDEN.search(prose)
    assert "http" not in re.sub(r"http\.", "", prose)
    assert code.startswith("// "), "a module says first what it is for"
    assert len(code.splitlines()) <= MAX_LINES
    for name in re.findall(r'from "(\.[^"]+)"', code):
        assert (path.parent / name).is_file(), name


def test_every_module_is_looked_at_and_used() -> None:
    assert len(MODULES) >= 15
    code = "".join(path.read_text(encoding="utf-8") for path in MODULES) + (STATIC / "index.html").read_text()
    unused = [path.name for path in STATIC.rglob("*.js") if f"{path.name}" not in code]
    assert unused == []


def test_the_page_has_no_script_or_style_in_itself() -> None:
    page = (STATIC / "index.html").read_text(encoding="utf-8")
    assert re.findall(r"<script[^>]*>([^<]*)</script>", page) == [""]
    assert "<style" not in page
    assert " style=" not in page
    assert not re.search(r"\son\w+=", page)
    for name in re.findall(r'(?:src|href)="static/([^"]+)"', page):
        assert (STATIC / name).is_file(), name
