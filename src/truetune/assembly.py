"""From settings and preflight to a loop that is ready: model, LoRA, optimizer, scheduler, every "auto" chosen."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration

from truetune.checkpoint import State
from truetune.config import Config, Settings
from truetune.console import Console
from truetune.engine.compare import Choice, Trial, choose_engine, comparison_rows, use_kind
from truetune.engine.master import keep_masters, own_masters
from truetune.engine.memory import Limits, choose_limits, set_checkpointing
from truetune.engine.objective import Imitation, Objective
from truetune.engine.preference import Preference
from truetune.engine.step import Engine, Kind, scaled_from
from truetune.errors import NumericsError, UserError
from truetune.evaluate import MAX_EVALUATIONS, choose_eval_steps, limit_rows, loss_evaluator
from truetune.loading import load_model
from truetune.loop import Event, Loop, Plan
from truetune.model import count_parameters, pad_id
from truetune.optimizer import make_optimizer, show_rates
from truetune.place import read_place
from truetune.preflight import Preflight
from truetune.ranks import ALONE, Ranks
from truetune.records import Row, pairs_of
from truetune.samples import NUM_PROMPTS, Sampler, choose_prompts, plan_samples

SAVES_PER_RUN = 20
MAX_COMPARED_ROWS, MAX_MEASURED_ROWS = 1000, 64
"""Rows among which the comparison finds its pairs, and rows that the governor measures; more would tell no more."""

# Keys that may change between a run and its resumption, since they change nothing that is computed.
FREE_KEYS = (
    *("output_dir", "lang", "logging_steps", "save_steps", "save_total_limit", "hub", "revision"),
    *("report_to", "tracker_project", "tracker_name", "result", "early_stopping_patience"),
    # Another split of the same sum: it rounds otherwise, which a checkpoint's manifest tells.
    *("devices", "strategy"),
    "sample_prompts",
    # These have hashes of their own in the identity.
    *("model", "data", "eval_data"),
)


@dataclass(frozen=True)
class Assembly:
    """A loop ready to run. `settings`: with every "auto" chosen. `evaluate`: gives the loss on the rows `held_out`.

    `sampler`: takes the samples. `events`: what was compared and measured to choose, for the run's log; none where it
    was chosen before.
    """

    settings: Settings
    accelerator: Accelerator
    loop: Loop
    evaluate: Callable[[], Mapping[str, float] | None]
    state: State
    sampler: Sampler
    held_out: Sequence[Row] = ()
    events: tuple[Event, ...] = ()


def assemble(
    settings: Settings,
    flight: Preflight,
    *,
    folder: Path,
    console: Console,
    is_begun: bool = False,
    ranks: Ranks = ALONE,
) -> Assembly:
    """Load the model and put the loop together. `folder`: the run's, where trackers may write.

    `is_begun`: the run goes on, so that how it computes was compared when it began, and stands in `settings`.
    `ranks`: all of them call this together.

    Raises: UserError if the weights or the LoRA targets do not fit.
    """
    config = settings.config
    num_started = read_place().size
    if num_started > 1 and ranks.size == 1:
        # Before accelerate, which would wait for the others.
        raise UserError("ranks_unused", where="WORLD_SIZE", fix="ranks_unused", n=num_started)
    project = ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder / "tensorboard"))
    accelerator = Accelerator(log_with=list(config.report_to) or None, project_config=project)
    if accelerator.gradient_accumulation_steps != 1 or accelerator.mixed_precision != "no":
        # Read from the environment that `accelerate launch` sets; backward would divide the gradient by it.
        raise UserError("accelerate_settings", where="ACCELERATE_*", fix="accelerate_settings")
    settings, model = load_model(settings, flight, console=console, ranks=ranks, device=accelerator.device)
    model = accelerator.prepare(model)
    config = settings.config
    masters = keep_masters(model, getattr(torch, config.dtype)) if config.finetuning == "full" else own_masters(model)
    engine, settings, events = _engine(settings, flight, model, console=console, is_begun=is_begun, ranks=ranks)
    settings, held_out = _choose(settings, flight)
    config, base, prepared = settings.config, flight.base, flight.prepared
    _show_choices(settings, console, model=model, num_held_out=(len(held_out), len(prepared.held_out)))
    optimizer, scheduler = make_optimizer(model, masters, config=config, num_steps=prepared.report.steps)
    show_rates(scheduler, console, num_steps=prepared.report.steps)
    objective = _objective(config)
    plan = _plan(config, flight)
    loop = Loop(engine, optimizer, scheduler, plan, accelerator.backward, ranks=ranks, objective=objective)
    state = State(
        model, optimizer, scheduler, identity_of(config, flight), base.reference(), masters=masters, feed=prepared.feed
    )
    _require_same(state.identity, ranks)
    # Alone, rank 0 asks; a sharded model answers on all ranks or none.
    sampler = _sampler(config, flight, model, held_out, is_asking=ranks.is_main or engine.is_sharded)
    evaluate = loss_evaluator(engine, held_out, ranks=ranks, objective=objective)
    return Assembly(settings, accelerator, loop, evaluate, state, sampler, held_out, events)


def _objective(config: Config) -> Objective:
    """Return what is learned of rows."""
    return Imitation() if config.loss == "sft" else Preference(config.loss, config.dpo_beta, config.simpo_gamma or 0.0)


def _require_same(identity: Mapping[str, str], ranks: Ranks) -> None:
    """Raise UserError if this rank would train another run than rank 0: other files, another processor."""
    first = ranks.tell(dict(identity))
    names = ", ".join(name.removeprefix("config.") for name, value in identity.items() if first[name] != value)
    if names:
        raise UserError("ranks_differ", where=f"rank {ranks.rank}", fix="ranks_differ", names=names)


def _engine(
    settings: Settings, flight: Preflight, model: Any, *, console: Console, is_begun: bool, ranks: Ranks
) -> tuple[Engine, Settings, tuple[Event, ...]]:
    """Return the engine that agrees with the model and fits into memory, with what was chosen and the events of it."""
    config = settings.config
    filler = pad_id(flight.renderer.tokenizer)
    _check_scaling(config, flight, model)
    is_sharded = config.strategy == "shard"
    plain = Engine(model, "plain", filler, max_tokens=1 << 40, scaled_from=scaled_from(model), is_sharded=is_sharded)
    if config.attention == "plain" or (is_begun and config.attention != "auto"):
        choice = Choice(use_kind(replace(plain, kind=config.attention)), ())
    else:
        choice = _compared(plain, config, flight, console)
    size, recompute = config.max_tokens_per_forward, config.gradient_checkpointing
    if size == "auto" or recompute == "auto":
        with console.status("status.measure"):
            engine, limits = choose_limits(
                choice.engine,
                list(_telling_rows(flight, _longest_possible(model, config.max_length))),
                max_tokens=None if size == "auto" else int(size),
                is_checkpointed=None if recompute == "auto" else bool(recompute),
                ranks=ranks,
                objective=_objective(config),
            )
    else:
        engine, limits = replace(choice.engine, max_tokens=int(size)), None
        set_checkpointing(engine, is_on=bool(recompute))
    chosen: dict[str, Any] = {"attention": engine.kind, "max_tokens_per_forward": engine.max_tokens}
    if limits is not None:
        chosen["gradient_checkpointing"] = limits.is_checkpointed
    _show_engine(choice, limits, console)
    return engine, settings.with_chosen(**chosen), tuple(_events(choice, limits))


def _check_scaling(config: Config, flight: Preflight, model: Any) -> None:
    """Refuse preference rows on both sides of a length that changes positions: their answers share one forward.

    Raises: UserError.
    """
    limit, prepared = scaled_from(model), flight.prepared
    longest = int(prepared.train.lengths(0, 1).max(initial=0)) if prepared.feed is None else config.max_length
    if config.loss != "sft" and limit is not None and longest > limit:
        raise UserError("preference_scaled", where="max_length", fix="preference_scaled", limit=limit, longest=longest)


def _longest_possible(model: Any, max_length: int) -> int:
    """Return the tokens of the longest pair that may come: no more than the model has positions for."""
    return min(max_length, getattr(model.config, "max_position_embeddings", None) or max_length)


def _stretched(row: Row, num_tokens: int) -> Row:
    """Return a row whose pair has so many tokens, those of `row` over and over; of a preference row, both answers."""
    pair = row.pairs[0]
    ids = pair.prompt_ids + pair.answer_ids
    answer = pair.answer_ids[: num_tokens - 1]
    prompt = tuple(islice(cycle(ids), num_tokens - len(answer)))
    long = replace(pair, prompt_ids=prompt, answer_ids=answer)
    return replace(row, pairs=(long,), rejected=(long,) if row.rejected else ())


def _telling_rows(flight: Preflight, max_length: int) -> Iterator[Row]:
    """Yield what the governor has to see of the rows: the longest of each side, and some to measure."""
    prepared = flight.prepared
    for side in (prepared.train, prepared.held_out):
        if len(side):
            yield side[int(side.longest_pairs().argmax())]
    if prepared.feed is not None:
        # Of a stream nobody knows the longest pair; it may be this long.
        yield _stretched(prepared.train[0], max_length)
    yield from prepared.train[:MAX_MEASURED_ROWS]


def _compared(plain: Engine, config: Config, flight: Preflight, console: Console) -> Choice:
    """Return the engine of the kind that was asked for, if it agrees with plain; of the fastest that does, for auto.

    Raises: NumericsError if a kind that was asked for computes something else.
    """
    asked = config.attention
    if asked == "flex" and plain.device.type != "cuda":
        raise UserError("flex_needs_gpu", where="attention", fix="flex_needs_gpu")
    kinds: tuple[Kind, ...] = ("trie", "padded") if asked == "auto" else (asked,)
    rows, objective = flight.prepared.train[:MAX_COMPARED_ROWS], _objective(config)
    trial = None if config.loss == "sft" else Trial(comparison_rows(rows), objective)
    with console.status("status.compare"):
        choice = choose_engine(plain, pairs_of(rows), kinds=kinds, trial=trial)
    if asked not in ("auto", choice.engine.kind):
        result = choice.comparisons[-1]
        raise NumericsError("engine_differs", where="attention", fix="engine_differs", **asdict(result))
    return choice


def _show_engine(choice: Choice, limits: Limits | None, console: Console) -> None:
    for result in choice.comparisons:
        key = "train.engine_same" if result.is_same else "train.engine_other"
        console.say(key, **{**asdict(result), "problem": result.problem or console.text("train.engine_differs")})
    if limits is not None:
        console.say("train.memory", tokens=limits.max_tokens, gigabytes=limits.peak_bytes / 1e9)


def _events(choice: Choice, limits: Limits | None) -> Iterator[Event]:
    for result in choice.comparisons:
        yield {**asdict(result), "kind": "comparison", "attention": result.kind, "chosen": choice.engine.kind}
    if limits is not None:
        yield {"kind": "memory", **asdict(limits)}


def _plan(config: Config, flight: Preflight) -> Plan:
    """Return the loop's numbers; every "auto" is chosen by now."""
    return Plan(
        num_steps=flight.prepared.report.steps,
        batch_size=config.rows_per_step,
        seed=config.seed,
        max_grad_norm=config.max_grad_norm,
        eval_steps=int(config.eval_steps),
        save_steps=int(config.save_steps),
        mix=flight.prepared.mix,
        is_streamed=config.streaming,
    )


