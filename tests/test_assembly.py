"""Settings become numbers: steps, optimizer, schedule, what "auto" chose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from truetune import checkpoint
from truetune.assembly import Assembly, assemble, identity_of
from truetune.cli import run
from truetune.config import load_yaml, resolve
from truetune.console import Console
from truetune.errors import UserError
from truetune.preflight import preflight
from truetune.rundir import RunDir

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def build(data: Path, model: Path, **keys: Any) -> Assembly:
    """The assembly of a run."""
    settings = resolve({"data": [str(data)], "model": str(model), **keys})
    console = Console(quiet=True)
    return assemble(settings, preflight(settings.config, console), folder=data.parent / "out", console=console)


def test_loraplus_gives_b_a_rate_of_its_own(
    write_json: Callable[..., Path], rows: list[dict[str, str]], tiny_qwen: Path, tmp_path: Path
) -> None:
    """Every A in one group, every B in the other; both follow the schedule, and go on with it from a checkpoint."""
    keys = {"loraplus_lr_ratio": 16, "learning_rate": 1e-3, "attention": "trie", "max_tokens_per_forward": 256}
    made = [
        build(write_json(rows), tiny_qwen, **keys, gradient_checkpointing=False, max_steps=6, weight_decay=0.1)
        for _ in range(2)
    ]
    names = {id(p): name for name, p in made[0].state.model.named_parameters()}
    groups = made[0].loop.optimizer.param_groups
    sides = [{names[id(p)].split(".")[-3] for p in group["params"]} for group in groups]
    assert sides == [{"lora_A"}, {"lora_B"}]
    assert [len(group["params"]) for group in groups] == [2 * 7, 2 * 7]
    assert {group["weight_decay"] for group in groups} == {0.1}
    rates = made[0].loop.scheduler.get_last_lr()
    assert rates == [1e-3, 16e-3]
    rows_ = preflight(made[0].settings.config, Console(quiet=True)).prepared.train
    first = [event for event in made[0].loop.run(rows_) if event["kind"] == "step"]
    assert all(event["learning_rate_b"] == pytest.approx(16 * event["learning_rate"]) for event in first)
    paths: list[Path] = []

    def save(step: int) -> None:
        paths.append(checkpoint.save(tmp_path, step, state=made[1].state, write_extra=lambda _: None))

    made[1].loop.plan = replace(made[1].loop.plan, save_steps=3)
    whole = [event for event in made[1].loop.run(rows_, save=save) if event["kind"] == "step"]
    resumed = build(write_json(rows), tiny_qwen, **keys, gradient_checkpointing=False, max_steps=6, weight_decay=0.1)
    assert checkpoint.load(paths[0], resumed.state) == 3
    rest = [event for event in resumed.loop.run(rows_, start=3) if event["kind"] == "step"]
    for name in ("loss", "grad_norm", "learning_rate", "learning_rate_b"):
        assert [event[name] for event in rest] == [event[name] for event in whole[3:]] == [e[name] for e in first[3:]]
    assert checkpoint.other_tensor(paths[-1], resumed.state) is None


def test_learning_rate_follows_the_formula(
    write_json: Callable[..., Path], rows: list[dict[str, str]], tiny_qwen: Path
) -> None:
    """Linear, no warm-up: the first step has the full rate, the last one 1/n of it (E8)."""
    assembly = build(
        write_json(rows), tiny_qwen, lr_scheduler_type="linear", warmup_ratio=0, batch_size=8, eval_split=0
    )
    rates = []
    for _ in range(15):
        rates.append(assembly.state.scheduler.get_last_lr()[0])
        assembly.state.optimizer.step()
        assembly.state.scheduler.step()
    assert assembly.loop.plan.num_steps == 15
    assert rates == pytest.approx([2e-4 * (1 - step / 15) for step in range(15)], rel=1e-12)


def test_only_lora_is_optimised_in_fp32(
    write_json: Callable[..., Path], rows: list[dict[str, str]], tiny_qwen: Path
) -> None:
    """The optimizer holds the adapter's weights and nothing else; its moments are fp32 on a bf16 base (E8)."""
    assembly = build(write_json(rows), tiny_qwen, dtype="bfloat16", weight_decay=0.1)
    optimizer = assembly.state.optimizer
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    named = dict(assembly.loop.engine.model.named_parameters())
    assert held == {id(p) for name, p in named.items() if "lora_" in name}
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert {value.dtype for state in optimizer.state.values() for value in state.values()} == {torch.float32}
    assert optimizer.param_groups[0]["weight_decay"] == 0.1


def test_every_auto_is_chosen_and_named(
    write_json: Callable[..., Path], rows: list[dict[str, str]], tiny_qwen: Path
) -> None:
    """No "auto" is left in the settings that are written down, and each choice says where it came from."""
    assembly = build(write_json(rows), tiny_qwen)
    values = assembly.settings.config.model_dump()
    autos = ("dtype", "attention", "gradient_checkpointing", "max_tokens_per_forward", "eval_steps", "save_steps")
    assert [assembly.settings.origins[key] for key in autos] == ["auto"] * 6
    assert "auto" not in [values[key] for key in autos]


