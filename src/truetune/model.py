"""The tokenizer, the base model and its LoRA layers: the only place where weights are loaded.

A base is a folder of safetensors, a GGUF file (dequantised once into the cache), or a hub id (see hub.py).
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from truetune.config import cache_dir
from truetune.errors import UserError, out_of_memory
from truetune.fingerprint import hash_file, hash_folder
from truetune.hub import fetch
from truetune.quantisation import arguments, require
from truetune.weights import check_files


@dataclass(frozen=True)
class Base:
    """A base model on disk. `name`: as the user gave it. `folder`: a Hugging Face folder. `fingerprint`: sha256.

    `quantization`: how its weights are kept in memory: 4bit, 8bit, or None, as they are.
    """

    name: str
    folder: Path
    fingerprint: str
    revision: str = "main"
    hub: str = "huggingface"
    quantization: str | None = None

    @property
    def title(self) -> str:
        """The name to show: the last part of a path, a hub id as it is."""
        return Path(self.name).name if self.is_local else self.name

    @property
    def is_local(self) -> bool:
        """True if the name is a path, not a hub id."""
        return _looks_like_path(self.name) or Path(self.name).expanduser().exists()

    @property
    def described(self) -> str:
        """The title, and how its weights are kept if they are quantised."""
        return f"{self.title} ({self.quantization})" if self.quantization else self.title

    @property
    def is_gguf(self) -> bool:
        """True if the name is that of a GGUF file, and `folder` where its weights lie dequantised."""
        return self.is_local and self.name.endswith(".gguf")

    def reference(self) -> dict[str, str]:
        """Return what is needed to find the same base again, from any folder, and to load it as it was."""
        name = str(Path(self.name).expanduser().resolve()) if self.is_local else self.name
        found = {"name": name, "revision": self.revision, "hub": self.hub, "fingerprint": self.fingerprint}
        return found | ({"quantization": self.quantization} if self.quantization else {})


def find_base(name: str, *, revision: str = "main", hub: str = "huggingface", quantization: str | None = None) -> Base:
    """Return the base called `name`; a hub id is downloaded, a path never touches the network.

    Raises: UserError if it does not exist or is no model that can be loaded safely.
    """
    path = Path(name).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        fingerprint = hash_file(path)
        return Base(name, cache_dir() / "gguf" / fingerprint[:16], fingerprint, quantization=quantization)
    folder = path if path.exists() or _looks_like_path(name) else fetch(name, revision=revision, hub=hub)
    _check_folder(name, folder)
    return Base(name, folder, hash_folder(folder), revision, hub, quantization)


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") != 1 or name.endswith(".gguf")


def _check_folder(name: str, folder: Path) -> None:
    if not folder.exists():
        raise UserError("model_missing", where=name, fix="model_missing")
    if not (folder / "config.json").is_file():
        raise UserError("model_no_config", where=name, fix="model_no_config")
    if not list(folder.glob("*.safetensors")):
        pickled = [file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern)]
        if pickled:
            raise UserError("model_pickle", where=name, fix="model_pickle", file=pickled[0])
        raise UserError("model_no_weights", where=name, fix="model_no_weights")
    check_files(folder)


def prepare_base(base: Base) -> None:
    """Make the base loadable: dequantise a GGUF file into the cache, once.

    transformers parses the file anew for configuration, tokenizer and weights: 36 s for 98 MB, against 1 s from there.
    """
    if base.folder.exists():
        return
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    need_gguf(base.name)
    path = Path(base.name).expanduser()
    source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name, "local_files_only": True}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**source)
        model = AutoModelForCausalLM.from_pretrained(
            **source, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
        )
    except (ValueError, KeyError, NotImplementedError) as error:
        raise UserError("model_broken", where=base.name, fix="model_broken", problem=error) from None
    base.folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".converting-", dir=base.folder.parent))
    model.save_pretrained(staging)
    tokenizer.save_pretrained(staging)
    try:
        staging.rename(base.folder)
    except OSError:
        # Another process was first.
        shutil.rmtree(staging)


def need_gguf(name: str) -> None:
    """Raise UserError if the gguf package is not installed."""
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise UserError("extra_missing", where=name, fix="extra_missing", extra="gguf") from None


def load_tokenizer(folder: Path) -> Any:
    """Return the tokenizer of a base or adapter folder.

    Raises: UserError if the folder holds none.
    """
    from transformers import AutoTokenizer

    if not (folder / "tokenizer_config.json").is_file() and not (folder / "tokenizer.json").is_file():
        raise UserError("model_no_tokenizer", where=str(folder), fix="model_no_tokenizer")
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise UserError("model_broken", where=str(folder), fix="model_broken", problem=error) from None


def eos_ids(folder: Path) -> list[int]:
    """Return the ids that end an answer, from generation_config.json, else config.json."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        value = _read_json(path).get("eos_token_id") if path.is_file() else None
        if value is not None:
            return list(value) if isinstance(value, list) else [value]
    return []


