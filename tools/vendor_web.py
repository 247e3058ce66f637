"""Fetch the page's libraries from npm into the package, with versions, hashes and licences in vendor.json.

    python tools/vendor_web.py            needs npm and the network
    python tools/vendor_web.py --check    compares the files with vendor.json; needs neither

There is no build step: the browser loads these files as they are. One word differs from npm's: a bare import that
would need an import map, which the page's Content-Security-Policy does not allow.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "src" / "truetune" / "studio" / "static" / "vendor"
TESTS = ROOT / "tests" / "browser" / "vendor"

# folder → package → (version, {our name: (npm's path, {what npm wrote: what we need})})
Files = dict[str, tuple[str, dict[str, str]]]
WANTED: dict[Path, dict[str, tuple[str, Files]]] = {
    PAGE: {
        "preact": (
            "11.2.0",
            {
                "preact.js": ("dist/preact.mjs", {}),
                "hooks.js": ("hooks/dist/hooks.mjs", {'from"preact"': 'from"./preact.js"'}),
                "LICENSE-preact": ("LICENSE", {}),
            },
        ),
        "htm": ("3.1.1", {"htm.js": ("dist/htm.mjs", {}), "LICENSE-htm": ("LICENSE", {})}),
        "uplot": (
            "1.6.32",
            {
                "uplot.js": ("dist/uPlot.esm.js", {}),
                "uplot.css": ("dist/uPlot.min.css", {}),
                "LICENSE-uplot": ("LICENSE", {}),
            },
        ),
    },
    # Only the tests look at the page with it.
    TESTS: {"axe-core": ("4.14.1", {"axe.min.js": ("axe.min.js", {}), "LICENSE-axe-core": ("LICENSE", {})})},
}


def fetch(folder: Path, packages: dict[str, tuple[str, Files]]) -> None:
    """Write the files of `packages` and their vendor.json into `folder`; npm checks the hash of what it sends."""
    folder.mkdir(parents=True, exist_ok=True)
    facts: dict[str, Any] = {}
    for name, (version, files) in packages.items():
        with tempfile.TemporaryDirectory() as scratch:
            command = ["npm", "pack", "--silent", "--pack-destination", scratch, f"{name}@{version}"]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            with tarfile.open(next(Path(scratch).glob("*.tgz"))) as archive:
                package = json.loads(_read(archive, "package.json"))
                facts[name] = {"version": package["version"], "license": package["license"], "files": {}}
                for ours, (theirs, changes) in files.items():
                    content = _changed(_read(archive, theirs), changes, where=f"{name}/{theirs}")
                    (folder / ours).write_bytes(content)
                    told = {"from": theirs, "sha256": hashlib.sha256(content).hexdigest()}
                    facts[name]["files"][ours] = told | ({"changed": changes} if changes else {})
    (folder / "vendor.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def _read(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(f"package/{name}")
    if file is None:
        raise FileNotFoundError(name)
    return file.read()


def _changed(content: bytes, changes: dict[str, str], *, where: str) -> bytes:
    for old, new in changes.items():
        if content.count(old.encode()) != 1:
            raise ValueError(f"{where}: {old} is not there once")
        content = content.replace(old.encode(), new.encode())
    return content


def differences(folder: Path) -> list[str]:
    """Return the files of a folder that are not what vendor.json says, or that it does not name."""
    facts = json.loads((folder / "vendor.json").read_text(encoding="utf-8"))
    known = {file: told["sha256"] for package in facts.values() for file, told in package["files"].items()}
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    del found["vendor.json"]
    return sorted(name for name in known.keys() | found.keys() if known.get(name) != found.get(name))


if __name__ == "__main__":
    if "--check" not in sys.argv:
        for target, packages in WANTED.items():
            fetch(target, packages)
    wrong = [f"{folder.relative_to(ROOT)}/{name}" for folder in WANTED for name in differences(folder)]
    sys.stdout.writelines(f"{name}: not as vendor.json says\n" for name in wrong)
    sys.exit(bool(wrong))
