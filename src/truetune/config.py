"""The field list: the one source of keys, defaults, CLI options, docs/config.md and (later) the web form.

Precedence: defaults < `--config FILE.yaml` < flags. Every fault is reported at once, and every value knows its origin.
"""

from __future__ import annotations

import codecs
import difflib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from truetune.contradictions import LORA_KEYS, PER_DEVICE_KEYS, contradictions
from truetune.errors import UserError, UserErrors


def _split_words(value: Any) -> Any:
    """`--report-to "swanlab, tensorboard"` and a single value both make a list."""
    if isinstance(value, str):
        return [word.strip() for word in value.split(",") if word.strip()]
    return value


def _parse_mapping(value: Any) -> Any:
    """`--chat-template-kwargs '{enable_thinking: false}'`: YAML or JSON text makes a mapping."""
    try:
        mapping = yaml.safe_load(value) if isinstance(value, str) else value
        json.dumps(mapping, sort_keys=True)
    except TypeError:
        raise ValueError("a value is no text, number, true, false, null, list or mapping; quote dates") from None
    except yaml.YAMLError as error:
        raise ValueError(f"not YAML: {getattr(error, 'problem', error)}") from None
    return mapping


def _prompts(value: Any) -> Any:
    """`--sample-prompts "Who are you?"`: one prompt; `[…]`: a YAML list of them; none: no samples."""
    if not isinstance(value, str) or value == "auto":
        return value
    if value == "none":
        return []
    return _parse_mapping(value) if value.startswith("[") else [value]


def _known_encoding(value: str) -> str:
    """Return the encoding's own name: "GBK" and "gbk" are one."""
    try:
        "".encode(value)
        return codecs.lookup(value).name
    except (LookupError, TypeError):
        raise ValueError(f"unknown encoding {value!r}") from None


def _no_bool(value: Any) -> Any:
    """`batch_size: true` is a slip, not the number 1."""
    if isinstance(value, bool):
        raise ValueError("got true or false, expected a number")  # noqa: TRY004 (pydantic collects ValueError)
    return value


Words = Annotated[list[str], BeforeValidator(_split_words)]
Prompts = Annotated[Literal["auto"] | list[str], BeforeValidator(_prompts)]
KeywordValues = Annotated[dict[str, Any], BeforeValidator(_parse_mapping)]
Int = Annotated[int, BeforeValidator(_no_bool)]
Float = Annotated[float, BeforeValidator(_no_bool), Field(allow_inf_nan=False)]
PositiveInt = Annotated[Int, Field(gt=0)]
PositiveFloat = Annotated[Float, Field(gt=0)]
AutoInt = Literal["auto"] | PositiveInt


LANGUAGES = ("en", "zh")
LOSSES = ("sft", "dpo", "ipo", "orpo", "simpo", "kto")
DEFAULTS_WITH: dict[tuple[str, str], dict[str, Any]] = {
    # LoRA's B begins at 0 and must move far, whole weights hardly at all.
    ("finetuning", "full"): {"learning_rate": 1e-5},
    # A preference is a smaller step than learning answers; measured in docs/decisions/016-preferences.md.
    **{("loss", name): {"learning_rate": 5e-5} for name in LOSSES[1:]},
    # Meng et al., arXiv:2405.14734, table 7: beta 2 to 10, gamma about half of it.
    ("loss", "simpo"): {"learning_rate": 5e-5, "dpo_beta": 2.0, "simpo_gamma": 1.0},
}
"""Defaults of other keys that go with a key's value, the first that says one; what the user gives wins."""


