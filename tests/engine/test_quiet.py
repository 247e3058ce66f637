"""PEFT is imported with bitsandbytes, and neither asks the network nor says anything."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from truetune.engine.quiet import has_bitsandbytes

FETCHES = "def get_kernel(*_, **__):\n    raise SystemExit('bitsandbytes fetched code')\n"
ASK = "import sys, truetune.use, truetune.assembly; print('peft' in sys.modules, 'bitsandbytes' in sys.modules)"


@pytest.mark.slow
def test_nothing_is_fetched_or_said(tmp_path: Path) -> None:
    """With a package `kernels` in the way that would tell of it."""
    (tmp_path / "kernels.py").write_text(FETCHES, encoding="utf-8")
    paths = [str(tmp_path), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    words = [sys.executable, "-W", "ignore", "-c", ASK]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert (done.stdout.split(), done.stderr) == (["True", str(has_bitsandbytes)], "")
    assert has_bitsandbytes
