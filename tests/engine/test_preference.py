"""Preference losses: against closed forms, TRL's recorded values, each way to compute them, and planted faults."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests import preference_case
from tests.preference_case import ROWS, STOP, make_model
from truetune.engine import preference, step
from truetune.engine.compare import use_kind
from truetune.engine.memory import set_checkpointing
from truetune.engine.objective import WHOLE, Share, held_out, train_step, whole
from truetune.engine.preference import KINDS, Preference, Scales, Sides
from truetune.engine.score import score
from truetune.engine.step import Engine
from truetune.model import Base, add_lora, load_base
from truetune.records import Pair, Row

RECORDED = json.loads(preference_case.FIXTURE.read_text(encoding="utf-8"))
BETA, GAMMA = 0.7, 0.3
Found = tuple[float, torch.Tensor, dict[str, float]]


def to_row(number: int, prompt: Any, chosen: Any, rejected: Any) -> Row:
    """A preference row of token ids, the stop token last."""
    first, second = (Pair(tuple(prompt), (*answer, STOP)) for answer in (chosen, rejected))
    return Row(number, f"f:{number}", (first,), rejected=(second,))


def some_rows() -> list[Row]:
    """The rows of the case."""
    return [to_row(number, *row) for number, row in enumerate(ROWS)]


def make_engine(*, kind: Any = "trie", max_tokens: int = 1 << 40, dropout: float = 0.0) -> Engine:
    """The case's model with PEFT's LoRA as the engine makes it, in fp32."""
    model = make_model()
    values = preference_case.LORA
    model = add_lora(model, r=values["r"], alpha=values["lora_alpha"], dropout=dropout, targets=["all-linear"], seed=0)
    preference_case.fill_lora(model)
    return use_kind(Engine(model.train(), kind, 0, max_tokens))


def take(engine: Engine, objective: Any, rows: list[Row]) -> Found:
    """Loss, gradient and what is told of one step."""
    engine.model.zero_grad(set_to_none=True)
    forwards, share = objective.forwards(engine, rows), whole(engine, rows, objective=objective)
    aim = {"objective": objective, "share": share}
    result = train_step(engine, forwards, seeds=(1, 1), backward=lambda loss: loss.backward(), **aim)
    return result.loss, gradient_of(engine.model), dict(result.told)


def gradient_of(model: Any) -> torch.Tensor:
    """The gradient of every trained weight in one vector, by name."""
    named = sorted((name, weight) for name, weight in model.named_parameters() if weight.requires_grad)
    return torch.cat([weight.grad.flatten() for _, weight in named])


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """How far two gradients are apart, by norm."""
    return float((found - wanted).norm() / wanted.norm())


# --- the losses by themselves ---


def log_sigmoid(x: np.ndarray) -> np.ndarray:
    """Of an array."""
    return -np.log1p(np.exp(-x))


def closed_form(name: str, logps: np.ndarray, reference: np.ndarray, lengths: np.ndarray, *, kl: float) -> float:
    """The loss by the papers' formulas; arrays are [2, R]: chosen, rejected."""
    ratios = logps - reference
    if name == "dpo":
        return float(-log_sigmoid(BETA * (ratios[0] - ratios[1])).mean())
    if name == "ipo":
        return float(((ratios[0] / lengths[0] - ratios[1] / lengths[1] - 1 / (2 * BETA)) ** 2).mean())
    means = logps / lengths
    if name == "simpo":
        return float(-log_sigmoid(BETA * (means[0] - means[1]) - GAMMA).mean())
    if name == "orpo":
        odds = np.exp(means) / (1 - np.exp(means))
        return float(-logps[0].sum() / lengths[0].sum() - BETA * log_sigmoid(np.log(odds[0] / odds[1])).mean())
    gains = 1 / (1 + np.exp(-BETA * (ratios[0] - kl)))
    losses = 1 / (1 + np.exp(-BETA * (kl - ratios[1])))
    return float(np.concatenate([1 - gains, 1 - losses]).mean())


