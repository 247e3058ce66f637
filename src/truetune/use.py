"""A run, an adapter or a base model, loaded to talk to: the same renderer, checked against its probes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from truetune import checkpoint, identity
from truetune.data.template import TEMPLATE_FILE, Renderer, build_renderer
from truetune.errors import UserError
from truetune.generate import Sampling, answers, base_only, stream
from truetune.model import Base, choose_dtype, eos_ids, find_base, load_adapter, load_base, load_tokenizer, prepare_base
from truetune.records import Message
from truetune.rundir import RunDir, list_runs


@dataclass(frozen=True)
class Model:
    """A model to talk to. `num_probes`: prompts whose ids were compared with those of training; None without any."""

    name: str
    model: Any
    renderer: Renderer
    num_probes: int | None = None

    @property
    def has_adapter(self) -> bool:
        """True if there is a base below it to compare with."""
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
    source = _find(str(path), use_run_system=use_run_system)
    model = load_base(source.base, choose_dtype()[0])
    if source.folder is None:
        return Model(str(path), _ready(model), source.renderer)
    if is_base:
        return Model(source.base.title, _ready(model), source.renderer, source.num_probes)
    return Model(str(source.folder), _ready(load_adapter(model, source.folder)), source.renderer, source.num_probes)


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
    sources = [_find(path, use_run_system=use_run_system) for path in paths]
    first = sources[0]
    for path, source in zip(paths, sources, strict=True):
        if source.base.fingerprint != first.base.fingerprint:
            names = {"name": source.base.title, "first": first.base.title}
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


@dataclass(frozen=True)
class _Source:
    """What a path means: a base, an adapter folder if there is one, and how it is prompted; no weights yet."""

    base: Base
    folder: Path | None
    renderer: Renderer
    num_probes: int | None = None


def _find(path: str, *, use_run_system: bool) -> _Source:
    folder = _adapter_folder(Path(path).expanduser())
    found = _find_base_only(path) if folder is None else _find_adapter(folder)
    return found if use_run_system else replace(found, renderer=replace(found.renderer, system=None))


def _adapter_folder(path: Path) -> Path | None:
    """Return the folder with adapter_config.json that `path` means, or None if it is a model's name."""
    run = RunDir(path)
    if run.is_run:
        # While a run goes on, or after it failed, its newest checkpoint is newer than what a stop before left.
        if run.adapter.is_dir() and run.read_info()["state"] in ("done", "stopped"):
            return run.adapter
        newest, _ = checkpoint.find(run.checkpoints)
        if newest is None:
            raise UserError("run_no_adapter", where=str(path), fix="run_no_adapter", path=path)
        return newest
    return path if (path / "adapter_config.json").is_file() else None


def _find_base_only(name: str) -> _Source:
    base = find_base(name)
    prepare_base(base)
    return _Source(base, None, build_renderer(load_tokenizer(base.folder), eos_ids(base.folder)))


def _find_adapter(folder: Path) -> _Source:
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    known = identity.read(folder)
    revision = config.get("revision") or "main"
    hub = known["base"]["hub"] if known else "huggingface"
    base = find_base(config["base_model_name_or_path"], revision=revision, hub=hub)
    if known and known["base"]["fingerprint"] != base.fingerprint:
        raise UserError("other_base", where=str(folder), fix="other_base", name=base.name)
    prepare_base(base)
    has_tokenizer = (folder / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(folder if has_tokenizer else base.folder)
    if not known:
        return _Source(base, folder, build_renderer(tokenizer, eos_ids(base.folder)))
    renderer = Renderer(
        tokenizer,
        (folder / TEMPLATE_FILE).read_text(encoding="utf-8"),
        tuple(known["stop_ids"]),
        known["system"],
        known["chat_template_kwargs"],
        known["date"],
    )
    return _Source(base, folder, renderer, identity.check(folder, renderer, probes=known["probes"]))


def _ready(model: Any) -> Any:
    """Put the model on the device, without dropout."""
    from accelerate import PartialState

    return model.to(PartialState().device).eval()
