"""Put known bugs back one by one, and fail if the tests do not notice one.

    python tools/mutation_check.py [NAME ...]      all, or those whose name holds one of the words

Each bug (mutants.py) is a replacement in one file of a copy of the repository, and the tests that must fail for it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mutants import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT_S = 300


def survives(mutant: Mutant, repository: Path) -> bool:
    """Return True if the tests pass although the bug is in."""
    path = repository / "src" / "truetune" / mutant.file
    original = path.read_text(encoding="utf-8")
    if original.count(mutant.old) != 1:
        sys.exit(f"{mutant.name}: {mutant.file} holds the place {original.count(mutant.old)} times; mend the table")
    path.write_text(original.replace(mutant.old, mutant.new), encoding="utf-8")
    environment = os.environ | {
        "PYTHONPATH": str(repository / "src"),
        "PYTHONDONTWRITEBYTECODE": "1",
        "TRUETUNE_SHARED": os.environ.get("TRUETUNE_SHARED", str(ROOT.parent / "shared")),
    }
    words = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "-m",
        "not slow and not real and not llama and not browser",
        *mutant.tests.split(),
    ]
    try:
        done = subprocess.run(words, cwd=repository, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)
    finally:
        path.write_text(original, encoding="utf-8")
    if done.returncode not in (0, 1):
        sys.exit(
            f"{mutant.name}: the tests did not run (exit {done.returncode})\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        )
    return done.returncode == 0


def main(words: list[str]) -> int:
    """Try the mutants that hold one of `words` (all without any); return the number that survived."""
    chosen = [mutant for mutant in MUTANTS if not words or any(word in mutant.name for word in words)]
    survived = 0
    with tempfile.TemporaryDirectory() as folder:
        repository = Path(folder) / "repository"
        ignored = shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", ".*_cache", ".hypothesis")
        shutil.copytree(ROOT, repository, ignore=ignored)
        for mutant in chosen:
            began = time.perf_counter()
            alive = survives(mutant, repository)
            survived += alive
            verdict = "SURVIVED" if alive else "noticed"
            sys.stdout.write(f"{verdict:9} {time.perf_counter() - began:5.1f} s  {mutant.name}\n")
            sys.stdout.flush()
    sys.stdout.write(f"mutants: {len(chosen)} tried, {survived} survived\n")
    return survived


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1:]), 1))
