"""The learning rate's curve is the one that is said."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from truetune.assembly import assemble
from truetune.config import resolve
from truetune.console import Console
from truetune.messages import text
from truetune.preflight import preflight


def _factor(name: str, step: int, *, warm_up: int, num_steps: int) -> float:
    """The curve by its formula: a line up to 1, then as the name says."""
    if step < warm_up and name != "constant":
        return step / warm_up
    progress = (step - warm_up) / (num_steps - warm_up)
    return {"linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}.get(name, 1.0)


@pytest.mark.parametrize("name", ["linear", "cosine", "constant", "constant_with_warmup"])
def test_warm_up_and_curve_are_what_is_said(
    name: str,
    write_json: Callable[..., Path],
    rows: list[dict[str, str]],
    tiny_qwen: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Row 31 of the silent bugs: a warm-up that is asked for is done, and the curve is printed before step 1."""
    settings = resolve(
        {"data": [str(write_json(rows))], "model": str(tiny_qwen), "lr_scheduler_type": name, "warmup_ratio": 0.2}
        | {"batch_size": 8, "eval_split": 0, "attention": "plain"}
    )
    console = Console()
    assembly = assemble(settings, preflight(settings.config, console), folder=Path("out"), console=console)
    rates = []
    for _ in range(15):
        rates.append(assembly.state.scheduler.get_last_lr()[0])
        assembly.state.optimizer.step()
        assembly.state.scheduler.step()
    expected = [2e-4 * _factor(name, step, warm_up=3, num_steps=15) for step in range(15)]
    assert rates == pytest.approx(expected, rel=1e-12)
    at = expected.index(max(expected)) + 1
    assert at == (1 if name == "constant" else 4)
    said = text("train.rates", first=rates[0], highest=max(rates), at=at, last=rates[-1])
    assert said in capsys.readouterr().out
