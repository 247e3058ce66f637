"""PEFT, imported so that nothing is fetched: `import peft` imports bitsandbytes, where it is installed.

At its import, bitsandbytes 0.50 (backends/cpu/ops.py) fetches machine code from the hub if the package `kernels` is
there, and warns if it is not; either way it then has code of its own. So it is imported here first, without `kernels`.
"""

from __future__ import annotations

import importlib.util
import logging
import sys


def _import_bitsandbytes() -> bool:
    """Import bitsandbytes and return whether it is installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return False
    if "bitsandbytes" not in sys.modules:
        logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
        # transformers has imported it by now, where it is installed.
        hidden = sys.modules.get("kernels")
        sys.modules["kernels"] = None  # type: ignore[assignment]
        try:
            import bitsandbytes  # noqa: F401
        finally:
            del sys.modules["kernels"]
            if hidden is not None:
                sys.modules["kernels"] = hidden
    return True


has_bitsandbytes = _import_bitsandbytes()

import peft  # noqa: E402
from peft.tuners import lora  # noqa: E402
from peft.utils.integrations import dequantize_bnb_weight, get_bnb_param_type  # noqa: E402

__all__ = ["dequantize_bnb_weight", "get_bnb_param_type", "has_bitsandbytes", "lora", "peft"]
