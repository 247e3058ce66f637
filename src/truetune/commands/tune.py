"""`truetune tune DATA... --model M`: a short search over learning rate and rank by held-out loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from truetune.cli import config_options, given
from truetune.config import resolve
from truetune.errors import UserError
from truetune.messages import text
from truetune.tunedir import TuneDir

KEYS = (
    *("model", "revision", "hub", "eval_data", "data_weights", "encoding", "eval_split", "system", "input_join"),
    *("template", "chat_template_kwargs", "train_on", "max_length", "overlong", "invalid", "batch_size"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "learning_rate"),
    *("lr_scheduler_type", "warmup_ratio", "weight_decay", "max_grad_norm", "seed", "lora_r", "lora_alpha"),
    *("lora_dropout", "target_modules", "dtype", "attention", "gradient_checkpointing", "max_tokens_per_forward"),
    "eval_steps",
)
"""Keys that change what a trial computes."""


def command(lang: str) -> click.Command:
    """Return the command, described in `lang`."""

    def run(
        data: tuple[str, ...],
        config_file: str | None,
        trials: int | None,
        timeout_s: float | None,
        resume: bool,
        **values: Any,
    ) -> None:
        rates, ranks = _rates(values.pop("rates")), _ranks(values.pop("ranks"))
        flags = given(values, data)
        path = Path(config_file) if config_file else None
        if resume and path is None and flags.get("output_dir"):
            saved = TuneDir(Path(flags["output_dir"]).expanduser()).config
            path = saved if saved.is_file() else None
        settings = resolve(flags, path)
        need_optuna()
        from truetune.console import Console
        from truetune.tuning import Options, tune

        options = Options(num_trials=trials, timeout_s=timeout_s, rates=rates, ranks=ranks)
        tune(settings, Console(lang), options=options, resume=resume)

    return click.Command(
        "tune",
        callback=run,
        help=text("command.tune", lang),
        params=[
            click.Argument(["data"], nargs=-1),
            click.Option(["--trials"], type=click.IntRange(min=1), metavar="N", help=text("help.trials", lang)),
            click.Option(["--max-steps"], metavar="K", help=text("help.tune_steps", lang)),
            click.Option(["--rates"], metavar="LOW,HIGH", help=text("help.rates", lang)),
            click.Option(["--ranks"], metavar="R,R,...", help=text("help.ranks", lang)),
            click.Option(
                ["--timeout-s"],
                type=click.FloatRange(min=0, min_open=True),
                metavar="S",
                help=text("help.timeout", lang),
            ),
            click.Option(["--output-dir"], metavar="DIR", help=text("help.tune_output", lang)),
            click.Option(["--resume"], is_flag=True, help=text("help.tune_resume", lang)),
            *config_options(lang, KEYS),
        ],
    )


def need_optuna() -> None:
    """Raise UserError if Optuna is not installed."""
    try:
        import optuna  # noqa: F401
    except ImportError:
        raise UserError("extra_missing", where="tune", fix="extra_missing", extra="tune") from None


def _rates(value: str | None) -> tuple[float, float] | None:
    """Return the lowest and the highest rate of "1e-5,1e-3".

    Raises: UserError if these are not two rates, the lower first.
    """
    if value is None:
        return None
    try:
        low, high = map(float, value.split(","))
    except ValueError:
        low = high = 0.0
    if not 0 < low < high < 1:
        raise UserError("tune_numbers", where="--rates", fix="tune_numbers", value=value)
    return low, high


def _ranks(value: str | None) -> tuple[int, ...]:
    """Return the ranks of "8,16".

    Raises: UserError if these are no whole numbers above 0.
    """
    ranks = [word.strip() for word in value.split(",")] if value is not None else []
    if not all(rank.isdecimal() and rank.isascii() and int(rank) > 0 for rank in ranks):
        raise UserError("tune_numbers", where="--ranks", fix="tune_numbers", value=value)
    return tuple(map(int, ranks))
