"""A run, an adapter or a base model, loaded to talk to: the same renderer, checked against its probes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from truetune import checkpoint, identity
from truetune.data.template import TEMPLATE_FILE, Renderer, build_renderer
from truetune.errors import UserError
from truetune.generate import Sampling, answers, stream
from truetune.model import choose_dtype, eos_ids, find_base, load_adapter, load_base, load_tokenizer, prepare_base
from truetune.records import Message
from truetune.rundir import RunDir, list_runs


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
    folder = _adapter_folder(Path(path).expanduser())
    loaded = _load_base_only(str(path)) if folder is None else _load_adapter(folder, is_base=is_base)
    if use_run_system:
        return loaded
    return replace(loaded, renderer=replace(loaded.renderer, system=None))


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


def _load_base_only(name: str) -> Model:
    base = find_base(name)
    prepare_base(base)
    renderer = build_renderer(load_tokenizer(base.folder), eos_ids(base.folder))
    return Model(name, _ready(load_base(base, choose_dtype()[0])), renderer)


def _load_adapter(folder: Path, *, is_base: bool) -> Model:
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    known = identity.read(folder)
    revision = config.get("revision") or "main"
    hub = known["base"]["hub"] if known else "huggingface"
    base = find_base(config["base_model_name_or_path"], revision=revision, hub=hub)
    if known:
        identity.check_base(folder, known, name=base.name, fingerprint=base.fingerprint)
    prepare_base(base)
    has_tokenizer = (folder / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(folder if has_tokenizer else base.folder)
    if known:
        renderer = Renderer(
            tokenizer,
            (folder / TEMPLATE_FILE).read_text(encoding="utf-8"),
            tuple(known["stop_ids"]),
            known["system"],
            known["chat_template_kwargs"],
            known["date"],
        )
    else:
        renderer = build_renderer(tokenizer, eos_ids(base.folder))
    num_probes = identity.check(folder, renderer, known=known) if known else None
    model = load_base(base, choose_dtype()[0])
    if is_base:
        return Model(base.title, _ready(model), renderer, num_probes)
    return Model(str(folder), _ready(load_adapter(model, folder)), renderer, num_probes)


def _ready(model: Any) -> Any:
    """Put the model on the device, without dropout."""
    from accelerate import PartialState

    return model.to(PartialState().device).eval()
