"""Model families: trie, padded rows and one pair at a time give the same loss and gradients, in fp32.

The list is that of engine/families.py, which `truetune env MODEL` and docs/families.md show.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from truetune.engine.compare import choose_engine
from truetune.engine.families import FAMILIES
from truetune.engine.objective import train_step
from truetune.engine.step import Engine, forward_loss, make_forwards, running, scaled_from
from truetune.model import add_lora
from truetune.records import Pair

# PEFT 0.21 warns of a pattern that it made itself for experts.
pytestmark = pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")

VOCABULARY = 200
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
WINDOW = {"head_dim": 8, "sliding_window": 8}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "shared_expert_intermediate_size": 16,
    "head_dim": 8,
}
DELTA = {key: value for key, value in LINEAR.items() if key.startswith("linear_")}
LATENT = {
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "qk_nope_head_dim": 8,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 16,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
}
STATES = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 16}
MIXED = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
CONVOLVED = {"layer_types": ["conv", "full_attention", "conv"]}
SCALES = {"logits_scaling": 4.0, "attention_multiplier": 0.2, "residual_multiplier": 0.5, "embedding_multiplier": 3.0}
# model_type → configuration class, and what it needs besides SMALL. Windows are shorter than the pairs.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "bailing_hybrid": ("BailingHybridConfig", {**LATENT, **MIXED, "head_dim": 8, "first_k_dense_replace": 1}),
    "bamba": ("BambaConfig", {**STATES, "attn_layer_indices": [1]}),
    "cohere2": ("Cohere2Config", WINDOW),
    "ernie4_5": ("Ernie4_5Config", {"head_dim": 8}),
    "falcon_h1": ("FalconH1Config", {**STATES, "mamba_d_ssm": 64}),
    "gemma2": ("Gemma2Config", WINDOW),
    "gemma3_text": ("Gemma3TextConfig", WINDOW),
    "glm4": ("Glm4Config", {"head_dim": 8}),
    "gpt_oss": ("GptOssConfig", {**WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "granite": ("GraniteConfig", SCALES),
    "granitemoehybrid": (
        "GraniteMoeHybridConfig",
        {
            **STATES,
            "layer_types": ["mamba", "attention", "mamba"],
            "num_local_experts": 0,
            "shared_intermediate_size": 32,
        },
    ),
    "jamba": ("JambaConfig", {"num_experts": 1, "mamba_d_state": 8, "attn_layer_period": 2, "attn_layer_offset": 1}),
    "kimi_linear": (
        "KimiLinearConfig",
        {
            **LATENT,
            **MIXED,
            "linear_head_dim": 8,
            "linear_num_heads": 4,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
        },
    ),
    "lfm2": ("Lfm2Config", CONVOLVED),
    "lfm2_moe": ("Lfm2MoeConfig", {**EXPERTS, **CONVOLVED, "num_dense_layers": 1}),
    "lfm3": ("Lfm3Config", {**WINDOW, "layer_types": ["conv", "sliding_attention", "conv"]}),
    "llama": ("LlamaConfig", {"head_dim": 8}),
    "mamba2": ("Mamba2Config", {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 2, "chunk_size": 16}),
    "minimax": ("MiniMaxConfig", {**MIXED, "num_local_experts": 4, "block_size": 8, "head_dim": 8}),
    "mistral": ("MistralConfig", WINDOW),
    "nemotron_h": (
        "NemotronHConfig",
        {
            "layers_block_type": ["mamba", "attention", "mlp", "mamba"],
            "num_hidden_layers": 4,
            "chunk_size": 16,
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "ssm_state_size": 8,
            "n_groups": 2,
            "head_dim": 8,
        },
    ),
    "olmo2": ("Olmo2Config", {}),
    "olmo_hybrid": ("OlmoHybridConfig", {**DELTA, **MIXED}),
    "phi3": ("Phi3Config", {"sliding_window": 8}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 8}),
    # As published: with a part that sees, which is left out.
    "qwen3_5": ("Qwen3_5Config", {"text_config": {**SMALL, **DELTA, **MIXED, "head_dim": 8}}),
    "qwen3_5_moe": ("Qwen3_5MoeConfig", {"text_config": {**SMALL, **EXPERTS, **LINEAR, **MIXED}}),
    "qwen3_5_moe_text": ("Qwen3_5MoeTextConfig", {**EXPERTS, **LINEAR, **MIXED}),
    "qwen3_5_text": ("Qwen3_5TextConfig", {**DELTA, **MIXED, "head_dim": 8}),
    "qwen3_moe": ("Qwen3MoeConfig", {**EXPERTS, "head_dim": 8}),
    "qwen3_next": ("Qwen3NextConfig", {**EXPERTS, **LINEAR, **MIXED}),
    "smollm3": ("SmolLM3Config", {}),
    "zamba2": (
        "Zamba2Config",
        {
            "layers_block_type": ["mamba", "hybrid", "mamba"],
            "n_mamba_heads": 4,
            "mamba_d_state": 8,
            "num_key_value_heads": 4,
            "chunk_size": 16,
        },
    ),
}


# PEFT has no LoRA for the last projection of these: kernels read its weight.
TARGETS = {
    "falcon_h1": ["in_proj", "q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "mamba2": ["in_proj"],
    "nemotron_h": ["in_proj", "q_proj", "v_proj", "o_proj", "up_proj", "down_proj"],
}


def make(name: str, *, dropout: float = 0.0, **keys: Any) -> Any:
    """A tiny random model of a family, fp32, LoRA on all linear layers with B away from 0."""
    kind, more = CASES[name]
    torch.manual_seed(0)
    values = more if "text_config" in more else {**SMALL, **more, **keys}
    config = getattr(transformers, kind)(**values)
    base = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model = add_lora(base, r=4, alpha=8, dropout=dropout, targets=TARGETS.get(name, ["all-linear"]), seed=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
        if name.endswith("A_log"):
            # At random most heads forget a token at once: their states would prove nothing.
            torch.nn.init.uniform_(parameter, -4, 0)
    return model.train()


def random_pairs(seed: int = 0) -> list[Pair]:
    """Pairs behind one prefix, longer than the windows: branches at several depths, a duplicate, an extension."""
    draw = random.Random(seed)

    def ids(least: int, most: int) -> tuple[int, ...]:
        return tuple(draw.randrange(3, VOCABULARY) for _ in range(draw.randint(least, most)))

    prefix = ids(12, 12)
    pairs = [Pair((*prefix, *ids(1, 8)), (*ids(2, 12), 2)) for _ in range(5)]
    pairs += [pairs[0], Pair(pairs[1].prompt_ids + pairs[1].answer_ids, (*ids(3, 3), 2))]
    pairs += [Pair(pairs[2].prompt_ids, (*pairs[2].answer_ids[:1], *ids(2, 4), 2)), Pair(ids(3, 3), (*ids(2, 2), 2))]
    return pairs


def loss_and_gradients(engine: Engine, pairs: list[Pair]) -> tuple[float, dict[str, torch.Tensor]]:
    """The step's loss and every LoRA gradient."""
    result = train_step(engine, make_forwards(engine, pairs), seeds=(0, 0), backward=lambda loss: loss.backward())
    gradients = {name: p.grad for name, p in engine.model.named_parameters() if p.requires_grad}
    for parameter in engine.model.parameters():
        parameter.grad = None
    return result.loss, gradients


