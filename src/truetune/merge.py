"""An adapter merged into its base, in fp32, and compared with base and adapter apart.

base + adapter ──► logits at answers ─┐
      │ merge, in fp32                ├─► how far apart; too far is refused
      ▼                               │
 stored as dtype ──► read back ───────┘
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from truetune import identity
from truetune.disk import clear_killed, read_manifest, staged, to_json, write_atomic
from truetune.drift import MAX_ROWS, Drift, Logits, answer_logits, chosen, compare, model_logits
from truetune.errors import UserError
from truetune.generate import Sampling
from truetune.model import load_adapter, load_base, pad_id, stored_dtype
from truetune.records import Pair
from truetune.source import Source

DTYPES = ("auto", "float32", "bfloat16", "float16")
LIMITS = {"float32": (1e-4, 0.97), "float16": (0.02, 0.95), "bfloat16": (0.02, 0.95)}
"""Nats a token at most, share of tokens with the same likeliest token at least; farther apart is refused. Measured
(docs/export.md): float32 4e-7, float16 3e-6, bfloat16 6e-5 nats; a lost adapter costs whole nats."""
MAX_LOST = 0.5
"""Rounding that moves the weights half as far as training did is refused, too."""
FACTS = {"made_by": "truetune merge"}


@dataclass(frozen=True)
class Reference:
    """What base and adapter, apart, say: `logits` at the answers of `pairs`.

    `learned`: how far training moved them from the base, KL in nats a token; None without an adapter. `trained`: how
    far they are from what was trained, where that was on a quantised base.
    """

    pairs: Sequence[Pair]
    logits: Logits
    learned: float | None = None
    trained: Drift | None = None


@dataclass(frozen=True)
class Merged:
    """What was written. `lost`: how far rounding moved the weights, against how far training did.

    `trained`: see Reference.
    """

    folder: Path
    dtype: str
    drift: Drift
    lost: float
    learned: float
    trained: Drift | None = None


def merge(source: Source, *, output: Path, dtype: str = "auto") -> Merged:
    """Write base and adapter as one Hugging Face folder, proven by reading it back.

    An adapter that was trained on a quantised base is merged into the same base as it is on disk.

    Raises: UserError if there is nothing to merge, `output` is in the way, the base is quantised, or what is read back
        says something else than base and adapter do.
    """
    source.require_adapter()
    require_free(output)
    stored = stored_dtype(source.base.folder) if dtype == "auto" else dtype
    model, reference = load_with_reference(source)
    model, lost = merge_weights(model, stored)
    if lost > MAX_LOST:
        values = {"dtype": stored, "lost": lost, "max_lost": MAX_LOST}
        raise UserError("merge_lost", where=str(output), fix="merge_far", **values)
    clear_killed(output)
    with staged(output, **FACTS, base=source.base.name, dtype=stored) as folder:
        model.to(getattr(torch, stored)).save_pretrained(str(folder))
        del model
        write_use(folder, source)
        whole = replace(source.base, name=str(output), folder=folder, quantization=None)
        again = load_base(whole, "float32").eval()
        drift = compare(reference.logits, answer_logits(reference.pairs, of=model_logits(again)))
        refuse_far(drift, where=str(output), fix="merge_far", limits=LIMITS[stored])
    return Merged(output, stored, drift, lost, reference.learned or 0.0, reference.trained)


def require_free(output: Path) -> None:
    """Raise UserError if `output` holds something else than an earlier merge, which is replaced."""
    if output.exists() and not output.is_dir():
        raise UserError("output_is_file", where=str(output), fix="output_other")
    if not output.is_dir() or not any(output.iterdir()):
        return
    try:
        is_ours = read_manifest(output).get("made_by") == FACTS["made_by"]
    except (OSError, ValueError):
        is_ours = False
    if not is_ours:
        raise UserError("merge_not_empty", where=str(output), fix="output_other")


def load_with_reference(source: Source) -> tuple[Any, Reference]:
    """Return base and adapter in fp32, and what they say at answers of the run's rows, or at their own answers.

    The base is as it is on disk; if the adapter was trained on it quantised, that is compared, too.

    Raises: UserError if the base is quantised, or the tokenizer has tokens that the base has no weights for.
    """
    _refuse_quantised(source)
    model = load_base(replace(source.base, quantization=None), "float32")
    num_rows, num_tokens = model.get_input_embeddings().weight.shape[0], len(source.renderer.tokenizer)
    if num_tokens > num_rows:
        raise UserError("vocab_grown", where=source.path, fix="vocab_grown", tokens=num_tokens, rows=num_rows)
    if source.folder is not None:
        model = load_adapter(model, source.folder)
    model.eval()
    pairs = chosen(source.run_pairs(MAX_ROWS) or _own_pairs(model, source))
    logits = answer_logits(pairs, of=model_logits(model))
    if source.folder is None:
        return model, Reference(pairs, logits)
    with model.disable_adapter():
        learned = compare(logits, answer_logits(pairs, of=model_logits(model))).kl
    return model, Reference(pairs, logits, learned, _from_trained(source, pairs, logits))


def _from_trained(source: Source, pairs: Sequence[Pair], logits: Logits) -> Drift | None:
    """Return how far `logits` are from those of the adapter on the quantised base that it was trained on."""
    if source.base.quantization is None or source.folder is None:
        return None
    model = load_adapter(load_base(source.base, "float32"), source.folder).eval()
    return compare(answer_logits(pairs, of=model_logits(model)), logits)


def _refuse_quantised(source: Source) -> None:
    config = json.loads((source.base.folder / "config.json").read_text(encoding="utf-8"))
    kind = config.get("quantization_config")
    if kind is not None:
        name = kind.get("quant_method", "?")
        raise UserError("merge_quantised", where=source.base.name, fix="merge_quantised", kind=name)


def _own_pairs(model: Any, source: Source) -> list[Pair]:
    """Return the probes, or some questions, with the model's own greedy answers: where the run's data are not there."""
    renderer = source.renderer
    probes = source.probes or [{"messages": messages} for messages in identity.FIXED_PROBES]
    pairs = []
    for probe in probes:
        prompt = identity.prompt_ids(renderer, probe)
        ids_BT = torch.tensor([prompt])
        output_BT = model.generate(
            input_ids=ids_BT,
            attention_mask=torch.ones_like(ids_BT),
            eos_token_id=list(renderer.stop_ids),
            pad_token_id=pad_id(renderer.tokenizer),
            **Sampling(32).arguments(),
        )
        pairs.append(Pair(tuple(prompt), tuple(output_BT[0, len(prompt) :].tolist())))
    return pairs


def merge_weights(model: Any, dtype: str) -> tuple[Any, float]:
    """Return the model with its adapter merged into it, and how much of that the rounding to `dtype` takes.

    The share is ‖rounded - merged‖ / ‖merged - base‖ over all weights that have LoRA; 0 without an adapter.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not hasattr(model, "peft_config"):
        return model, 0.0
    _untie(model.get_base_model())
    changed, rounded = 0.0, 0.0
    with torch.no_grad(), warnings.catch_warnings():
        # PEFT says of each layer that it is merged already, and that a head is not tied any longer.
        warnings.simplefilter("ignore")
        for module in model.modules():
            weight = module.get_base_layer().weight if isinstance(module, BaseTunerLayer) else None
            if weight is None or module.merged:
                continue
            before = weight.detach().clone()
            module.merge(safe_merge=True)
            after = module.get_base_layer().weight
            changed += float((after - before).norm()) ** 2
            rounded += float((after.to(getattr(torch, dtype)).float() - after).norm()) ** 2
        whole = model.merge_and_unload()
    head = whole.get_output_embeddings()
    if head is not None and head.weight is not whole.get_input_embeddings().weight:
        whole.config.get_text_config().tie_word_embeddings = False
        whole.config.tie_word_embeddings = False
    return whole, (rounded / changed) ** 0.5 if changed else 0.0


