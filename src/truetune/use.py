"""A run, an adapter or a base model, loaded to talk to: the same renderer, checked against its probes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from truetune.data.template import Renderer
from truetune.errors import UserError
from truetune.generate import Sampling, answers, base_only, stream
from truetune.model import Base, BaseWeights, choose_dtype, load_adapter, load_base
from truetune.records import Message
from truetune.rundir import list_runs
from truetune.source import find


@dataclass(frozen=True)
class Model:
    """A model to talk to. `num_probes`: prompts whose ids were compared with those of training; None without any.

    `quantization`: how the base's weights are kept, see Base.
    """

    name: str
    model: Any
    renderer: Renderer
    num_probes: int | None = None
    quantization: str | None = None

    @property
    def has_adapter(self) -> bool:
        """True if there is a base to compare with: below an adapter, or one whose weights can take their place."""
        return hasattr(self.model, "disable_adapter")

    def chat(
        self,
        messages: str | Sequence[Message],
        *,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> str:
        """Return the answer to a question or to a list of messages; greedy at temperature 0."""
        pieces = self.stream(messages, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
        return "".join(pieces).strip()

    def stream(
        self,
        messages: str | Sequence[Message],
        *,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> Iterator[str]:
        """Yield the answer piece by piece; the same `seed` draws the same answer."""
        sampling = Sampling(max_new_tokens, temperature, top_p, seed)
        yield from stream(self.model, self.renderer, messages=_as_messages(messages), sampling=sampling)

    def answers(
        self, prompts: Sequence[str | Sequence[Message]], *, is_base: bool = False, max_new_tokens: int = 512
    ) -> list[str]:
        """Return the greedy answers to several prompts; `is_base`: without the adapter."""
        with base_only(self.model, is_on=is_base):
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
    dtype, kind = choose_dtype()[0], source.base.quantization
    if is_base:
        origin = source.origin()
        return Model(origin.title, _ready(load_base(origin, dtype)), source.renderer, source.num_probes, kind)
    model, name = load_base(source.base, dtype), str(path)
    if source.folder is not None:
        model, name = load_adapter(model, source.folder), str(source.folder)
    elif source.is_full:
        # Loaded when it is asked for the first time, and kept: two models in memory from then on.
        model.disable_adapter = BaseWeights(model, cache(lambda: load_base(source.origin(), dtype)))
    return Model(name, _ready(model), source.renderer, source.num_probes, kind)


@dataclass(frozen=True)
class Voice:
    """One of the models that are served: a base, or an adapter on it. `adapter`: its name in PEFT; None for the base.

    `folder`: where the adapter lies.
    """

    name: str
    renderer: Renderer
    num_probes: int | None = None
    adapter: str | None = None
    folder: Path | None = None


def find_voices(paths: Sequence[str], *, use_run_system: bool = True) -> tuple[Base, list[Voice]]:
    """Return the base of runs, adapters or models, and a voice for it (the last one) and for each adapter.

    The base is prompted as the first of them is. No weights are loaded.

    Raises: UserError as `load` does, or if two have one name or different bases.
    """
    sources = [find(path, use_run_system=use_run_system) for path in paths]
    first = sources[0]
    for path, source in zip(paths, sources, strict=True):
        bases = (source.base, first.base)
        if len({(base.fingerprint, base.quantization) for base in bases}) > 1:
            names = dict(zip(("name", "first"), (base.described for base in bases), strict=True))
            raise UserError("serve_other_base", where=path, fix="serve_other_base", **names)
    voices = [
        Voice(_voice_name(path), source.renderer, source.num_probes, f"adapter_{number}", source.folder)
        for number, (path, source) in enumerate(zip(paths, sources, strict=True))
        if source.folder is not None
    ]
    voices.append(Voice(first.base.title, first.renderer, first.num_probes))
    for voice in voices:
        if [other.name for other in voices].count(voice.name) > 1:
            raise UserError("serve_same_name", where=voice.name, fix="serve_same_name", name=voice.name)
    return first.base, voices


def _voice_name(path: str) -> str:
    """Return the run's name, also for the adapter folder in it.

    >>> _voice_name("runs/cook-001"), _voice_name("runs/cook-001/adapter/")
    ('cook-001', 'cook-001')
    """
    folder = Path(path).expanduser().absolute()
    return folder.parent.name if folder.name == "adapter" else folder.name


def load_voices(base: Base, voices: Sequence[Voice]) -> Any:
    """Return the base with the adapters of all voices, ready for use; which one is active is not said."""
    model = load_base(base, choose_dtype()[0])
    for voice in voices:
        if voice.folder is not None:
            model = load_adapter(model, voice.folder, name=str(voice.adapter))
    return _ready(model)


def _ready(model: Any) -> Any:
    """Put the model on the device, without dropout."""
    from accelerate import PartialState

    # transformers refuses to move quantised weights: they lie where they were read to.
    is_placed = getattr(model, "quantization_method", None) is not None
    return (model if is_placed else model.to(PartialState().device)).eval()
