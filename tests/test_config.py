"""The field list: precedence and origins, every fault at once, and a dump that loads again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from truetune.config import LOSSES, Config, Settings, cache_dir, dump, language, load_yaml, resolve, unknown_key
from truetune.errors import UserError, UserErrors
from truetune.messages import text

Write = Callable[..., Path]


def faults(flags: Mapping[str, Any], config_file: Path | None = None) -> dict[str, UserError]:
    """Resolve what cannot be resolved, and return the faults by key name."""
    with pytest.raises(UserErrors) as caught:
        resolve(flags, config_file)
    return {error.values["name"]: error for error in caught.value.errors}


# --- precedence and origins ---


def test_defaults_hold_where_nothing_is_given() -> None:
    settings = resolve({})
    assert settings.config == Config()
    assert set(settings.origins) == set(Config.model_fields)
    assert set(settings.origins.values()) == {"default"}


def test_flags_win_over_the_file_and_the_file_over_defaults(write_json: Write) -> None:
    path = write_json("# ours\nlora_r: 8\n\nlearning_rate: 0.1\n", "c.yaml")
    settings = resolve({"learning_rate": "0.2", "max_length": "99"}, path)
    assert (settings.config.lora_r, settings.config.learning_rate, settings.config.max_length) == (8, 0.2, 99)
    assert settings.config.lora_alpha == 32
    assert settings.origins["lora_r"] == f"{path}:2"
    assert settings.origins["learning_rate"] == "--learning-rate"
    assert settings.origins["max_length"] == "--max-length"
    assert settings.origins["lora_alpha"] == "default"


def test_a_flag_that_repeats_the_default_has_its_origin() -> None:
    assert resolve({"seed": "42"}).origins["seed"] == "--seed"


def test_what_the_program_chose_is_called_auto() -> None:
    before = resolve({"lora_r": "4"})
    after = before.with_chosen(dtype="float32", eval_steps=7)
    assert (after.config.dtype, after.config.eval_steps, after.config.lora_r) == ("float32", 7, 4)
    assert (after.origins["dtype"], after.origins["eval_steps"], after.origins["lora_r"]) == (
        "auto",
        "auto",
        "--lora-r",
    )
    assert (before.config.dtype, before.origins["dtype"]) == ("auto", "default")


def test_the_configuration_cannot_be_changed_in_place() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Config().lora_r = 3  # type: ignore[misc]


# --- files ---


@pytest.mark.parametrize("content", ["", "# nothing\n"])
def test_an_empty_file_changes_nothing(content: str, write_json: Write) -> None:
    assert resolve({}, write_json(content, "c.yaml")).config == Config()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_yaml(tmp_path / "no.yaml")
    assert (caught.value.key, caught.value.where) == ("config_missing", str(tmp_path / "no.yaml"))


@pytest.mark.parametrize("content", ["- a\n- b\n", "just text\n", "3\n", "---\n"])
def test_a_file_without_keys_is_refused(content: str, write_json: Write) -> None:
    path = write_json(content, "c.yaml")
    with pytest.raises(UserError) as caught:
        resolve({}, path)
    assert (caught.value.key, caught.value.where) == ("config_not_mapping", str(path))


@pytest.mark.parametrize(
    ("content", "place"),
    [
        ("lora_r: 8\nseed: [1, 2\n", "3:1"),
        ("lora_r: 8\n- b\n", "2:1"),
        ("lora_r: 8\n  seed: 3\n", "2:7"),
        ('system: "no end\n', "2:1"),
        ("a: b: c\n", "1:5"),
        ("seed: !!python/object:os.system 3\n", "1:7"),
    ],
)
def test_broken_yaml_is_refused_at_line_and_column(content: str, place: str, write_json: Write) -> None:
    path = write_json(content, "c.yaml")
    with pytest.raises(UserError) as caught:
        resolve({}, path)
    assert (caught.value.key, caught.value.where) == ("config_not_yaml", f"{path}:{place}")


@pytest.mark.parametrize(
    ("content", "name", "line"),
    [
        ("lora_r: 8\nseed: 1\nlora_r: 9\n", "lora_r", 3),
        ("seed: 1\nseed: 1\n", "seed", 2),
        ("chat_template_kwargs:\n  a: 1\n  a: 2\n", "a", 3),
    ],
)
def test_a_key_given_twice_is_refused_at_its_line(content: str, name: str, line: int, write_json: Write) -> None:
    path = write_json(content, "c.yaml")
    with pytest.raises(UserError) as caught:
        resolve({}, path)
    assert (caught.value.key, caught.value.where) == ("config_key_twice", f"{path}:{line}")
    assert caught.value.values == {"name": name}


def test_values_of_a_file_keep_their_types(write_json: Write) -> None:
    content = """\