def stored_dtype(folder: Path) -> str:
    """Return the type that config.json says the weights are stored as; float32 if it says none that is known."""
    values = _read_json(folder / "config.json")
    dtype = values.get("dtype") or values.get("torch_dtype")
    return dtype if dtype in ("bfloat16", "float16") else "float32"


def model_type(folder: Path) -> str:
    """Return the family that config.json names."""
    return str(_read_json(folder / "config.json").get("model_type", "?"))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError("model_broken", where=str(path), fix="model_broken", problem=error) from None
    return values


def pad_id(tokenizer: Any) -> int:
    """Return an id to fill rows with; what it is never matters, since masks go by length."""
    return next(token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if token is not None)


def choose_dtype(wanted: str = "auto") -> tuple[str, str]:
    """Return (dtype of the base's weights, why): bfloat16 where the hardware multiplies it, else float32.

    The reason is a catalogue key, "dtype.REASON".
    """
    import torch

    if wanted != "auto":
        return wanted, "asked"
    if torch.cuda.is_available():
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bfloat16", "gpu"
        return "float32", "gpu_without"
    if torch.cpu._is_amx_tile_supported():
        return "bfloat16", "amx"
    if torch.cpu._is_avx512_bf16_supported():
        return "bfloat16", "avx512"
    return "float32", "none"


def load_base(base: Base, dtype: str) -> Any:
    """Return the base model in `dtype`, on the CPU; never runs code from the model's folder.

    A quantised base has its linear layers in 4 or 8 bits (but for the head), the rest in `dtype`.

    Raises: UserError if the weights do not fit the configuration, or bitsandbytes cannot run; MachineError if memory
        runs out.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    from truetune.engine.memory import copy_from_file, free_at_once
    from truetune.engine.quantised import dequantise_layers, is_quantised

    if base.quantization is not None:
        free_at_once()  # of each layer, while it is read and whenever it is dequantised
        require(base.quantization, folder=base.folder, name=base.name)
    kind = arguments(base.quantization, dtype=getattr(torch, dtype))
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            str(base.folder), dtype=getattr(torch, dtype), local_files_only=True, output_loading_info=True, **kind
        )
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError, MemoryError) as error:
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            raise out_of_memory(base.name) from None
        raise UserError("model_broken", where=base.name, fix="model_broken", problem=error) from None
    missing = sorted(loading["missing_keys"])
    if missing:
        raise UserError("model_missing_weights", where=base.name, fix="model_broken", name=missing[0], n=len(missing))
    if dequantise_layers(model):
        copy_from_file(parameter for parameter in model.parameters() if not is_quantised(parameter))
    return model


def load_gguf(path: Path, like: Base) -> Any:
    """Return the weights of a GGUF file in fp32, in a model with the configuration of `like`.

    Raises: UserError if transformers cannot read it.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig

    need_gguf(str(path))
    config = AutoConfig.from_pretrained(str(like.folder), local_files_only=True)
    if config.model_type == "mistral":
        # The same computation, which both GGUF and transformers' reader know as llama only.
        values = config.to_dict() | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
        config = AutoConfig.for_model(**values)
    try:
        return AutoModelForCausalLM.from_pretrained(
            str(path.parent),
            gguf_file=path.name,
            config=config,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
            local_files_only=True,
        )
    except (ValueError, KeyError, NotImplementedError, RuntimeError) as error:
        raise UserError("model_broken", where=str(path), fix="model_broken", problem=error) from None