def _untie(model: Any) -> None:
    """Give the head weights of its own if it shares them with the embedding and one of the two has an adapter.

    Else what is merged into one is in the other, too, where it was not trained.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    sides = [model.get_input_embeddings(), model.get_output_embeddings()]
    layers = [side.get_base_layer() if isinstance(side, BaseTunerLayer) else side for side in sides]
    is_adapted = any(isinstance(side, BaseTunerLayer) for side in sides)
    if is_adapted and layers[1] is not None and layers[0].weight is layers[1].weight:
        layers[1].weight = torch.nn.Parameter(layers[1].weight.detach().clone(), requires_grad=False)


def write_use(folder: Path, source: Source) -> None:
    """Write beside merged weights what their use needs: tokenizer, template, stop tokens, probes, card."""
    renderer = source.renderer
    renderer.save_tokenizer(folder)
    identity.write_ending(folder, renderer)
    if source.known:
        write_atomic(folder / identity.FILE, to_json(source.known, indent=2) + "\n")
    head = {"base_model": source.base.name, "pipeline_tag": "text-generation", "tags": ["sft", "merged"]}
    lines = "".join(f"{key}: {to_json(value)}\n" for key, value in head.items())
    body = f"# {folder.name}\n\nA base model and an adapter that was trained with Truetune, merged in float32.\n"
    write_atomic(folder / "README.md", f"---\n{lines}---\n\n{body}")


def refuse_far(drift: Drift, *, where: str, fix: str, limits: tuple[float, float]) -> None:
    """Raise UserError if a model read back says too much else than base and adapter do.

    `limits`: nats a token at most, share of tokens with the same likeliest token at least.
    """
    if drift.kl > limits[0] or drift.same_best < limits[1]:
        values = {"max_kl": limits[0], "min_same": limits[1]}
        raise UserError("too_far", where=where, fix=fix, **drift.facts(), **values)