@pytest.mark.parametrize("name", KINDS)
def test_each_loss_is_its_closed_form(name: str) -> None:
    """From log-probabilities alone, in numpy; near certainty, too, where ORPO's odds need care."""
    generator = np.random.default_rng(0)
    for scale in (0.001, 1.0, 30.0):
        logps, reference = -scale * generator.random((2, 2, 6)) - 1e-4
        lengths = generator.integers(1, 9, (2, 6)).astype(float)
        kl = 0.4 if KINDS[name].has_kl else 0.0
        is_liked = torch.tensor([True, False] * 6)
        flat = [torch.from_numpy(values.T.reshape(-1).copy()) for values in (logps, logps - reference, lengths)]
        scales = Scales(BETA, GAMMA, num_rows=6, num_answers=12, num_chosen_tokens=int(lengths[0].sum()), kl=kl)
        found = KINDS[name].share(Sides(*flat, is_liked), scales)
        assert float(found) == pytest.approx(closed_form(name, logps, reference, lengths, kl=kl), rel=1e-6)


def test_certainty_has_a_finite_gradient() -> None:
    """ORPO of answers that the model is sure of: log(1 - e^0) would be minus infinity."""
    log_probs = torch.tensor([0.0, -5.0], requires_grad=True)
    sides = Sides(log_probs, log_probs, torch.tensor([3, 4]), torch.tensor([True, False]))
    loss = KINDS["orpo"].share(sides, Scales(0.1, 0.0, 1, 2, 3))
    (gradient,) = torch.autograd.grad(loss, [log_probs])
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("name", KINDS)
def test_a_step_is_the_closed_form_of_its_answers_scores(name: str) -> None:
    """Answers one by one through the scores, base and tuned; KTO's reference point from pairs written out here."""
    engine, rows = make_engine(), some_rows()
    chosen, rejected = [row.pairs[0] for row in rows], [row.rejected[0] for row in rows]
    both = [*chosen, *rejected]
    turned = [replace(pair, answer_ids=both[number - 1].answer_ids) for number, pair in enumerate(both)]

    def log_probs(pairs: list[Pair]) -> np.ndarray:
        return np.array([-score(engine, [pair])[0].losses_A.sum() for pair in pairs])

    tuned, tuned_turned = log_probs(both), log_probs(turned)
    with engine.model.disable_adapter():
        base, base_turned = log_probs(both), log_probs(turned)
    kl = max(float((tuned_turned - base_turned).mean()), 0.0)
    lengths = np.array([len(pair.answer_ids) for pair in both], float)
    wanted = closed_form(name, *(values.reshape(2, -1) for values in (tuned, base, lengths)), kl=kl)
    loss, _, told = take(engine, Preference(name, BETA, GAMMA), rows)
    assert loss == pytest.approx(wanted, rel=2e-6)
    has_reference = KINDS[name].has_reference
    rewards = BETA * (tuned - base if has_reference else tuned / lengths).reshape(2, -1)
    assert told["rewards_chosen"] == pytest.approx(rewards[0].mean(), rel=1e-4)
    assert told["rewards_rejected"] == pytest.approx(rewards[1].mean(), rel=1e-4)
    assert told["reward_margin"] == pytest.approx((rewards[0] - rewards[1]).mean(), rel=1e-4)
    assert told["reward_accuracy"] == (rewards[0] > rewards[1]).mean()
    assert 0 < told["reward_accuracy"] < 1


# --- TRL ---


def trl_case(number: int, kind: Any, max_tokens: int = 1 << 40) -> tuple[Found, dict[str, Any]]:
    """Our step on the ids that TRL saw, and what TRL made of them."""
    case = RECORDED["cases"][number]
    pairs = [Pair(tuple(prompt), tuple(answer)) for prompt, answer in case["pairs"]]
    half = len(pairs) // 2
    rows = [
        Row(n, "", (first,), rejected=(second,))
        for n, (first, second) in enumerate(zip(pairs[:half], pairs[half:], strict=True))
    ]
    engine = make_engine(kind=kind, max_tokens=max_tokens)
    return take(engine, Preference(case["loss"], case["beta"], case["gamma"]), rows), case


