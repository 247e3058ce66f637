"""The environments of the peers: made with venv and pip on first use, kept in bench/.envs or TRUETUNE_BENCH_ENVS."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from bench.recipe import BENCH

ENVS = Path(os.environ.get("TRUETUNE_BENCH_ENVS", BENCH / ".envs"))
UNWANTED = {"lf": ["torchvision", "torchaudio"]}
"""Packages that are taken out after the installation; requirements-lf.txt says why."""


class EnvError(Exception):
    """An environment could not be made; the text is the reason for the table."""


def python_of(name: str) -> Path:
    """Return the interpreter of an environment; make it, or bring it up to date, if that was not done before.

    Raises: EnvError with pip's last line.
    """
    folder, requirements = ENVS / name, BENCH / f"requirements-{name}.txt"
    python, stamp = folder / "bin" / "python", folder / "installed.txt"
    wanted = requirements.read_text(encoding="utf-8")
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        return python
    sys.stderr.write(f"Installing {requirements.name} into {folder} (some minutes, once)\n")
    if not python.exists():
        _call(sys.executable, "-m", "venv", str(folder))
    _call(str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", str(requirements))
    if name in UNWANTED:
        _call(str(python), "-m", "pip", "uninstall", "--quiet", "--yes", *UNWANTED[name])
    stamp.write_text(wanted, encoding="utf-8")
    return python


def _call(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise EnvError(f"{' '.join(words[1:4])}: {lines[-1] if lines else f'exit code {done.returncode}'}")