class Config(BaseModel):
    """Every key of a run. What a key means is in the catalogue (`field.KEY`), with its unit."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, protected_namespaces=())

    model: str | None = None
    revision: str = "main"
    hub: Literal["huggingface", "modelscope"] = "huggingface"
    data: Words = Field(default_factory=list)
    data_weights: Annotated[list[PositiveFloat], BeforeValidator(_split_words)] = Field(default_factory=list)
    encoding: Annotated[str, AfterValidator(_known_encoding)] = "utf-8"
    eval_data: Words = Field(default_factory=list)
    eval_split: Annotated[Float, Field(ge=0, lt=1)] = 0.05
    system: str | None = None
    input_join: str = "\n"
    template: Literal["chatml", "instruction-response"] | None = None
    chat_template_kwargs: KeywordValues = Field(default_factory=dict)
    train_on: Literal["all_turns", "last_turn"] = "all_turns"
    max_length: PositiveInt = 2048
    overlong: Literal["refuse", "cut_prompt"] = "refuse"
    invalid: Literal["refuse", "skip"] = "refuse"
    loss: Literal["sft", "dpo", "ipo", "orpo", "simpo", "kto"] = "sft"
    dpo_beta: PositiveFloat = 0.1
    simpo_gamma: Annotated[Float, Field(ge=0)] | None = None
    streaming: bool = False
    shuffle_rows: PositiveInt = 10_000
    batch_size: PositiveInt = 16
    per_device_train_batch_size: PositiveInt | None = None
    gradient_accumulation_steps: PositiveInt | None = None
    num_train_epochs: Annotated[Float, Field(gt=0)] = 3.0
    max_steps: PositiveInt | None = None
    finetuning: Literal["lora", "full"] = "lora"
    learning_rate: Annotated[Float, Field(gt=0)] = 2e-4
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    warmup_ratio: Annotated[Float, Field(ge=0, le=1)] = 0.03
    weight_decay: Annotated[Float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[Float, Field(gt=0)] = 1.0
    seed: Annotated[Int, Field(ge=0)] = 42
    lora_r: PositiveInt = 16
    lora_alpha: PositiveInt = 32
    lora_dropout: Annotated[Float, Field(ge=0, lt=1)] = 0.0
    target_modules: Words = Field(default_factory=lambda: ["all-linear"])
    use_rslora: bool = False
    use_dora: bool = False
    lora_init: Literal["default", "olora", "pissa", "pissa_niter_16"] = "default"
    loraplus_lr_ratio: Annotated[Float, Field(ge=1)] | None = None
    quantization: Literal["4bit", "8bit"] | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    attention: Literal["auto", "trie", "flex", "padded", "plain"] = "auto"
    gradient_checkpointing: Literal["auto"] | bool = "auto"
    max_tokens_per_forward: AutoInt = "auto"
    logging_steps: PositiveInt = 1
    eval_steps: AutoInt = "auto"
    save_steps: AutoInt = "auto"
    save_total_limit: PositiveInt = 3
    result: Literal["auto", "best", "last"] = "auto"
    early_stopping_patience: PositiveInt | None = None
    sample_prompts: Prompts = "auto"
    report_to: Annotated[list[Literal["swanlab", "tensorboard"]], BeforeValidator(_split_words)] = Field(
        default_factory=list
    )
    tracker_project: str = "truetune"
    tracker_name: str | None = None
    devices: PositiveInt = 1
    strategy: Literal["replicate", "shard"] = "replicate"
    output_dir: str | None = None
    lang: Literal["auto", "en", "zh"] = "auto"

    @property
    def rows_per_step(self) -> int:
        """Rows of one optimizer step over all devices, whichever way they were given."""
        if self.per_device_train_batch_size is None and self.gradient_accumulation_steps is None:
            return self.batch_size
        return (self.per_device_train_batch_size or 1) * (self.gradient_accumulation_steps or 1)


@dataclass(frozen=True)
class Settings:
    """A configuration and where each value came from: "default", "FILE:LINE" or the flag."""

    config: Config
    origins: Mapping[str, str]

    def with_chosen(self, **chosen: Any) -> Settings:
        """Return the settings with values that the program chose in place of "auto"."""
        asked = [name for name in chosen if getattr(self.config, name) != "auto"]
        origins = {**self.origins, **dict.fromkeys(chosen, "auto"), **{name: self.origins[name] for name in asked}}
        return Settings(self.config.model_copy(update=chosen), origins)

    def replaced(self, **values: Any) -> Settings:
        """Return the settings with other values; where the others came from stays."""
        return Settings(self.config.model_copy(update=values), self.origins)


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice and remembers the line of each top-level key."""


def _construct_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = str(loader.construct_object(key_node))
        if key in values:
            where = f"{key_node.start_mark.name}:{key_node.start_mark.line + 1}"
            raise UserError("config_key_twice", where=where, fix="config_key_twice", name=key)
        values[key] = loader.construct_object(value_node, deep=True)
    return values


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _construct_mapping)


