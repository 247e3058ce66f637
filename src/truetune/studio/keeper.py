"""Runs one command and writes down how it ended, so that a studio that was killed meanwhile finds it out.

python -m truetune.studio.keeper EXIT_FILE COMMAND...
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def keep(exit_file: Path, words: Sequence[str]) -> int:
    """Run the command, wait for its end, and return its exit code, 128 and the signal's number if one ended it."""
    # Not SIG_IGN, which the command would inherit: it gets the same signals and decides what they mean.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    code = subprocess.run(words, check=False).returncode
    code = 128 - code if code < 0 else code
    staging = exit_file.with_name(f".{exit_file.name}.tmp")
    staging.write_text(f"{code}\n", encoding="utf-8")
    staging.replace(exit_file)
    return code


if __name__ == "__main__":
    sys.exit(keep(Path(sys.argv[1]), sys.argv[2:]))
