"""The command line: names, flags, languages and exit codes, and nothing heavy loaded before it is needed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest

from truetune import cli
from truetune.cli import COMMANDS, Program, run
from truetune.commands.check import KEYS
from truetune.config import PER_DEVICE_KEYS, Config, Settings
from truetune.errors import NumericsError, Stopped, TruetuneError, UserError, out_of_memory
from truetune.place import Place
from truetune.rundir import Run

HEAVY = ("torch", "transformers", "peft", "accelerate", "huggingface_hub", "numpy", "pyarrow", "safetensors")

Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch


@pytest.fixture(autouse=True)
def _english(monkeypatch: Patch) -> None:
    for name in ("LC_ALL", "LC_MESSAGES", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LANG", "en_US.UTF-8")


def python(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if name not in ("LC_ALL", "PYTHONWARNINGS")}
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, encoding="utf-8", env=environment | variables
    )


def params(name: str) -> list[click.Parameter]:
    """The parameters of a command."""
    command = Program("en").get_command(click.Context(Program("en")), name)
    assert command is not None
    return command.params


def replace_train(monkeypatch: Patch, function: Callable[..., Any]) -> None:
    """Let the command call `function` in place of training (without loading torch)."""
    monkeypatch.setitem(sys.modules, "truetune.training", SimpleNamespace(train=function))


@pytest.fixture
def trained(monkeypatch: Patch, tmp_path: Path) -> list[Any]:
    """Collect what `train` is called with, in place of training."""
    calls: list[Any] = []

    def train(settings: Settings, console: Any, *, resume: bool = False, **going: Any) -> Run:
        calls.append((settings, console, resume, going))
        return Run(tmp_path, 0, None, None, None)

    replace_train(monkeypatch, train)
    # As in a process that torchrun started: --devices starts nothing.
    monkeypatch.setattr("truetune.commands.train.read_place", lambda: Place(size=2))
    return calls


def raising(error: BaseException) -> Callable[..., None]:
    """Return a function that raises `error`, whatever it is called with."""

    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


# --- help ---


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["--lang", "zh", "--help"], ["--help", "--lang=zh"]])
def test_help_lists_every_command_in_the_order_of_the_story(words: list[str], capsys: Capture) -> None:
    assert run(words) == 0
    out = capsys.readouterr().out
    places = [out.index(f"\n  {name} ") for name in COMMANDS]
    assert places == sorted(places)
    assert ("检查数据" in out) is ("zh" in words[-1] or "zh" in words)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_help_in_both_languages(name: str, capsys: Capture) -> None:
    assert run([name, "--help"]) == 0
    english = capsys.readouterr().out
    assert english.startswith(f"Usage: truetune {name}")
    assert run([name, "--help", "--lang", "zh"]) == 0
    assert capsys.readouterr().out != english


def test_train_has_an_option_for_every_key(capsys: Capture) -> None:
    assert run(["train", "--help"]) == 0
    out = capsys.readouterr().out
    names = [name for name in Config.model_fields if name not in ("data", "lang")]
    assert [name for name in names if f"\n  --{name.replace('_', '-')} " not in out] == []
    assert len(names) > 35
    assert {"--config", "--resume"} <= {option for param in params("train") for option in param.opts}


def test_check_has_options_for_the_keys_that_change_its_numbers() -> None:
    assert set(KEYS) <= set(Config.model_fields)
    found = {param.name for param in params("check")}
    assert found == {*KEYS, "data", "show", "json_file", "html_file", "store", "config_file", "measure"}


def test_nothing_heavy_is_loaded_before_it_is_needed() -> None:
    code = f"""
import sys
def heavy(): return sorted(name for name in {HEAVY!r} if name in sys.modules)
import truetune, truetune.cli, truetune.config
print("import", heavy())
for words in [["--help"], ["train", "--help"], *([name, "--help"] for name in truetune.cli.COMMANDS), ["chekc"]]:
    truetune.cli.run(words)