def load_yaml(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the values of a configuration file and the "file:line" of each key.

    Raises: UserError if the file is missing, is no YAML mapping, or gives a key twice.
    """
    if not path.is_file():
        raise UserError("config_missing", where=str(path), fix="config_missing")
    try:
        source = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        values = {"byte": error.start, "encoding": "UTF-8", "path": path}
        raise UserError("data_not_utf8", where=str(path), fix="config_not_utf8", **values) from None
    try:
        loader = _Loader(source)
        loader.name = str(path)
        node = loader.get_single_node()
        if node is None:
            return {}, {}
        if not isinstance(node, yaml.MappingNode):
            raise UserError("config_not_mapping", where=str(path), fix="config_not_mapping")
        lines = {str(key.value): f"{path}:{key.start_mark.line + 1}" for key, _ in node.value}
        return loader.construct_document(node), lines
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        problem = str(getattr(error, "problem", error))
        raise UserError("config_not_yaml", where=where, fix="config_not_yaml", problem=problem) from None


def resolve(flags: Mapping[str, Any], config_file: Path | None = None) -> Settings:
    """Merge defaults, `config_file` and `flags`, and validate them in one pass.

    Raises: UserError or UserErrors naming every unknown key (with a suggestion) and every value out of range.
    """
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    if config_file is not None:
        values, origins = load_yaml(config_file)
    for key, value in flags.items():
        values[key] = value
        origins[key] = "--" + key.replace("_", "-")
    try:
        config = Config(**values)
    except ValidationError as error:
        raise _as_user_errors(error, origins) from None
    faults = contradictions(config, origins)
    if faults:
        raise UserErrors(faults)
    for (key, value), others in DEFAULTS_WITH.items():
        if getattr(config, key) == value:
            chosen = {name: default for name, default in others.items() if name not in origins}
            config = config.model_copy(update=chosen)
            origins.update(dict.fromkeys(chosen, f"{key}: {value}"))
    for key in PER_DEVICE_KEYS:
        if values.get(key) is not None:
            origins["batch_size"] = origins.pop(key)
    return Settings(_effective(config), {key: origins.get(key, "default") for key in Config.model_fields})


def _effective(config: Config) -> Config:
    """Return the configuration with one value for each fact: rows of a step, and where held-out rows come from."""
    return config.model_copy(
        update={
            "batch_size": config.rows_per_step,
            "per_device_train_batch_size": None,
            "gradient_accumulation_steps": None,
            "eval_split": 0.0 if config.eval_data else config.eval_split,
        }
    )


def _as_user_errors(error: ValidationError, origins: Mapping[str, str]) -> UserErrors:
    """Translate pydantic's faults: one UserError a key, unknown keys with the nearest known one."""
    faults: dict[str, UserError] = {}
    for fault in error.errors():
        key = str(fault["loc"][0])
        where = origins.get(key, key)
        if fault["type"] == "extra_forbidden":
            faults[key] = unknown_key(key, where)
        elif key not in faults:
            problem = fault["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
            faults[key] = UserError(
                "config_value", where=where, fix="config_value", name=key, value=repr(fault["input"]), problem=problem
            )
    return UserErrors(list(faults.values()))


SECRET_WORDS = ("api_key", "apikey", "token", "secret", "password")


def unknown_key(key: str, where: str) -> UserError:
    """Return the error for a key that does not exist, with the nearest name where one is near."""
    name = key.lstrip("-").replace("-", "_")
    if any(word in name.lower() for word in SECRET_WORDS):
        return UserError("config_unknown_key", where=where, fix="config_secret", name=key)
    near = difflib.get_close_matches(name, Config.model_fields, n=1, cutoff=0.6)
    if near:
        return UserError("config_unknown_key", where=where, fix="config_did_you_mean", name=key, near=near[0])
    return UserError("config_unknown_key", where=where, fix="config_see_keys", name=key)


def dump(config: Config) -> str:
    """Return the configuration as YAML that `resolve` loads again, every value in force."""
    left_out = set(LORA_KEYS) if config.finetuning == "full" else set()
    return yaml.safe_dump(config.model_dump(mode="json", exclude=left_out), sort_keys=False, allow_unicode=True)


def cache_dir() -> Path:
    """Return the folder for converted bases: TRUETUNE_CACHE, else XDG_CACHE_HOME/truetune, else ~/.cache/truetune."""
    own = os.environ.get("TRUETUNE_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "truetune"


def examples_folder() -> Path:
    """Return the folder of the bundled examples: inside the installed package, or at the top of a checkout.

    Raises: UserError if it is not there.
    """
    package = Path(__file__).resolve().parent
    for folder in (package / "examples", package.parents[1] / "examples"):
        if (folder / "lighthouse.json").is_file():
            return folder
    raise UserError("examples_missing", where=str(package), fix="examples_missing")


def hand_down(name: str, value: str, *, is_default: bool = False) -> None:
    """Set a variable for a library loaded later or a program that takes over. `is_default`: the user's own wins."""
    if not is_default or name not in os.environ:
        os.environ[name] = value


def language(choice: str = "auto") -> str:
    """Return "en" or "zh": the choice, else what the locale variables say.

    >>> language("zh")
    'zh'
    """
    if choice != "auto":
        return choice
    for name in ("LC_ALL", "LC_MESSAGES", "LANG"):
        value = os.environ.get(name)
        if value:
            return "zh" if value.lower().startswith("zh") else "en"
    return "en"