@pytest.mark.parametrize("kind", ["trie", "padded", "plain"])
@pytest.mark.parametrize("number", range(len(preference_case.CASES)))
def test_value_and_gradient_are_trls(number: int, kind: Any) -> None:
    """TRL's own loss and gradient of the same ids (bench/preference_values.py), within 1e-5."""
    (loss, gradient, told), case = trl_case(number, kind)
    wanted = torch.cat([torch.tensor(values) for _, values in sorted(case["gradients"].items())])
    assert loss == pytest.approx(case["value"], rel=1e-5)
    assert len(wanted) == len(gradient) == 928
    assert distance(gradient, wanted) < 1e-5
    assert told["rewards_chosen"] == pytest.approx(case["told"]["rewards/chosen"], rel=1e-4)
    assert told["rewards_rejected"] == pytest.approx(case["told"]["rewards/rejected"], rel=1e-4)
    assert told["reward_margin"] == pytest.approx(case["told"]["rewards/margins"], rel=1e-4)
    assert told["reward_accuracy"] == pytest.approx(case["told"].get("rewards/accuracies", told["reward_accuracy"]))


def test_what_trl_computed_is_this_case() -> None:
    """All five losses; its ids are the rows of the case, chosen ones first."""
    assert RECORDED["versions"]["trl"] == "1.16.0"
    assert {case["loss"] for case in RECORDED["cases"]} == set(KINDS)
    keys = ("loss", "beta", "gamma", "rows")
    assert [{key: case[key] for key in keys} for case in RECORDED["cases"]] == preference_case.CASES
    for case in RECORDED["cases"]:
        rows = [to_row(number, *row) for number, row in enumerate(getattr(preference_case, case["rows"]))]
        wanted = [*(row.pairs[0] for row in rows), *(row.rejected[0] for row in rows)]
        assert case["pairs"] == [[list(pair.prompt_ids), list(pair.answer_ids)] for pair in wanted]


def ref_with_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference is the policy itself."""
    from contextlib import nullcontext

    from peft import PeftModel

    monkeypatch.setattr(PeftModel, "disable_adapter", lambda _: nullcontext())


def beta_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is asked for, it is 0.3."""
    measure = Preference.measure
    monkeypatch.setattr(Preference, "measure", lambda self, rows: replace(measure(self, rows), beta=0.3))


def sides_swapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is rejected is learned."""
    monkeypatch.setattr(Sides, "chosen", lambda self, values: values[~self.is_liked_B])
    monkeypatch.setattr(Sides, "rejected", lambda self, values: values[self.is_liked_B])


def liked_turned(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for KTO, which takes answers one by one."""
    forward = preference._forward

    def turned(*arguments: Any) -> Any:
        made = forward(*arguments)
        return replace(made, answers=replace(made.answers, is_liked_B=~made.answers.is_liked_B))

    monkeypatch.setattr(preference, "_forward", turned)


def shared_edge_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """An edge that two answers share counts for the first one alone."""
    forward = preference._forward

    def once(*arguments: Any) -> Any:
        made = forward(*arguments)
        _, firsts = np.unique(made.answers.edges_K.numpy(), return_index=True)
        kept = torch.from_numpy(np.sort(firsts))
        answers = replace(made.answers, edges_K=made.answers.edges_K[kept], owners_K=made.answers.owners_K[kept])
        return replace(made, answers=answers)

    monkeypatch.setattr(preference, "_forward", once)


def gradient_doubled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each edge's gradient, twice."""
    from truetune.engine import loss

    backward = loss._EdgeLosses.backward
    monkeypatch.setattr(
        loss._EdgeLosses, "backward", staticmethod(lambda ctx, grad: (2 * backward(ctx, grad)[0], None, None))
    )