print("help", heavy(), len(truetune.cli.COMMANDS))
"""
    result = python("-c", code)
    lines = [line for line in result.stdout.splitlines() if line.startswith(("import ", "help "))]
    assert lines == ["import []", f"help [] {len(COMMANDS)}"], result.stderr


def test_a_command_is_loaded_only_when_it_is_called() -> None:
    code = "import sys, truetune.cli as c; c.run(['--help']); print([m for m in sys.modules if 'commands.' in m])"
    result = python("-c", code)
    assert result.stdout.splitlines()[-1] == "[]"


# --- the program as a process ---


def test_the_module_is_the_program() -> None:
    result = python("-m", "truetune", "--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("Usage: truetune ")


def test_a_fault_is_three_parts_on_the_error_stream_and_an_exit_code(tmp_path: Path) -> None:
    result = python("-m", "truetune", "check", str(tmp_path / "no.json"), "--model", str(tmp_path / "m"))
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    what, fix = result.stderr.splitlines()
    assert what == f"{tmp_path / 'm'}: no such model folder or file"
    assert fix.startswith("  → Check the path")


def test_the_language_of_the_locale_is_that_of_the_program() -> None:
    result = python("-m", "truetune", "chekc", LANG="zh_CN.UTF-8", LC_ALL="", PYTHONUTF8="1")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.splitlines()[1] == "  → 见 truetune --help。"


def test_debug_shows_the_traceback() -> None:
    result = python("-m", "truetune", "check", "--debug")
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert "data: no data given" in result.stderr


# --- flags ---

VALUES = {
    "loss": "dpo",
    "dpo_beta": "2.5",
    "simpo_gamma": "0.5",
    "model": "org/name",
    "revision": "v2",
    "hub": "modelscope",
    "eval_data": "e.json",
    "data_weights": "2,0.5",
    "encoding": "gbk",
    "overlong": "cut_prompt",
    "eval_split": "0.25",
    "system": "--Hi",
    "input_join": "",
    "template": "chatml",
    "chat_template_kwargs": "{a: 1}",
    "train_on": "last_turn",
    "max_length": "99",
    "invalid": "skip",
    "streaming": "true",
    "shuffle_rows": "50",
    "batch_size": "5",
    "per_device_train_batch_size": "5",
    "gradient_accumulation_steps": "5",
    "num_train_epochs": "1.5",
    "max_steps": "7",
    "finetuning": "full",
    "learning_rate": "1e-4",
    "lr_scheduler_type": "linear",
    "warmup_ratio": "0.5",
    "weight_decay": "0.1",
    "max_grad_norm": "2",
    "seed": "7",
    "lora_r": "4",
    "lora_alpha": "8",
    "lora_dropout": "0.5",
    "target_modules": "q_proj,v_proj",
    "use_rslora": "true",
    "use_dora": "true",
    "lora_init": "pissa",
    "loraplus_lr_ratio": "16",
    "quantization": "4bit",
    "dtype": "float32",
    "attention": "padded",
    "gradient_checkpointing": "true",
    "max_tokens_per_forward": "512",
    "logging_steps": "3",
    "eval_steps": "3",
    "save_steps": "3",
    "save_total_limit": "1",
    "result": "last",
    "early_stopping_patience": "2",
    "sample_prompts": "Who, if not you?",
    "report_to": "tensorboard",
    "tracker_project": "p",
    "tracker_name": "n",
    "output_dir": "out",
    "devices": "2",
    "strategy": "shard",
}


NEEDS = {"streaming": {"max_steps": "7"}, "dpo_beta": {"loss": "simpo"}, "simpo_gamma": {"loss": "simpo"}}
"""Keys that mean nothing without others."""


def test_the_table_of_values_holds_every_key() -> None:
    assert set(VALUES) == set(Config.model_fields) - {"data", "lang"}


@pytest.mark.parametrize("form", ["two words", "one word"])
@pytest.mark.parametrize("key", VALUES)
def test_every_flag_reaches_the_configuration(key: str, form: str, trained: list[Any]) -> None:
    flag, value = "--" + key.replace("_", "-"), VALUES[key]
    words = [f"{flag}={value}"] if form == "one word" or value.startswith("-") else [flag, value]
    needed = NEEDS.get(key, {})
    words += [f"--{name.replace('_', '-')}={other}" for name, other in needed.items()]
    assert run(["train", "d.json", *words]) == 0
    settings = trained[0][0]
    # Two keys of Trainer's are another way to say how many rows a step has.
    target = "batch_size" if key in PER_DEVICE_KEYS else key
    assert settings.origins[target] == flag
    # More devices than one are other processes: tests/test_launch.py.
    default = Config.model_fields[target].get_default(call_default_factory=True)
    assert getattr(settings.config, target) != default or key == "devices"
    changed = {name for name, origin in settings.origins.items() if origin.startswith("--")}
    assert changed == {target, "data", *needed}


def test_underscores_are_dashes(trained: list[Any]) -> None:
    assert run(["train", "d.json", "--lora_r", "4", "--learning_rate=3e-3"]) == 0
    assert (trained[0][0].config.lora_r, trained[0][0].config.learning_rate) == (4, 3e-3)


def test_data_are_positional(trained: list[Any]) -> None:
    assert run(["train", "a.json", "--lora-r", "4", "b, c.json"]) == 0
    settings, _, resume, _ = trained[0]
    assert settings.config.data == ["a.json", "b, c.json"]
    assert settings.origins["data"] == "--data"
    assert resume is False


def test_flags_win_over_the_file(trained: list[Any], write_json: Callable[..., Path]) -> None:
    path = write_json("data: [f.json]\nlora_r: 8\nseed: 7\n", "c.yaml")
    assert run(["train", "--config", str(path), "--lora-r", "4"]) == 0
    settings = trained[0][0]
    assert (settings.config.data, settings.config.lora_r, settings.config.seed) == (["f.json"], 4, 7)
    assert settings.origins["seed"] == f"{path}:3"


def test_how_to_go_on_is_handed_over(trained: list[Any]) -> None:
    assert run(["train", "d.json", "--allow-changed", "--skip-bad", "3"]) == 0
    assert run(["train", "d.json"]) == 0
    assert [going for *_, going in trained] == [
        {"allow_changed": True, "skip_bad": 3},
        {"allow_changed": False, "skip_bad": 0},
    ]
    assert run(["train", "d.json", "--skip-bad", "-1"]) == 2


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")])
def test_memory_that_runs_out_is_a_fault_of_the_machine(
    error: Exception, monkeypatch: Patch, capsys: pytest.CaptureFixture[str]
) -> None:
    replace_train(monkeypatch, raising(error))
    assert run(["train", "d.json"]) == 3
    assert capsys.readouterr().err.startswith("truetune train: memory ran out")


def test_other_runtime_errors_are_not_hidden(monkeypatch: Patch) -> None:
    replace_train(monkeypatch, raising(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        run(["train", "d.json"])


def test_resume_takes_the_values_of_the_run(trained: list[Any], tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("data: [f.json]\nlora_r: 8\n", encoding="utf-8")
    assert run(["train", "--resume", "--output-dir", str(tmp_path)]) == 0
    settings, _, resume, _ = trained[0]
    assert (settings.config.data, settings.config.lora_r, resume) == (["f.json"], 8, True)
    assert run(["train", "--resume", "--output-dir", str(tmp_path / "new")]) == 0
    assert trained[1][0].config.lora_r == 16


UNKNOWN = [
    (["train", "--learning-rat", "1"], "--learning-rat", 'Did you mean "--learning-rate"?'),
    (["train", "--zzz"], "--zzz", "See truetune train --help"),
    (["check", "d.json", "--max-lenght", "3"], "--max-lenght", 'Did you mean "--max-length"?'),
    (["runs", "--zzz"], "--zzz", "See truetune train --help"),
]


@pytest.mark.parametrize(("words", "where", "fix"), UNKNOWN)
def test_an_unknown_flag_is_refused_with_a_suggestion(words: list[str], where: str, fix: str, capsys: Capture) -> None:
    assert run(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f'{where}: there is no key "{where}"\n  → {fix}')


MISUSES = [
    ["chekc"],
    ["runs", "a", "b"],
    ["train", "d.json", "--learning-rate"],
    ["chat", "--temperature", "hot"],
    ["chat", "--max-new-tokens", "0"],
    ["train", "--resume=yes"],
]


@pytest.mark.parametrize("words", MISUSES)
@pytest.mark.parametrize("lang", ["en", "zh"])
def test_a_misuse_is_refused_without_a_traceback(words: list[str], lang: str, capsys: Capture) -> None:
    assert run([*words, "--lang", lang]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    what, fix = err.splitlines()
    assert what.startswith("truetune")
    assert fix.startswith("  → See truetune" if lang == "en" else "  → 见 truetune")


# --- language ---


@pytest.mark.parametrize(
    "words",
    [
        ["--lang", "zh", "runs", "no-such-folder"],
        ["runs", "--lang", "zh", "no-such-folder"],
        ["runs", "no-such-folder", "--lang", "zh"],
        ["--lang=zh", "runs", "no-such-folder"],
        ["runs", "no-such-folder", "--lang=zh"],
        ["--lang", "en", "runs", "no-such-folder", "--lang", "zh"],
    ],
)
def test_the_language_may_be_given_anywhere(words: list[str], capsys: Capture) -> None:
    assert run(words) == 2
    assert capsys.readouterr().err == "no-such-folder: 文件夹 no-such-folder 不存在\n  → 检查路径，或先建好文件夹。\n"


def test_the_language_of_the_locale_gives_way_to_the_flag(monkeypatch: Patch, capsys: Capture) -> None:
    monkeypatch.setenv("LANG", "zh_CN.UTF-8")
    assert run(["runs", "no-such-folder"]) == 2
    assert "不存在" in capsys.readouterr().err
    assert run(["runs", "no-such-folder", "--lang", "en"]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_the_language_of_the_file_is_used_to_train(trained: list[Any], write_json: Callable[..., Path]) -> None:
    path = write_json("lang: zh\n", "c.yaml")
    assert run(["train", "d.json", "--config", str(path)]) == 0
    assert run(["train", "d.json"]) == 0
    assert [console.lang for _, console, *_ in trained] == ["zh", "en"]


# --- exit codes ---

CODES = [
    (UserError("no_data", where="data", fix="no_data"), 2),
    (out_of_memory("m"), 3),
    (NumericsError("not_finite", where="step 3", fix="not_finite", loss="nan", grad_norm="1", rows="a:1"), 4),
    (Stopped(2, where="runs/x"), 130),
    (Stopped(15, where="runs/x"), 143),
    (KeyboardInterrupt(), 130),
]


@pytest.mark.parametrize(("error", "code"), CODES, ids=lambda value: getattr(value, "key", None))
def test_a_fault_leads_to_its_exit_code(error: BaseException, code: int, monkeypatch: Patch, capsys: Capture) -> None:
    replace_train(monkeypatch, raising(error))
    assert run(["train", "d.json", "--model", "m"]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.strip().splitlines()) == 2


def test_what_a_command_returns_is_the_exit_code(trained: list[Any], tmp_path: Path) -> None:
    assert run(["train", "d.json"]) == 0
    assert run(["runs", str(tmp_path)]) == 0


def test_debug_raises_the_fault(capsys: Capture) -> None:
    for words in (["check", "--debug"], ["--debug", "check"]):
        with pytest.raises(TruetuneError):
            run(words)
    assert capsys.readouterr().err.count("no data given") == 2


def test_a_programming_error_is_not_hidden(monkeypatch: Patch) -> None:
    replace_train(monkeypatch, raising(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        run(["train", "d.json"])


def test_main_leaves_with_the_exit_code(monkeypatch: Patch, capsys: Capture) -> None:
    monkeypatch.setattr(sys, "argv", ["truetune", "chekc"])
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr("truetune.cli.warnings.simplefilter", lambda *_: None)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    assert "chekc" in capsys.readouterr().err
