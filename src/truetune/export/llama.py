"""llama.cpp itself (llama-cpp-python): does a file say what base and adapter say, and does it read prompts alike?"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from truetune.errors import MachineError, UserError

INSTALL = "pip install llama-cpp-python"


def is_installed() -> bool:
    """Return whether llama-cpp-python is there."""
    import importlib.util

    return importlib.util.find_spec("llama_cpp") is not None


@dataclass(frozen=True)
class Prompts:
    """How llama.cpp reads prompts. `num_same`: probes with the ids of training, of `num_reachable`.

    Others hold control tokens as text that a user wrote: no text gives these ids, so that none of them can agree.
    """

    num_same: int
    num_reachable: int
    num_probes: int
    first_other: int | None


class Llama:
    """A GGUF file in llama.cpp, with a GGUF adapter if one is given."""

    def __init__(self, path: Path, *, num_context: int, adapter: Path | None = None) -> None:
        import llama_cpp

        options: dict[str, Any] = {"n_ctx": num_context, "n_batch": num_context, "logits_all": True, "verbose": False}
        # Its own choice is every core, which waits for ever on a machine that does something else, too.
        options |= {"n_threads": torch.get_num_threads(), "n_threads_batch": torch.get_num_threads()}
        options |= {"lora_path": str(adapter)} if adapter else {}
        try:
            with _quiet(llama_cpp):
                self._llama = llama_cpp.Llama(str(path), **options)
        except (ValueError, RuntimeError) as error:
            raise MachineError("llama_refused", where=str(path), fix="llama_refused", problem=error) from None

    def __enter__(self) -> Llama:
        return self

    def __exit__(self, *_: object) -> None:
        self._llama.close()

    def logits(self) -> Callable[[list[int]], torch.Tensor]:
        """Return the function ids → logits [T, V]."""

        def of(ids: list[int]) -> torch.Tensor:
            self._llama.n_tokens = 0  # as its reset() does
            self._llama.eval(ids)
            return torch.from_numpy(np.array(self._llama.scores[: len(ids)], np.float32))

        return of

    def tokenize(self, text: str) -> list[int]:
        """Return the ids of a rendered prompt, control tokens as such, nothing added."""
        ids: list[int] = self._llama.tokenize(text.encode(), add_bos=False, special=True)
        return ids

    def template(self) -> str:
        """Return the chat template in the file."""
        return str(self._llama.metadata.get("tokenizer.chat_template", ""))

    def prompts(self, tokenizer: Any, prompts: Sequence[list[int]]) -> Prompts:
        """Compare how llama.cpp reads the text of each prompt with its ids."""
        num_same = num_reachable = 0
        first_other: int | None = None
        for number, ids in enumerate(prompts, start=1):
            text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            if tokenizer(text, add_special_tokens=False)["input_ids"] != ids:
                continue
            num_reachable += 1
            if self.tokenize(text) == ids:
                num_same += 1
            elif first_other is None:
                first_other = number
        return Prompts(num_same, num_reachable, len(prompts), first_other)


@contextmanager
def _quiet(llama_cpp: Any) -> Iterator[None]:
    """Keep llama.cpp from writing lines of its own."""
    silent = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    try:
        yield
    finally:
        llama_cpp.llama_log_set(llama_cpp._logger.llama_log_callback, ctypes.c_void_p(0))


def require_type(kind: str) -> int:
    """Return llama.cpp's number of a type.

    Raises: UserError if llama-cpp-python is not there, or has no such type.
    """
    if not is_installed():
        raise UserError("llama_missing", where=kind, fix="llama_missing", kind=kind, install=INSTALL)
    import llama_cpp

    number = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}", None)
    if number is None:
        raise UserError("gguf_type", where="--quantize", fix="gguf_type", kind=kind)
    return int(number)


def quantize(source: Path, target: Path, *, kind: str) -> None:
    """Quantise a GGUF file by llama.cpp.

    Raises: UserError as `require_type` does, MachineError if it fails.
    """
    number = require_type(kind)
    import llama_cpp

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = number
    parameters.nthread = torch.get_num_threads()
    with _quiet(llama_cpp):
        code = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(parameters))
    if code:
        raise MachineError("llama_refused", where=str(target), fix="llama_refused", problem=f"quantize: {code}")