FAULTS: list[tuple[Callable[..., None], set[str]]] = [
    (ref_with_adapter, {"dpo", "ipo", "kto"}),
    (beta_ignored, set(KINDS)),
    (sides_swapped, set(KINDS)),
    (liked_turned, set(KINDS)),
    (shared_edge_once, set(KINDS)),
    (gradient_doubled, set(KINDS)),
]


@pytest.mark.parametrize(("plant", "names"), FAULTS)
def test_planted_faults_are_seen(plant: Callable[..., None], names: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison with TRL fails for each loss that a fault touches, and holds for the others."""
    plant(monkeypatch)
    found = []
    for number, case in enumerate(preference_case.CASES):
        try:
            test_value_and_gradient_are_trls(number, "trie")
        except AssertionError:
            found.append(case["loss"])
    assert set(found) == names
    assert len(found) == sum(case["loss"] in names for case in preference_case.CASES)


# --- every way to compute a step ---


@pytest.fixture(scope="module")
def qwen(tiny_base: Path) -> Engine:
    """The tiny Qwen3 with moved LoRA and dropout off."""
    base = load_base(Base(str(tiny_base), tiny_base, ""), "float32")
    model = add_lora(base, r=4, alpha=8, dropout=0.0, targets=["all-linear"], seed=0)
    preference_case.fill_lora(model)
    return Engine(model.train(), "plain", 0, 1 << 40)


@pytest.mark.parametrize("name", KINDS)
def test_trie_padded_plain_and_any_split_agree(name: str, qwen: Engine) -> None:
    """Loss, gradient and rewards, whatever is computed at once; forwards of one row, and of all."""
    rows, objective = some_rows(), Preference(name, BETA, GAMMA)
    wanted = take(use_kind(qwen), objective, rows)
    num_forwards = set()
    for kind in ("trie", "padded"):
        for max_tokens in (1, 20, 1 << 40):
            engine = use_kind(replace(qwen, kind=kind, max_tokens=max_tokens))
            forwards = objective.forwards(engine, rows)
            num_forwards.add(len(forwards))
            loss, gradient, told = take(engine, objective, rows)
            assert loss == pytest.approx(wanted[0], rel=1e-5)
            assert distance(gradient, wanted[1]) < 2e-5
            assert told == pytest.approx(wanted[2], rel=1e-3, abs=1e-6)
    assert {1, len(rows)} <= num_forwards
    assert len(num_forwards) >= 3


def test_one_by_one_is_the_same_where_rows_do_not_meet(qwen: Engine) -> None:
    """DPO's step is the mean over steps of one row each."""
    rows, objective = some_rows(), Preference("dpo", BETA)
    loss, gradient, _ = take(use_kind(replace(qwen, kind="trie")), objective, rows)
    alone = [take(use_kind(replace(qwen, kind="trie")), objective, [row]) for row in rows]
    assert loss == pytest.approx(np.mean([one[0] for one in alone]), rel=1e-5)
    assert distance(gradient, torch.stack([one[1] for one in alone]).mean(0)) < 1e-5


def test_no_token_of_a_row_is_computed_twice(qwen: Engine) -> None:
    """Prompt, and what the answers begin with, once: row 2 has 4 + 2 + 1 + 2 nodes, since a stop is only predicted."""
    (forward,) = Preference("dpo", 0.1).forwards(replace(qwen, kind="trie"), some_rows()[2:3])
    assert forward.num_tokens == 9
    assert forward.answers is not None
    assert len(forward.targets_E) == len(set(forward.answers.edges_K.tolist())) == 7
    assert len(forward.answers.edges_K) == 4 + 5


def test_checkpointing_changes_nothing(qwen: Engine) -> None:
    """Recomputed activations give the same loss and gradient."""
    engine = use_kind(replace(qwen, kind="trie"))
    wanted = take(engine, Preference("dpo", BETA), some_rows())
    set_checkpointing(engine, is_on=True)
    try:
        found = take(engine, Preference("dpo", BETA), some_rows())
    finally:
        set_checkpointing(engine, is_on=False)
    assert found[0] == pytest.approx(wanted[0], rel=1e-6)
    assert distance(found[1], wanted[1]) < 1e-6


def test_before_the_first_step_model_and_reference_are_one() -> None:
    """With B = 0 every ratio is exactly 0, in tries and in padded rows, dropout or not: DPO's loss is log 2."""
    for kind in ("trie", "padded"):
        engine = make_engine(kind=kind, dropout=0.3)
        with torch.no_grad():
            for name, weight in engine.model.named_parameters():
                if "lora_B" in name:
                    weight.zero_()
        loss, _, told = take(engine, Preference("dpo", 0.1), some_rows())
        assert loss == pytest.approx(np.log(2), rel=1e-6)
        assert told == {"rewards_chosen": 0, "rewards_rejected": 0, "reward_accuracy": 0.5, "reward_margin": 0}


def test_the_reference_leaves_model_and_dropout_as_they_were() -> None:
    """Modes, trained weights, adapter on; dropout is that of the step's seed, drawn by the policy alone."""
    engine = make_engine(dropout=0.5)
    modes = [layer.training for layer in engine.model.modules()]
    trained = [weight.requires_grad for weight in engine.model.parameters()]
    first, again = (take(engine, Preference("kto", BETA), some_rows()) for _ in range(2))
    assert first[0] == again[0]
    assert torch.equal(first[1], again[1])
    assert [layer.training for layer in engine.model.modules()] == modes
    assert [weight.requires_grad for weight in engine.model.parameters()] == trained
    still = make_engine()
    assert take(still, Preference("kto", BETA), some_rows())[0] != pytest.approx(first[0], rel=1e-4)


@pytest.mark.parametrize("name", KINDS)
def test_held_out_rows_are_told_as_steps_are(name: str) -> None:
    """The same loss and rewards as a step without dropout, whatever the mode."""
    engine, objective = make_engine(dropout=0.3), Preference(name, BETA, GAMMA)
    forwards, share = objective.forwards(engine, some_rows()), whole(engine, some_rows(), objective=objective)
    found = held_out(engine, forwards, objective=objective, share=share)
    loss, _, told = take(make_engine(), objective, some_rows())
    assert found["eval_loss"] == pytest.approx(loss, rel=1e-6)
    assert {key.removeprefix("eval_"): value for key, value in found.items() if key != "eval_loss"} == pytest.approx(
        told
    )
    assert engine.model.training


def test_rows_stay_whole_in_every_split(qwen: Engine) -> None:
    """Both answers of each row are in one forward, each row once, and forwards are as small as they can be."""
    rows = [to_row(n, (3, 4, *range(5, 5 + n % 7)), (9, n + 10), (9, n + 11, 8)) for n in range(30)]
    for kind in ("trie", "padded"):
        for max_tokens in (1, 30, 90):
            engine = replace(qwen, kind=kind, max_tokens=max_tokens)
            forwards = Preference("dpo", 0.1).forwards(engine, rows)
            pairs: list[Pair] = []
            for forward in forwards:
                assert forward.answers is not None
                assert forward.num_tokens <= max(max_tokens, forward.least_tokens)
                pairs += forward.answers.pairs
            found = [(chosen, rejected) for chosen, rejected in zip(pairs[::2], pairs[1::2], strict=True)]
            assert sorted(map(str, found)) == sorted(str((*row.pairs, *row.rejected)) for row in rows)


def test_a_step_that_was_not_measured_is_refused(qwen: Engine) -> None:
    """Imitated pairs have no two sides; KTO's reference point is the whole step's; forwards alone know neither."""
    rows, objective = some_rows(), Preference("kto", 0.1)
    forwards = step.make_forwards(qwen, [pair for row in rows for pair in row.pairs])
    for share in (WHOLE, Share(objective.measure(rows))):
        with pytest.raises(ValueError, match="measured"):
            objective.aim(qwen, forwards, share=share)
    aim = Preference("dpo", 0.1).aim(qwen, forwards, share=Share(objective.measure(rows)))
    with pytest.raises(ValueError, match="preference"):
        aim.share(0)