@pytest.mark.parametrize("name", FAMILIES)
def test_every_way_to_compute_is_one(name: str) -> None:
    """Loss within 1e-5 and each gradient tensor within 1e-5 of one pair at a time through the model's own code."""
    model = make(name)
    pairs = random_pairs()
    plain = Engine(model, "plain", 0, 1, scaled_from=scaled_from(model.get_base_model()))
    choice = choose_engine(replace(plain, max_tokens=1 << 40), pairs)
    assert choice.engine.kind == FAMILIES[name], choice.comparisons
    wanted_loss, wanted = loss_and_gradients(choice_of("plain", plain, max_tokens=1), pairs)
    ways = [("padded", 1 << 40), ("padded", 60)]
    ways += [("trie", 1 << 40), ("trie", 40), ("trie", 1)] if FAMILIES[name] == "trie" else []
    compared = 0
    for kind, max_tokens in ways:
        loss, found = loss_and_gradients(choice_of(kind, plain, max_tokens=max_tokens), pairs)
        assert loss == pytest.approx(wanted_loss, rel=1e-5), (kind, max_tokens)
        for key, gradient in wanted.items():
            if gradient is None or float(gradient.norm()) == 0:
                continue
            assert float((found[key] - gradient).norm()) <= 1e-5 * float(gradient.norm()), (kind, max_tokens, key)
            compared += 1
    assert compared >= len(ways) * (2 * 4 * 2 if name not in TARGETS else 3)


def choice_of(kind: Any, engine: Engine, *, max_tokens: int) -> Engine:
    """The engine of a kind, with its layers switched."""
    from truetune.engine.compare import use_kind

    return use_kind(replace(engine, kind=kind, max_tokens=max_tokens))


def has_experts(name: str) -> bool:
    """True if tokens of a family go to experts, or PEFT adapts their weights."""
    values = CASES[name][1].get("text_config", CASES[name][1])
    return any(values.get(f"num_{part}experts", 0) > 1 for part in ("", "local_"))


# Experts compute tokens together, so that a branch changes the shape, and with it the rounding, of others' products.
DENSE = [name for name, kind in FAMILIES.items() if kind == "trie" and not has_experts(name)]