model: org/name
data: [a.json, "b, c.json"]
learning_rate: 1e-4
num_train_epochs: 2
gradient_checkpointing: false
max_tokens_per_forward: auto
eval_steps: 5
target_modules: [q_proj, v_proj]
chat_template_kwargs: {enable_thinking: false, n: 3}
system: 你是谁
input_join: ""
"""
    config = resolve({}, write_json(content, "c.yaml")).config
    # YAML 1.1 reads "1e-4" as text.
    assert config.learning_rate == 0.0001
    assert config.num_train_epochs == 2.0
    assert config.data == ["a.json", "b, c.json"]
    assert config.gradient_checkpointing is False
    assert (config.max_tokens_per_forward, config.eval_steps) == ("auto", 5)
    assert config.target_modules == ["q_proj", "v_proj"]
    assert config.chat_template_kwargs == {"enable_thinking": False, "n": 3}
    assert (config.system, config.input_join) == ("你是谁", "")


# --- values ---


@pytest.mark.parametrize(
    ("key", "word", "value"),
    [
        ("learning_rate", "1e-4", 1e-4),
        ("max_steps", "10", 10),
        ("eval_split", "0", 0.0),
        ("eval_steps", "auto", "auto"),
        ("eval_steps", "3", 3),
        ("gradient_checkpointing", "true", True),
        ("gradient_checkpointing", "auto", "auto"),
        ("target_modules", "q_proj, v_proj", ["q_proj", "v_proj"]),
        ("report_to", "swanlab,tensorboard", ["swanlab", "tensorboard"]),
        ("chat_template_kwargs", "{enable_thinking: false}", {"enable_thinking": False}),
        ("chat_template_kwargs", '{"a": [1, 2]}', {"a": [1, 2]}),
        ("system", "true", "true"),
    ],
)
def test_words_of_the_command_line_become_values(key: str, word: str, value: Any) -> None:
    assert getattr(resolve({key: word}).config, key) == value


BAD_VALUES: list[tuple[str, Any]] = [
    ("loss", "ppo"),
    ("dpo_beta", 0),
    ("dpo_beta", float("inf")),
    ("simpo_gamma", -1),
    ("eval_split", -0.1),
    ("eval_split", 1),
    ("max_length", 0),
    ("max_length", 1.5),
    ("max_length", "long"),
    ("batch_size", 0),
    ("batch_size", -1),
    ("batch_size", True),
    ("batch_size", None),
    ("per_device_train_batch_size", 0),
    ("gradient_accumulation_steps", 0),
    ("num_train_epochs", 0),
    ("num_train_epochs", "three"),
    ("max_steps", 0),
    ("finetuning", "freeze"),
    ("learning_rate", 0),
    ("learning_rate", -1e-4),
    ("learning_rate", "nan"),
    ("learning_rate", "inf"),
    ("learning_rate", True),
    ("lr_scheduler_type", "cosinus"),
    ("warmup_ratio", 1.1),
    ("warmup_ratio", -0.1),
    ("weight_decay", -1),
    ("max_grad_norm", 0),
    ("seed", -1),
    ("seed", False),
    ("lora_r", 0),
    ("lora_r", "16.5"),
    ("lora_alpha", 0),
    ("lora_dropout", 1),
    ("lora_dropout", -0.1),
    ("target_modules", 3),
    ("use_rslora", "perhaps"),
    ("use_dora", 2),
    ("lora_init", "svd"),
    ("loraplus_lr_ratio", 0.5),
    ("quantization", "2bit"),
    ("dtype", "float16"),
    ("attention", "flash"),
    ("gradient_checkpointing", "sometimes"),
    ("max_tokens_per_forward", 0),
    ("logging_steps", 0),
    ("eval_steps", 0),
    ("eval_steps", "often"),
    ("save_steps", -1),
    ("save_total_limit", 0),
    ("result", "newest"),
    ("early_stopping_patience", 0),
    ("sample_prompts", 4),
    ("sample_prompts", "[1]"),
    ("report_to", "wandb"),
    ("report_to", ["swanlab", "mlflow"]),
    ("hub", "github"),
    ("template", "alpaca"),
    ("train_on", "first_turn"),
    ("invalid", "ignore"),
    ("streaming", "often"),
    ("shuffle_rows", 0),
    ("lang", "fr"),
    ("model", 3),
    ("system", ["a"]),
    ("data", 5),
    ("chat_template_kwargs", "just text"),
    ("overlong", "cut"),
    ("encoding", "utf-9"),
    ("data_weights", "1,0"),
    ("data_weights", "a"),
    ("devices", 0),
    ("devices", "all"),
    ("strategy", "ddp"),
]


@pytest.mark.parametrize(("key", "value"), BAD_VALUES)
def test_a_value_out_of_range_is_refused(key: str, value: Any) -> None:
    found = faults({key: value})
    assert list(found) == [key]
    assert (found[key].key, found[key].where) == ("config_value", "--" + key.replace("_", "-"))
    assert found[key].values["problem"]
    assert key in str(found[key])


def test_the_table_of_bad_values_covers_every_key_that_has_a_range() -> None:
    assert len(BAD_VALUES) == 75
    # Any text will do for these.
    free = {"revision", "input_join", "tracker_project", "tracker_name", "output_dir"}
    lists_like_data = {"eval_data"}
    assert {key for key, _ in BAD_VALUES} == set(Config.model_fields) - free - lists_like_data


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16", "olora"])
def test_what_starts_at_the_base_needs_all_of_it(init: str) -> None:
    """Each key that contradicts is a fault of its own, all at once; alone they are fine."""
    others = {"use_dora": "true", "quantization": "4bit", "lora_dropout": "0.1"}
    found = faults({"lora_init": init, **others})
    told = {key: (error.key, error.values["init"]) for key, error in found.items()}
    assert told == dict.fromkeys(others, ("config_lora_init", init))
    assert resolve({"lora_init": init, "use_rslora": "true", "loraplus_lr_ratio": "4"}).config.lora_init == init
    assert resolve(others).config.use_dora is True


def test_a_bad_value_of_a_file_is_refused_at_its_line(write_json: Write) -> None:
    path = write_json("lora_r: 8\nlora_dropout: 2\n", "c.yaml")
    assert faults({}, path)["lora_dropout"].where == f"{path}:2"


@pytest.mark.parametrize("word", ["true", "yes", "on"])
def test_a_yaml_truth_value_is_no_number(word: str, write_json: Write) -> None:
    assert faults({}, write_json(f"batch_size: {word}\n", "c.yaml"))["batch_size"].values["value"] == "True"


def test_every_fault_is_reported_at_once(write_json: Write) -> None:
    path = write_json("learning_rte: 1\nlora_r: 0\nseed: x\n", "c.yaml")
    found = faults({"max_length": "none", "evel_split": "0"}, path)
    assert {name: (error.key, error.where) for name, error in found.items()} == {
        "lora_r": ("config_value", f"{path}:2"),
        "seed": ("config_value", f"{path}:3"),
        "max_length": ("config_value", "--max-length"),
        "learning_rte": ("config_unknown_key", f"{path}:1"),
        "evel_split": ("config_unknown_key", "--evel-split"),
    }


def test_one_fault_a_key_even_where_several_forms_are_allowed() -> None:
    with pytest.raises(UserErrors) as caught:
        resolve({"eval_steps": "often", "gradient_checkpointing": "sometimes"})
    assert len(caught.value.errors) == 2


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("learning_rte", "learning_rate"),
        ("--learning-rat", "learning_rate"),
        ("lora_rank", "lora_r"),
        ("batchsize", "batch_size"),
        ("warmup_ration", "warmup_ratio"),
        ("evaluation_split", "eval_split"),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest(name: str, near: str) -> None:
    error = unknown_key(name, "c.yaml:1")
    assert (error.where, error.fix, error.values) == ("c.yaml:1", "config_did_you_mean", {"name": name, "near": near})
    assert f'"{near}"' in str(error)


def test_a_key_like_no_other_gets_no_suggestion() -> None:
    assert unknown_key("zzz", "x").fix == "config_see_keys"


# --- keys that belong together ---


def test_full_fine_tuning_has_a_learning_rate_of_its_own(write_json: Write) -> None:
    """1e-5, said where it comes from; what the user gave stands, wherever it was given, LoRA's default included."""
    settings = resolve({"finetuning": "full"})
    assert (settings.config.learning_rate, settings.origins["learning_rate"]) == (1e-5, "finetuning: full")
    assert "1e-5" in text("field.finetuning", "en")
    assert "1e-5" in text("field.finetuning", "zh")
    given = resolve({"finetuning": "full", "learning_rate": 2e-4})
    assert (given.config.learning_rate, given.origins["learning_rate"]) == (2e-4, "--learning-rate")
    path = write_json("finetuning: full\nlearning_rate: 3.0e-5\n", "c.yaml")
    assert resolve({}, path).config.learning_rate == 3e-5
    assert resolve({}).config.learning_rate == 2e-4


