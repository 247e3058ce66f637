"""The paper estimates give back what was measured, and their formulas count what they say."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest

from bench.paper import (
    BYTES_KEPT,
    LORA_RANK,
    MACHINES,
    MODELS,
    ROOM,
    Machine,
    estimate,
    fitted,
    lora_weights,
    memory_bytes,
    operations_per_token,
    table,
    weights,
)
from bench.recipe import SHAPES

RESULTS = Path(__file__).resolve().parents[1] / "bench" / "results"
NODES = {"0.6b": 1590, "4b": 860}
"""Of the measured steps (docs/log.md)."""


def measured(name: str) -> list[dict[str, float]]:
    """The steps of truetune in the results of a shape."""
    told = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return [step for one in told["contenders"] if one["name"] == "truetune_run" for step in one["steps"]]


@pytest.mark.parametrize("name", ["0.6b", "4b"])
def test_measured_shapes_are_given_back(name: str) -> None:
    steps = measured(name)
    peak_bytes = max(step["peak_bytes"] for step in steps)
    assert fitted(SHAPES[name], tokens=NODES[name], peak_bytes=peak_bytes) == pytest.approx(BYTES_KEPT, rel=0.1)
    assert memory_bytes(SHAPES[name], tokens=NODES[name]) == pytest.approx(peak_bytes, rel=0.1)
    seconds = statistics.median(step["seconds"] for step in steps)
    told = estimate(name, MACHINES[0])
    assert told is not None
    assert told.tokens_per_s == pytest.approx(NODES[name] / seconds, rel=0.2)


def test_weights_are_those_of_the_models() -> None:
    """By their makers: Qwen3-0.6B 0.44 B without embeddings, 4B 3.6 B, 8B 6.95 B, 32B 31.2 B, Qwen2.5-72B 70.0 B."""
    told = {"0.6b": 0.44e9, "4b": 3.6e9, "8b": 6.95e9, "32b": 31.2e9, "72b": 70.0e9}
    for name, count in told.items():
        assert MODELS[name].layer_weights == pytest.approx(count, rel=0.03)
    assert len(told) == len(MODELS)


def test_lora_weights_are_those_that_peft_makes() -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen3Config, Qwen3ForCausalLM

    shape = SHAPES["0.6b"]
    values = {key: value for key, value in vars(shape).items() if key in Qwen3Config().to_dict()}
    with torch.device("meta"):
        model = Qwen3ForCausalLM(Qwen3Config(**values, tie_word_embeddings=True))
        model = get_peft_model(model, LoraConfig(r=LORA_RANK, target_modules="all-linear", task_type="CAUSAL_LM"))
    trained = [part.numel() for part in model.parameters() if part.requires_grad]
    assert sum(trained) == lora_weights(shape)
    assert sum(part.numel() for part in model.parameters()) - sum(trained) == pytest.approx(weights(shape), rel=1e-3)


def test_more_devices_need_less_of_each_and_wait_more() -> None:
    shape = MODELS["32b"]
    one, eight = (memory_bytes(shape, tokens=512, ranks=ranks) for ranks in (1, 8))
    assert one - eight > 0.8 * 2 * shape.layer_weights * 7 / 8
    near, far = (estimate("32b", Machine("", 8, 989e12, 80e9, link)) for link in (450e9, 50e9))
    assert near is not None
    assert far is not None
    assert (near.strategy, far.strategy) == ("shard", "shard")
    assert far.waiting == pytest.approx(9 * near.waiting)
    assert far.tokens_per_s < near.tokens_per_s


def test_what_does_not_fit_is_said() -> None:
    assert estimate("72b", MACHINES[0]) is None
    rows = table().splitlines()[2:]
    assert len(rows) == len(MACHINES) * len(MODELS)
    unfit = [row for row in rows if "does not fit" in row]
    assert 0 < len(unfit) < len(rows)
    for machine in MACHINES:
        for name in MODELS:
            told = estimate(name, machine)
            if told is None:
                assert 2 * weights(MODELS[name]) > 0.5 * machine.devices * machine.memory_bytes
            else:
                assert told.memory_bytes <= ROOM * machine.memory_bytes


def test_operations_count_two_products_each_way() -> None:
    shape = SHAPES["4b"]
    assert operations_per_token(shape) > 4 * shape.layer_weights
    assert operations_per_token(shape) < 4 * weights(shape)