def _choose(settings: Settings, flight: Preflight) -> tuple[Settings, list[Row]]:
    """Replace every "auto" that is left by a value, and choose the held-out rows that are evaluated."""
    config, prepared = settings.config, flight.prepared
    steps = prepared.report.steps
    num_rows = len(prepared.train) if prepared.mix is None else len(prepared.mix)
    num_trained_rows = steps * config.rows_per_step
    if not config.streaming:
        num_trained_rows = min(num_trained_rows, int(num_rows * config.num_train_epochs + 1))
    held_out = list(prepared.held_out if config.eval_data else limit_rows(prepared.held_out, num_trained_rows))
    chosen: dict[str, Any] = {}
    if config.eval_steps == "auto":
        chosen["eval_steps"] = choose_eval_steps(steps, num_trained_rows=num_trained_rows, num_rows=len(held_out))
    if config.result == "auto":
        chosen["result"] = "best" if held_out else "last"
    elif config.result == "best" and not held_out:
        raise UserError("best_of_nothing", where="result", fix="best_of_nothing")
    if config.save_steps == "auto":
        chosen["save_steps"] = max(-(-steps // SAVES_PER_RUN), 1)
    return settings.with_chosen(**chosen), held_out


def _sampler(config: Config, flight: Preflight, model: Any, held_out: Sequence[Row], *, is_asking: bool) -> Sampler:
    """Return what takes the samples: at evaluations, or as often where nothing is held out.

    Without `is_asking`, none.
    """
    report, prepared = flight.prepared.report, flight.prepared
    texts = None if config.sample_prompts == "auto" else list(config.sample_prompts)
    every = int(config.eval_steps) if held_out else -(-report.steps // MAX_EVALUATIONS)
    num_tokens = report.steps * config.rows_per_step * report.trie_tokens // max(report.rows_used, 1)
    plan = plan_samples(report.steps, eval_steps=every, num_trained_tokens=num_tokens)
    rows = held_out or prepared.train[: 4 * NUM_PROMPTS]
    prompts = choose_prompts(rows, texts, renderer=flight.renderer) if is_asking else []
    return Sampler(model, flight.renderer, prompts, plan, "eval" if held_out else "step")


def _show_choices(settings: Settings, console: Console, *, model: Any, num_held_out: tuple[int, int]) -> None:
    """Print what is trained, and every value that is not the default with its origin."""
    trainable, total = count_parameters(model)
    console.say("train.parameters", trainable=trainable, total=total, share=trainable / total)
    show_values(settings, console)
    used, total_held_out = num_held_out
    if used < total_held_out:
        console.say("train.fewer_held_out", used=used, total=total_held_out)


def show_values(settings: Settings, console: Console) -> None:
    """Print every value that is not the default, with its origin."""
    values, defaults = settings.config.model_dump(), Config().model_dump()
    for key, origin in settings.origins.items():
        if values[key] != defaults[key]:
            console.say("train.choice", name=key, value=values[key], origin=origin)


def identity_of(config: Config, flight: Preflight) -> dict[str, str]:
    """Return what a checkpoint belongs to: with another value of any of these, resuming it would be wrong."""
    values = {key: value for key, value in config.model_dump(mode="json").items() if key not in FREE_KEYS}
    return {
        "base": flight.base.fingerprint,
        "data": flight.prepared.data_hash,
        "template": flight.renderer.template_hash,
        **{f"config.{key}": json.dumps(value, ensure_ascii=False, sort_keys=True) for key, value in values.items()},
    }