def test_loras_keys_are_refused_with_full_fine_tuning_all_at_once(write_json: Write) -> None:
    """Each where it stands, also with LoRA's own default; and a full run's own configuration is loaded again."""
    path = write_json("finetuning: full\nlora_r: 16\nseed: 3\n", "c.yaml")
    found = faults({"lora_alpha": 8, "target_modules": "q_proj"}, path)
    assert {name: (error.key, error.where) for name, error in found.items()} == {
        "lora_r": ("config_not_lora", f"{path}:2"),
        "lora_alpha": ("config_not_lora", "--lora-alpha"),
        "target_modules": ("config_not_lora", "--target-modules"),
    }
    config = resolve({"finetuning": "full", "seed": 3}).config
    saved = write_json(dump(config), "saved.yaml")
    assert "lora" not in saved.read_text()
    assert resolve({}, saved).config == config


@pytest.mark.parametrize(
    ("flags", "rows"),
    [
        ({}, 16),
        ({"batch_size": 5}, 5),
        ({"per_device_train_batch_size": 4}, 4),
        ({"gradient_accumulation_steps": 3}, 3),
        ({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3}, 12),
        ({"batch_size": 12, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 3}, 12),
    ],
)
def test_rows_of_a_step(flags: dict[str, int], rows: int) -> None:
    assert resolve(flags).config.rows_per_step == rows


