"""A GGUF file, read back before it gets its name: by transformers, and by llama.cpp where that is installed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from truetune import identity
from truetune.disk import clear_killed, staged_file, write_atomic
from truetune.drift import Drift, answer_logits, compare, model_logits
from truetune.errors import UserError
from truetune.export import gguf, llama
from truetune.export.vocabulary import vocabulary
from truetune.merge import LIMITS, Reference, load_with_reference, merge_weights, refuse_far
from truetune.model import load_gguf, need_gguf
from truetune.source import Source

EXACT = {"F32": LIMITS["float32"], "F16": LIMITS["float16"], "BF16": LIMITS["bfloat16"]}
ROUNDED = (0.5, 0.7)
"""Limits of types with less than 16 bits. Measured on the lighthouse run (135M weights, a hard case): Q8_0 0.003 nats
and 97 %, Q4_0 0.22 and 79 %, the Q4_1 that llama.cpp's quantiser made 1.4 and 51 %."""


@dataclass(frozen=True)
class Exported:
    """What was written, and how far it is from base and adapter as transformers and llama.cpp read it.

    `by_llama`, `prompts`: None where llama-cpp-python is not installed. `by_transformers`: None for an adapter alone.
    `trained`: see merge.Reference.
    """

    path: Path
    kind: str
    by_transformers: Drift | None
    by_llama: Drift | None
    prompts: llama.Prompts | None
    ending: gguf.Ending
    trained: Drift | None = None


def export_gguf(source: Source, *, output: Path, kind: str) -> Exported:
    """Write base and adapter, merged in fp32, as one GGUF file of type `kind` (F32, Q8_0, Q4_K_M …).

    Raises: UserError if the model's family, its tokenizer or the type cannot be written, or if what is read back says
        something else than base and adapter do.
    """
    require_free(output)
    need_gguf(str(output))
    if kind not in gguf.OWN_TYPES:
        llama.require_type(kind)
    model, reference = load_with_reference(source)
    model, _ = merge_weights(model, "float32")
    gguf.architecture(model.config.get_text_config(), where=source.base.name)
    end = ending(source)
    words = vocabulary(source.renderer.tokenizer, model.get_input_embeddings().weight.shape[0])
    clear_killed(output)
    with staged_file(output) as path:
        first = path if kind in gguf.OWN_TYPES else path.with_name("f32.gguf")
        first_kind = kind if kind in gguf.OWN_TYPES else "F32"
        template = source.renderer.chat_template
        gguf.write(first, model, kind=first_kind, words=words, ending=end, template=template)
        if first is not path:
            llama.quantize(first, path, kind=kind)
            first.unlink()
        del model
        by_transformers = compare(reference.logits, answer_logits(reference.pairs, of=_read_back(path, source)))
        _refuse(by_transformers, kind, where=str(output))
        by_llama, prompts = check_in_llama(path, source, reference=reference, kind=kind)
    return Exported(output, kind, by_transformers, by_llama, prompts, end, reference.trained)


def require_free(output: Path) -> None:
    """Raise UserError if `output` is something else than an earlier export, which is replaced."""
    if output.is_dir():
        raise UserError("export_in_the_way", where=str(output), fix="export_in_the_way")
    if output.is_file():
        with output.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise UserError("export_in_the_way", where=str(output), fix="export_in_the_way")


def _read_back(path: Path, source: Source) -> Any:
    return model_logits(load_gguf(path, source.base).eval())


def ending(source: Source) -> gguf.Ending:
    """Return the ids that the file names: the end of a turn is what ends the answers of training."""
    tokenizer, stops = source.renderer.tokenizer, identity.stop_ids(source.renderer)
    bos, adds_bos = tokenizer.bos_token_id, begins_with_bos(source)
    eos = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else stops[0]
    return gguf.Ending(eos, stops[0], bos, tokenizer.unk_token_id, tokenizer.pad_token_id, adds_bos)


def begins_with_bos(source: Source) -> bool:
    """Return whether every prompt begins with the token bos, and has it nowhere else: llama.cpp is to add it then.

    SmolLM2 calls the token bos that begins each of its turns.
    """
    bos = source.renderer.tokenizer.bos_token_id
    return bos is not None and all(ids[0] == bos and bos not in ids[1:] for ids in prompts_of(source))


def prompts_of(source: Source) -> list[list[int]]:
    """Return the ids of the probes; without truetune.json, of the fixed ones, rendered now."""
    if source.probes:
        return [probe["prompt_ids"] for probe in source.probes]
    return [source.renderer.prompt_ids(messages) for messages in identity.FIXED_PROBES]


def check_in_llama(
    path: Path, source: Source, *, reference: Reference, kind: str, adapter: Path | None = None
) -> tuple[Drift | None, llama.Prompts | None]:
    """Compare a file, and a GGUF adapter on it, with base and adapter in llama.cpp; (None, None) where it is missing.

    Raises: UserError if it reads a prompt otherwise, holds another template, or says something else.
    """
    if not llama.is_installed():
        return None, None
    longest = max(*map(len, reference.pairs), *map(len, prompts_of(source)))
    with llama.Llama(path, num_context=longest + 1, adapter=adapter) as loaded:
        if loaded.template() != source.renderer.chat_template and adapter is None:
            raise UserError("gguf_template", where=str(path), fix="gguf_prompt")
        prompts = loaded.prompts(source.renderer.tokenizer, prompts_of(source))
        _refuse_prompts(prompts, where=str(path))
        drift = compare(reference.logits, answer_logits(reference.pairs, of=loaded.logits()))
    _refuse(drift, kind, where=f"llama.cpp, {path}")
    return drift, prompts


def _refuse_prompts(prompts: llama.Prompts, *, where: str) -> None:
    if prompts.first_other is not None:
        raise UserError("gguf_prompt", where=where, fix="gguf_prompt", number=prompts.first_other)


def _refuse(drift: Drift, kind: str, *, where: str) -> None:
    refuse_far(drift, where=where, fix="export_far", limits=EXACT.get(kind, ROUNDED))


def export_ollama(source: Source, *, folder: Path, kind: str) -> tuple[Exported, int]:
    """Write a folder with a GGUF file and a Modelfile; return what was written and how many probes its template gives.

    Raises: UserError as `export_gguf` does, or if no template of Ollama's that gives the probes can be made.
    """
    from truetune.export import ollama

    if folder.is_file() or (
        folder.is_dir() and any(p.name not in ("model.gguf", "Modelfile") for p in folder.iterdir())
    ):
        raise UserError("export_in_the_way", where=str(folder), fix="export_in_the_way")
    renderer = source.renderer
    probes = source.probes or [
        {"messages": messages, "prompt_ids": renderer.prompt_ids(messages)} for messages in identity.FIXED_PROBES
    ]
    # Before the weights are read: a template that cannot be made is told at once.
    bos = renderer.tokenizer.bos_token if begins_with_bos(source) else ""
    content = ollama.modelfile(renderer, probes=probes, weights="model.gguf", skip=bos)
    num_proven = ollama.prove(ollama.go_template(renderer, skip=bos), renderer, probes=probes, skip=bos)
    folder.mkdir(parents=True, exist_ok=True)
    done = export_gguf(source, output=folder / "model.gguf", kind=kind)
    write_atomic(folder / "Modelfile", content)
    return done, num_proven