@pytest.mark.parametrize("name", DENSE)
def test_other_branches_do_not_leak(name: str) -> None:
    """Another answer in one branch, of the same length, leaves the others' hidden states bit-equal (E2)."""
    engine = choice_of("trie", Engine(make(name), "trie", 0, 1 << 40), max_tokens=1 << 40)
    prefix = tuple(range(20, 32))
    pairs = [Pair((*prefix, n), (n, n + 1, n + 2, 2)) for n in (40, 50, 60)]
    changed = [pairs[0], pairs[1], Pair(pairs[2].prompt_ids, (99, 98, 97, 2))]
    states = []
    with running(engine), torch.no_grad():
        for some in (pairs, changed):
            (forward,) = make_forwards(engine, some)
            layout = forward.layout
            hidden = engine.transformer.base_model(
                input_ids=forward.input_ids_BT,
                position_ids=torch.from_numpy(layout.trie.positions_N)[None],
                attention_mask=torch.ones_like(forward.input_ids_BT),
                trie_layout=layout,
                use_cache=False,
            ).last_hidden_state[0]
            states.append(hidden)
    first_branches = len(prefix) + 2 * 4
    assert torch.equal(states[0][:first_branches], states[1][:first_branches])
    assert not torch.equal(states[0][first_branches:], states[1][first_branches:])


START = 16
ROPE = {"rope_theta": 1e4, "original_max_position_embeddings": START}
SCALED = {
    "dynamic": ("llama", {"rope_type": "dynamic", "factor": 8.0}),
    "longrope": ("phi3", {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 5.0]}),
}


@pytest.mark.parametrize("kind", SCALED)
def test_scaled_positions_go_by_the_pair_alone(kind: str) -> None:
    """Pairs on both sides of the threshold: each is scaled as if it were alone, in any order and again."""
    name, rope = SCALED[kind]
    limits = {"max_position_embeddings": START, "original_max_position_embeddings": START}
    model = make(name, **limits, rope_parameters={**ROPE, **rope})
    engine = Engine(model, "plain", 0, 1, scaled_from=scaled_from(model.get_base_model()))
    assert engine.scaled_from == START
    pairs = random_pairs()
    lengths = [len(pair) - 1 for pair in pairs]
    assert min(lengths) <= START < max(lengths)

    def gradient(kind: str, scaled_from: int | None = START, max_tokens: int = 1 << 40) -> torch.Tensor:
        way = choice_of(kind, replace(engine, scaled_from=scaled_from), max_tokens=max_tokens)
        return torch.cat([gradient.flatten() for gradient in loss_and_gradients(way, pairs)[1].values()])

    wanted = gradient("plain", max_tokens=1)
    for kind in ("trie", "padded", "plain", "trie"):
        assert float((gradient(kind) - wanted).norm()) <= 1e-5 * float(wanted.norm()), kind
    assert float((gradient("trie", scaled_from=None) - wanted).norm()) > 1e-4 * float(wanted.norm())


@pytest.mark.parametrize("name", FAMILIES)
def test_checkpointing_changes_nothing(name: str) -> None:
    """Recomputed activations, dropout included, give the same loss and gradients (E7)."""
    results = []
    # PEFT has no dropout for experts' weights.
    dropout = 0.0 if has_experts(name) else 0.2
    for is_on in (False, True):
        engine = Engine(make(name, dropout=dropout), FAMILIES[name], 0, 1 << 40)
        if is_on:
            engine.transformer.activation_checkpointing_enable()
        results.append(loss_and_gradients(engine, random_pairs()))
    (loss, gradients), (again, recomputed) = results
    assert again == pytest.approx(loss, rel=1e-6)
    alive = 0
    for key, gradient in gradients.items():
        if gradient is not None:
            assert float((recomputed[key] - gradient).norm()) <= 1e-6 * float(gradient.norm()), key
            alive += float(gradient.norm()) > 0
    assert alive >= (2 * 4 if name not in TARGETS else 3)


def test_weights_of_duplicates_count() -> None:
    """A pair given three times weighs three times, and a trie holds it once."""
    model = make("qwen3")
    engine = Engine(model, "trie", 0, 1 << 40)
    once, other = random_pairs()[:2]
    losses = {}
    with running(engine):
        for name, pairs in (("one", [once]), ("other", [other]), ("three", [once, once, once, other])):
            (forward,) = make_forwards(engine, pairs)
            losses[name] = forward_loss(engine, forward).item()
    assert losses["three"] == pytest.approx(3 * losses["one"] + losses["other"], rel=1e-5)
    assert make_forwards(engine, [once, once])[0].num_tokens == len(once) - 1


def test_the_battery_covers_the_families_that_are_promised() -> None:
    promised = {"llama", "qwen2", "qwen3", "qwen3_moe", "gemma2", "gemma3_text", "mistral", "phi3", "granite"}
    promised |= {"qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "lfm2", "lfm2_moe"}
    assert promised <= set(FAMILIES) == set(CASES)
    assert set(FAMILIES.values()) == {"trie", "padded"}
    assert len(DENSE) >= 16