@pytest.mark.parametrize("batch_size", [16, 11])
def test_batch_sizes_that_contradict_are_refused(batch_size: int) -> None:
    flags = {"batch_size": batch_size, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 3}
    with pytest.raises(UserError) as caught:
        resolve(flags)
    assert (caught.value.key, caught.value.where) == ("config_batch_size_twice", "--batch-size")
    assert caught.value.values["names"] == "gradient_accumulation_steps, per_device_train_batch_size"


def test_eval_split_beside_eval_data_is_refused_unless_it_is_zero() -> None:
    with pytest.raises(UserError) as caught:
        resolve({"eval_data": ["e.json"], "eval_split": 0.1})
    assert (caught.value.key, caught.value.where) == ("config_eval_twice", "--eval-split")
    assert resolve({"eval_data": ["e.json"], "eval_split": 0}).config.eval_data == ["e.json"]
    assert resolve({"eval_data": ["e.json"]}).config.eval_data == ["e.json"]


# --- dump ---


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"data": ["数据.json", "b, c.json"], "model": "org/name", "system": "现在你要扮演皇帝身边的女人--甄嬛"},
        {"input_join": "", "tracker_name": "a: b # c", "system": "two\nlines "},
        {"input_join": "\t", "system": "no", "revision": "1e3", "model": "0123"},
        {"chat_template_kwargs": {"enable_thinking": False, "深": ["1", 1, None]}},
        {"gradient_checkpointing": True, "eval_steps": 7, "learning_rate": 1e-5, "num_train_epochs": 0.5},
        {"report_to": "swanlab,tensorboard", "target_modules": "q_proj"},
        {"eval_data": ["e.json"], "eval_split": 0},
        {"batch_size": 12, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 3},
    ],
)
def test_a_dump_loads_again_to_the_same(flags: dict[str, Any], write_json: Write) -> None:
    config = resolve(flags).config
    content = dump(config)
    loaded = resolve({}, write_json(content, "config.yaml"))
    assert loaded.config == config
    assert dump(loaded.config) == content
    assert "default" not in set(loaded.origins.values())