def add_lora(model: Any, *, r: int, alpha: int, dropout: float, targets: Sequence[str], seed: int, **kind: Any) -> Any:
    """Return `model` with PEFT's LoRA on `targets` ("all-linear", or module names), trainable weights in fp32.

    Its layers are the engine's fused ones, which PEFT makes, names and saves as its own. `kind`: what else PEFT's
    LoraConfig is told (use_rslora, use_dora, init_lora_weights).

    Raises: UserError if no module has one of the names, or PEFT cannot make such LoRA for this model.
    """
    import torch

    from truetune.engine.fused import fuse
    from truetune.engine.lora import FusedLinear
    from truetune.engine.quiet import peft

    names = {name.rsplit(".", 1)[-1] for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)}
    everything = {name for name, _ in model.named_modules()}
    for target in targets:
        known = target == "all-linear" or any(name == target or name.endswith(f".{target}") for name in everything)
        if not known:
            linear = ", ".join(sorted(names))
            raise UserError("lora_no_target", where="target_modules", fix="lora_no_target", name=target, names=linear)
    chosen = targets[0] if list(targets) == ["all-linear"] else list(targets)
    config = peft.LoraConfig(
        r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=chosen, task_type=peft.TaskType.CAUSAL_LM, **kind
    )
    config._register_custom_module({torch.nn.Linear: FusedLinear})
    fuse(model)
    torch.manual_seed(seed)
    try:
        tuned = peft.get_peft_model(model, config, autocast_adapter_dtype=True)
    except (ValueError, TypeError, NotImplementedError) as error:
        # For one, dropout on the weights of experts.
        raise UserError("lora_refused", where="lora", fix="lora_refused", problem=error) from None
    if isinstance(config.init_lora_weights, str):
        _keep_starts(tuned, r)
    return tuned


def _keep_starts(model: Any, r: int) -> None:
    """Keep what each layer starts at, now that PEFT has cast it.

    Raises: UserError if a layer is not linear, so that PEFT changed its base, or is too small for the rank.
    """
    from truetune.engine.quiet import lora

    for name, layer in model.named_modules():
        if not isinstance(layer, lora.LoraLayer):
            continue
        if not getattr(layer, "is_from_base", False):
            raise UserError("lora_init_layer", where="lora_init", fix="lora_init_layer", name=name)
        (a,), (b,) = ([part.weight for part in side.values()] for side in (layer.lora_A, layer.lora_B))
        if len(a) < r:
            raise UserError("lora_init_rank", where="lora_r", fix="lora_init_rank", name=name, r=r, most=len(a))
        layer.keep_start(a, b)


def train_all(model: Any) -> Any:
    """Return `model` with every weight trained, norms and embeddings included, in the engine's fused layers."""
    from truetune.engine.fused import fuse

    fuse(model)
    return model.requires_grad_(True).train()


class BaseWeights:
    """A fully fine-tuned model as its base: what `disable_adapter` is for one with an adapter, and called so.

    `load`: gives the base. Its weights change places with the tuned ones inside the block; nothing is copied.
    """

    def __init__(self, model: Any, load: Callable[[], Any]) -> None:
        self._model, self._load = model, load

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Let the model be its base inside the block."""
        twin = self._load()
        self._swap(twin)
        try:
            yield
        finally:
            self._swap(twin)

    def _swap(self, twin: Any) -> None:
        theirs = dict(twin.named_parameters())
        for name, parameter in self._model.named_parameters():
            other = theirs[name]
            parameter.data, other.data = other.data.to(parameter.device, parameter.dtype), parameter.data


def load_adapter(model: Any, folder: Path, *, name: str = "default") -> Any:
    """Return `model` with the adapter of `folder` for use (not trainable), beside those that it has.

    Raises: UserError if its weights are not of this model's shapes.
    """
    from truetune.engine.quiet import peft

    try:
        if isinstance(model, peft.PeftModel):
            model.load_adapter(str(folder), adapter_name=name, is_trainable=False)
            return model
        return peft.PeftModel.from_pretrained(model, str(folder), adapter_name=name, is_trainable=False)
    except (RuntimeError, ValueError) as error:
        # torch lists every tensor; the first one says enough.
        problem = " ".join(str(error).split("\n")[:2])
        raise UserError("adapter_no_fit", where=str(folder), fix="adapter_no_fit", problem=problem) from None


def count_parameters(model: Any) -> tuple[int, int]:
    """Return (trainable, all) parameters."""
    # Two weights of 4 bits are one number to torch.
    states = [(parameter, getattr(parameter, "quant_state", None)) for parameter in model.parameters()]
    sizes = [
        (parameter.requires_grad, parameter.numel() if state is None else math.prod(state.shape))
        for parameter, state in states
    ]
    return sum(size for trainable, size in sizes if trainable), sum(size for _, size in sizes)
