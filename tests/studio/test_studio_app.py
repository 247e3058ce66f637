"""The routes: all that the contract names are there, and no text of a user is more than text."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from truetune.messages import CATALOGUES
from truetune.studio import app as module
from truetune.studio.app import create_app

XSS = '<img src=x onerror="alert(1)"></script><script>alert(2)</script>'


def test_the_contract_names_every_route_and_no_other(page: Any) -> None:
    named = set()
    for methods, paths in re.findall(r"^(GET|POST)\s+(.*?)(?:\s{2,}|\s→|$)", module.__doc__ or "", re.MULTILINE):
        for path in paths.split(", "):
            plain = path.split("?")[0].strip()
            named.add((methods, plain.replace("NAME", "{name}").replace("ID", "{name}").replace("STEP", "{step}")))
    real = {
        (method, getattr(route, "path", ""))
        for route in create_app(page.studio).routes
        for method in getattr(route, "methods", None) or ()
        if method != "HEAD" and getattr(route, "path", "") != "/health"
    }
    assert named == real
    assert len(real) == 25


def test_nothing_heavy_is_loaded() -> None:
    code = "import sys, truetune.studio.app, truetune.studio.running, truetune.commands.studio\n"
    code += "print([n for n in ('torch', 'transformers', 'peft', 'accelerate', 'safetensors') if n in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


def test_texts_in_both_languages_and_faults_in_the_pages_own(page: Any) -> None:
    for lang in ("zh", "en"):
        assert page.get("texts", lang=lang) == CATALOGUES[lang]
        error = page.get("runs/none", status=404)["error"]
        assert error["message"] == CATALOGUES[lang]["error.studio_missing"]
        assert error["fix"] == CATALOGUES[lang]["fix.studio_missing"]
        assert page.get("state")["lang"] == lang


def test_s17_payloads_stay_text(page: Any, home: Path) -> None:
    """As the name of a file, in a row, in a fault: always JSON, never in a page."""
    response = page.client.post(f"{page.url}api/files", params={"name": XSS}, content=b"[]")
    path = Path(response.json()["path"])
    assert path.parent == home / "runs" / ".uploads"
    assert "/" not in path.name
    saved = page.post(
        "talk/save",
        {
            "path": "runs/xss.jsonl",
            "messages": [{"role": "user", "content": XSS}, {"role": "assistant", "content": XSS}],
        },
    )
    assert json.loads(Path(saved["path"]).read_text())["messages"][0]["content"] == XSS
    for path_ in (f"runs/{XSS.replace('/', '')}", f"jobs/{XSS.replace('/', '')}"):
        answer = page.client.get(f"{page.url}api/{path_}")
        assert answer.status_code == 404
        assert answer.headers["content-type"] == "application/json"
    for name in ("state", "files"):
        assert page.client.get(f"{page.url}api/{name}").headers["content-type"] == "application/json"


def test_state(page: Any, home: Path, tiny_qwen: Path) -> None:
    state = page.get("state")
    assert (state["cwd"], state["roots"]) == (str(home), [str(home)])
    assert str(tiny_qwen) in state["models"]
    recipes = {path.stem for path in (Path(__file__).resolve().parents[2] / "examples").glob("*.yaml")}
    assert {preset["name"] for preset in state["presets"]} == recipes
    assert len(recipes) == 9
    assert page.client.get(f"{page.url}health").json() == {"status": "ok"}
