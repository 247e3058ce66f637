"""Keys that contradict each other: every pair is found, and all at once."""

from __future__ import annotations

from typing import Any

import pytest

from truetune.config import resolve
from truetune.contradictions import FINDERS
from truetune.errors import UserErrors

CASES: list[tuple[dict[str, Any], set[str]]] = [
    (
        {"batch_size": 4, "per_device_train_batch_size": 3},
        {"config_batch_size_twice"},
    ),
    ({"eval_data": "a.json", "eval_split": 0.1}, {"config_eval_twice"}),
    ({"finetuning": "full", "lora_r": 8}, {"config_not_lora"}),
    ({"finetuning": "full", "use_dora": True}, {"config_not_lora"}),
    ({"finetuning": "full", "quantization": "4bit"}, {"config_not_lora"}),
    ({"finetuning": "full", "loss": "dpo"}, {"config_full_reference"}),
    ({"lora_init": "pissa", "use_dora": True}, {"config_lora_init"}),
    ({"lora_init": "olora", "quantization": "8bit"}, {"config_lora_init"}),
    ({"dpo_beta": 0.3}, {"config_other_loss"}),
    ({"loss": "kto", "batch_size": 1}, {"config_kto_batch"}),
    ({"strategy": "shard", "loss": "dpo"}, {"config_shard"}),
    ({"strategy": "shard", "quantization": "4bit"}, {"config_shard"}),
    ({"strategy": "shard", "finetuning": "full"}, {"config_shard"}),
    ({"strategy": "shard", "streaming": True, "max_steps": 9}, {"config_shard"}),
    ({"streaming": True}, {"stream_max_steps"}),
    ({"streaming": True, "max_steps": 9, "num_train_epochs": 2}, {"stream_key"}),
]


@pytest.mark.parametrize(("keys", "expected"), CASES)
def test_each_is_found(keys: dict[str, Any], expected: set[str]) -> None:
    with pytest.raises(UserErrors) as caught:
        resolve(keys)
    assert {fault.key for fault in caught.value.errors} == expected
    assert all(fault.where.startswith("--") for fault in caught.value.errors)


def test_all_are_found_at_once() -> None:
    keys = {"finetuning": "full", "lora_r": 4, "loss": "dpo", "strategy": "shard", "eval_data": "a", "eval_split": 0.2}
    with pytest.raises(UserErrors) as caught:
        resolve(keys)
    found = [fault.key for fault in caught.value.errors]
    assert sorted(found) == sorted(
        ["config_eval_twice", "config_not_lora", "config_full_reference", "config_shard", "config_shard"]
    )


@pytest.mark.parametrize(
    "keys",
    [
        {"finetuning": "full", "loss": "orpo"},
        {"finetuning": "full", "loss": "simpo"},
        {"use_dora": True, "use_rslora": True, "loraplus_lr_ratio": 4},
        {"loss": "simpo", "simpo_gamma": 0.5},
        {"strategy": "shard", "use_rslora": True},
    ],
)
def test_what_goes_together_is_not_refused(keys: dict[str, Any]) -> None:
    assert resolve(keys).config is not None


def test_every_finder_is_tried() -> None:
    assert len(FINDERS) == 6
    assert len({key for _, keys in CASES for key in keys}) == 10
