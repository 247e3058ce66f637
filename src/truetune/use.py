"""A run, an adapter or a base model, loaded to talk to: the same renderer, checked against its probes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from truetune.data.template import Renderer
from truetune.errors import UserError
from truetune.generate import Sampling, answers, stream
from truetune.model import choose_dtype, load_adapter, load_base
from truetune.records import Message
from truetune.rundir import list_runs
from truetune.source import find


@dataclass(frozen=True)
class Model:
    """A model to talk to. `num_probes`: prompts whose ids were compared with those of training; None without any."""

    name: str
    model: Any
    renderer: Renderer
    num_probes: int | None = None

    def chat(self, messages: str | Sequence[Message], *, max_new_tokens: int = 512, temperature: float = 0.0) -> str:
        """Return the answer to a question or to a list of messages; greedy at temperature 0."""
        return "".join(self.stream(messages, max_new_tokens=max_new_tokens, temperature=temperature)).strip()

    def stream(
        self, messages: str | Sequence[Message], *, max_new_tokens: int = 512, temperature: float = 0.0
    ) -> Iterator[str]:
        """Yield the answer piece by piece."""
        sampling = Sampling(max_new_tokens, temperature)
        yield from stream(self.model, self.renderer, messages=_as_messages(messages), sampling=sampling)

    def answers(
        self, prompts: Sequence[str | Sequence[Message]], *, is_base: bool = False, max_new_tokens: int = 512
    ) -> list[str]:
        """Return the greedy answers to several prompts; `is_base`: without the adapter."""
        adapter_off = self.model.disable_adapter() if is_base else nullcontext()
        with adapter_off:
            return answers(
                self.model,
                self.renderer,
                prompts=[*map(_as_messages, prompts)],
                sampling=Sampling(max_new_tokens),
            )


def _as_messages(messages: str | Sequence[Message]) -> Sequence[Message]:
    return [{"role": "user", "content": messages}] if isinstance(messages, str) else messages


def newest_run(root: Path = Path("runs")) -> Path:
    """Return the newest run under `root`.

    Raises: UserError if there is none.
    """
    runs = list_runs(root)
    if not runs:
        raise UserError("no_runs", where=str(root), fix="no_runs")
    return runs[-1].path


def load(path: str | Path, *, is_base: bool = False, use_run_system: bool = True) -> Model:
    """Load a run, an adapter folder or a model for use. `is_base`: the run's base, prompted as the run is.

    Raises: UserError if it does not exist, its base is another one than it was trained on, or a probe differs.
    """
    source = find(str(path), use_run_system=use_run_system)
    model = load_base(source.base, choose_dtype()[0])
    if source.folder is None:
        return Model(str(path), _ready(model), source.renderer, source.num_probes)
    if is_base:
        return Model(source.base.title, _ready(model), source.renderer, source.num_probes)
    return Model(str(source.folder), _ready(load_adapter(model, source.folder)), source.renderer, source.num_probes)


def _ready(model: Any) -> Any:
    """Put the model on the device, without dropout."""
    from accelerate import PartialState

    return model.to(PartialState().device).eval()