def test_checkpointing_changes_no_gradient(
    write_json: Callable[..., Path], rows: list[dict[str, str]], tiny_qwen: Path
) -> None:
    """On and off, the first steps have the same losses and norms, and every LoRA weight gets a gradient (E7)."""
    figures = {}
    for is_on in (True, False):
        assembly = build(write_json(rows), tiny_qwen, gradient_checkpointing=is_on, lora_dropout=0.1, max_steps=3)
        data = preflight(assembly.settings.config, Console(quiet=True)).prepared.train
        events = list(assembly.loop.run(data))
        figures[is_on] = [(event["loss"], event["grad_norm"]) for event in events]
        assert all(p.grad is None for p in assembly.loop.engine.model.parameters())
    assert len(figures[True]) == 3
    for one, other in zip(figures[True], figures[False], strict=True):
        assert one == pytest.approx(other, rel=1e-6)


def test_settings_of_accelerate_are_refused(
    write_json: Callable[..., Path], rows: list[dict[str, str]], tiny_qwen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its environment variables would divide the gradient behind our back."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    with pytest.raises(UserError) as caught:
        build(write_json(rows), tiny_qwen)
    assert caught.value.key == "accelerate_settings"


@pytest.mark.slow
def test_identity_changes_with_what_is_computed(
    write_json: Callable[..., Path], rows: list[dict[str, str]], tiny_qwen: Path
) -> None:
    """A key that changes the result changes the identity; one that only logs does not."""
    path = write_json(rows)

    def identity(**keys: Any) -> dict[str, str]:
        config = resolve({"data": [str(path)], "model": str(tiny_qwen), **keys}).config
        return identity_of(config, preflight(config, Console(quiet=True)))

    base = identity()
    assert identity(logging_steps=7, output_dir="elsewhere", result="last", early_stopping_patience=2) == base
    for key, value in (("learning_rate", 1e-3), ("seed", 1), ("batch_size", 2), ("lora_dropout", 0.2)):
        changed = identity(**{key: value})
        # Another seed holds other rows out.
        also = {"data"} if key == "seed" else set()
        assert {name for name in changed if changed[name] != base[name]} == {f"config.{key}"} | also, key


@pytest.mark.slow
def test_huanhuan_recipe_is_the_notebooks(shared: Path, tiny_qwen: Path) -> None:
    """Value for value, and 351 steps on the real rows."""
    values, _ = load_yaml(EXAMPLES / "huanhuan.yaml")
    assert values == {
        "model": "Qwen/Qwen3-4B-Instruct-2507",
        "system": "现在你要扮演皇帝身边的女人--甄嬛",
        "input_join": "",
        "max_length": 1024,
        "lora_r": 8,
        "lora_alpha": 32,
        "lora_dropout": 0.1,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "per_device_train_batch_size": 16,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 3,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "linear",
        "warmup_ratio": 0.0,
        "dtype": "bfloat16",
        "eval_split": 0.0,
        "logging_steps": 10,
        "save_steps": 100,
        "report_to": ["swanlab"],
        "tracker_project": "Qwen3-4B-lora",
    }
    flags = {"data": [str(shared / "data" / "huanhuan.json")], "model": str(tiny_qwen)}
    config = resolve(flags, EXAMPLES / "huanhuan.yaml").config
    assert preflight(config, Console(quiet=True)).prepared.report.steps == 351


@pytest.mark.slow
def test_family_that_is_no_plain_attention_falls_back_and_says_so(
    write_json: Callable[..., Path], rows: list[dict[str, str]], qwen_tokenizer: Any, tmp_path: Path, capsys: Any
) -> None:
    """Attention sinks (GPT-OSS): padded rows, told on the screen and in the log; a trie asked for is refused."""
    from transformers import GptOssConfig, GptOssForCausalLM

    folder = tmp_path / "oss"
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8, "sliding_window": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 2, "num_experts_per_tok": 1}
    ids = {"eos_token_id": 151645, "pad_token_id": 151643, "bos_token_id": None}
    GptOssForCausalLM(GptOssConfig(vocab_size=len(qwen_tokenizer), **sizes, **heads, **ids)).save_pretrained(folder)
    qwen_tokenizer.save_pretrained(folder)
    words = ["train", str(write_json(rows)), "--model", str(folder), "--max-steps", "1", "--dtype", "float32"]
    words += ["--target-modules", "q_proj,v_proj", "--output-dir", str(tmp_path / "out"), "--lang", "en"]
    assert run([*words, "--attention", "trie"]) == 4
    assert "attention: trie differs from the model's own code" in capsys.readouterr().err
    assert run(words) == 0
    assert "Not computed as trie: UnsupportedError: s_aux" in capsys.readouterr().out
    events = list(RunDir(tmp_path / "out").read_events())
    compared = [(e["attention"], e["is_same"], e["chosen"]) for e in events if e["kind"] == "comparison"]
    assert compared == [("trie", False, "padded"), ("padded", True, "padded")]
    assert load_yaml(tmp_path / "out" / "config.yaml")[0]["attention"] == "padded"