@pytest.mark.parametrize(
    "flags",
    [
        {"eval_data": ["e.json"]},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3},
        {"gradient_accumulation_steps": 2},
    ],
)
def test_a_dump_of_keys_that_exclude_each_other_loads_again(flags: dict[str, Any], write_json: Write) -> None:
    config = resolve(flags).config
    path = write_json(dump(config), "config.yaml")
    # A resumed run has both: the file, and the flags given again.
    assert resolve({}, path).config == resolve(flags, path).config == config


def test_a_dump_holds_every_key_and_readable_chinese() -> None:
    content = dump(resolve({"system": "甄嬛"}).config)
    assert [line.split(":")[0] for line in content.splitlines() if line[:1].isalpha()] == list(Config.model_fields)
    assert "system: 甄嬛\n" in content


def test_flags_win_over_a_dump(write_json: Write) -> None:
    path = write_json(dump(resolve({"lora_r": 8, "batch_size": 3}).config), "config.yaml")
    settings: Settings = resolve({"batch_size": 6}, path)
    assert (settings.config.lora_r, settings.config.rows_per_step) == (8, 6)


# --- environment ---


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, "en"),
        ({"LANG": "C.UTF-8"}, "en"),
        ({"LANG": "zh_CN.UTF-8"}, "zh"),
        ({"LANG": "ZH_tw"}, "zh"),
        ({"LANG": "en_US.UTF-8", "LC_MESSAGES": "zh_CN.UTF-8"}, "zh"),
        ({"LANG": "zh_CN.UTF-8", "LC_MESSAGES": "en_GB"}, "en"),
        ({"LC_MESSAGES": "zh_CN", "LC_ALL": "C"}, "en"),
        ({"LC_ALL": "", "LANG": "zh_CN"}, "zh"),
    ],
)
def test_the_language_comes_from_the_locale(
    variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert language() == expected
    assert (language("en"), language("zh")) == ("en", "zh")


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRUETUNE_CACHE", "/own")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_dir() == Path("/own")
    monkeypatch.setenv("TRUETUNE_CACHE", "")
    assert cache_dir() == Path("/xdg/truetune")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert cache_dir() == Path("/home/somebody/.cache/truetune")


# --- what a loss brings with it ---


@pytest.mark.parametrize("loss", LOSSES)
def test_defaults_that_go_with_a_loss(loss: str) -> None:
    """They are said to come from it; what the user gives wins, and the file that a run writes loads again."""
    settings = resolve({"loss": loss})
    config = settings.config
    assert (config.dpo_beta, config.simpo_gamma) == ((2.0, 1.0) if loss == "simpo" else (0.1, None))
    assert config.learning_rate == (2e-4 if loss == "sft" else 5e-5)
    assert settings.origins["learning_rate"] == ("default" if loss == "sft" else f"loss: {loss}")
    given = {"loss": loss, "learning_rate": "0.1"} | ({} if loss == "sft" else {"dpo_beta": "0.3"})
    settings = resolve(given)
    assert settings.config.learning_rate == 0.1
    assert settings.origins["learning_rate"] == "--learning-rate"
    assert settings.config.dpo_beta == (0.1 if loss == "sft" else 0.3)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_run_with_a_loss_writes_a_file_that_loads_again(loss: str, write_json: Write) -> None:
    config = resolve({"loss": loss}).config
    again = resolve({}, write_json(dump(config), "c.yaml"))
    assert again.config == config


@pytest.mark.parametrize(
    ("keys", "wanted"),
    [
        ({"dpo_beta": 0.2}, {"config_other_loss": "--dpo-beta"}),
        ({"simpo_gamma": 0.2}, {"config_other_loss": "--simpo-gamma"}),
        ({"simpo_gamma": 0.2, "loss": "dpo"}, {"config_other_loss": "--simpo-gamma"}),
        ({"loss": "kto", "batch_size": 1}, {"config_kto_batch": "--batch-size"}),
    ],
)
def test_keys_that_the_loss_does_not_read_are_refused(keys: dict[str, Any], wanted: dict[str, str]) -> None:
    with pytest.raises(UserErrors) as caught:
        resolve(keys)
    assert {error.key: error.where for error in caught.value.errors} == wanted
