"""The benchmark: every contender on the same rows in the same order, taking turns.

    python -m bench.run                 the Qwen3-0.6B shape, all contenders: about half an hour
    python -m bench.run --quick         the same with two measured steps each: about ten minutes
    python -m bench.run --shape 4b      truetune alone at the 4B shape

Two processes at once would disturb each other, so they take turns: in each round every contender runs once, in a
process of its own, for a warm-up step and some measured steps on the rows of that round.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from bench.envs import EnvError, python_of
from bench.model import machine_dtype, model_folder, on_the_cpu, ordered_rows
from bench.recipe import CACHE, CONTENDERS, DATA, RESULTS, ROOT, SHAPES, WARM_UP_STEPS, Job, Shape
from bench.report import describe_machine, markdown

SEED = 42
FREE_BYTES_WITHOUT_CHECKPOINTING = 23e9
"""TRL without checkpointing was seen to take 21.9 GB."""


@dataclass
class Turns:
    """One contender over all rounds. `problem`: why it is missing, or why it stopped."""

    name: str
    is_checkpointed: bool
    python: Path | None = None
    problem: str = ""
    steps: list[dict[str, Any]] = field(default_factory=list)


def main() -> None:
    """Run the rounds; write the results after each, so that what was measured is never lost."""
    options = parse()
    shape, folder = options.shape_values, CACHE / "work" / options.shape
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    turns = [start(name, options.checkpointing) for name in options.contenders]
    model, dtype = model_folder(options.shape), machine_dtype()
    result = {"shape": options.shape, "dtype": dtype, "rows_per_step": shape.rows_per_step, **describe_machine()}
    for number in range(1, shape.rounds + 1):
        seed, num_steps = SEED + number - 1, shape.steps + WARM_UP_STEPS
        rows_file = folder / f"rows-{number}.json"
        rows = ordered_rows(shape.rows_per_step, num_steps, seed=seed)
        rows_file.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
        job = Job(
            *("", options.shape, str(model), str(rows_file), "", str(folder)),
            *(seed, num_steps, shape.rows_per_step, dtype, False),
        )
        for turn in turns:
            say(f"round {number} of {shape.rounds}: {turn.name}: {take(turn, job, number, options.checkpointing)}")
        write(result | {"contenders": [as_result(turn) for turn in turns]}, options.shape)
    draw(options.shape)


def parse() -> argparse.Namespace:
    """Return the options, with `shape_values`: the shape with the numbers of rounds and steps that were asked for."""
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="0.6b")
    parser.add_argument("--contenders", help="names, with commas between: " + ", ".join(CONTENDERS))
    parser.add_argument("--rounds", type=int, help="how often every contender runs")
    parser.add_argument("--steps", type=int, help="measured steps of a round, after one for warming up")
    parser.add_argument("--quick", action="store_true", help="one round of two measured steps")
    parser.add_argument(
        "--checkpointing",
        choices=["auto", "on", "off"],
        default="auto",
        help="of TRL and LLaMA-Factory; auto: off where 23 GB are free",
    )
    options = parser.parse_args()
    shape: Shape = SHAPES[options.shape]
    rounds, steps = options.rounds or (1 if options.quick else None), options.steps or (2 if options.quick else None)
    options.shape_values = dataclasses.replace(shape, rounds=rounds or shape.rounds, steps=steps or shape.steps)
    options.contenders = options.contenders.split(",") if options.contenders else shape.contenders
    unknown = set(options.contenders) - set(CONTENDERS)
    if unknown:
        parser.error(f"no contender is called {', '.join(sorted(unknown))}")
    if not DATA.is_file():
        parser.error(f"{DATA} is missing; TRUETUNE_SHARED names the folder that holds data/ and assets/")
    return options


def start(name: str, checkpointing: str) -> Turns:
    """Return a contender that is ready to run, or with the reason why it is not."""
    kind = CONTENDERS[name]
    is_short_of_memory = psutil.virtual_memory().available < FREE_BYTES_WITHOUT_CHECKPOINTING
    is_on = checkpointing == "on" or (checkpointing == "auto" and is_short_of_memory)
    turn = Turns(name, is_checkpointed=name == "notebook" or (is_on and kind.may_skip_checkpointing))
    try:
        turn.python = Path(sys.executable) if kind.env is None else python_of(kind.env)
    except EnvError as error:
        turn.problem = f"not installed: {error}"
    return turn


def take(turn: Turns, job: Job, number: int, checkpointing: str) -> str:
    """Let a contender run its steps of one round, and return what to say about it."""
    if turn.problem:
        return turn.problem
    code, problem = run(turn, job, number)
    was_killed = code in (-9, 137)
    if (
        was_killed
        and checkpointing == "auto"
        and CONTENDERS[turn.name].may_skip_checkpointing
        and not turn.is_checkpointed
    ):
        # Memory forbids it after all; what was measured without checkpointing is another program's number.
        say(f"round {number}: {turn.name}: killed without checkpointing, once more with it")
        turn.is_checkpointed, turn.steps = True, []
        code, problem = run(turn, job, number)
    if code:
        turn.problem = problem
        return problem
    measured = [step for step in turn.steps if step["round"] == number]
    return ", ".join(f"{step['rows'] / step['seconds']:.2f}" for step in measured) + " rows/s"


def run(turn: Turns, job: Job, number: int) -> tuple[int, str]:
    """Run a contender's process; keep its measured steps; return its exit code and, if it failed, the reason."""
    folder = Path(job.folder) / f"{turn.name}-{number}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    steps_file, job_file, log = folder / "steps.jsonl", folder / "job.json", folder / "log.txt"
    dataclasses.replace(
        job,
        contender=turn.name,
        folder=str(folder),
        steps_file=str(steps_file),
        is_checkpointed=turn.is_checkpointed,
    ).save(job_file)
    words = [str(turn.python), "-m", f"bench.contenders.{turn.name}", str(job_file)]
    with log.open("w", encoding="utf-8") as output:
        code = subprocess.run(
            words, cwd=ROOT, env=environment(folder), stdout=output, stderr=subprocess.STDOUT, check=False
        ).returncode
    if code:
        say(f"see {log}")
        return code, reason(code, log)
    lines = [json.loads(line) for line in steps_file.read_text(encoding="utf-8").splitlines()]
    if len(lines) != job.num_steps:
        return 1, f"took {len(lines)} of {job.num_steps} steps"
    turn.steps += [line | {"round": number} for line in lines[WARM_UP_STEPS:]]
    return 0, ""


def environment(folder: Path) -> dict[str, str]:
    """Return the variables of a contender: on the CPU, no network, caches of its own."""
    own = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "TQDM_DISABLE": "1"}
    return on_the_cpu() | own | {"PYTHONUTF8": "1", "TOKENIZERS_PARALLELISM": "false"}


def reason(code: int, log: Path) -> str:
    """Return why a process failed: the signal, or the last line that names an error."""
    if code < 0:
        return f"killed by signal {-code}" + (", which may mean that memory ran out" if code == -9 else "")
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    return (errors or lines or [f"exit code {code}"])[-1]


def as_result(turn: Turns) -> dict[str, Any]:
    """Return what the results keep of a contender."""
    values = {key: getattr(turn, key) for key in ("name", "is_checkpointed", "problem", "steps")}
    return values | {"title": CONTENDERS[turn.name].title}


def write(result: dict[str, Any], shape: str) -> None:
    """Write the numbers and the table."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{shape}.json").write_text(json.dumps(result, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    (RESULTS / f"{shape}.md").write_text(markdown(result), encoding="utf-8")


def draw(shape: str) -> None:
    """Draw the picture, with the matplotlib of the peers' environment, and print the table."""
    try:
        words = [str(python_of("hf")), "-m", "bench.plot", str(RESULTS / f"{shape}.json")]
        if subprocess.run(words, cwd=ROOT, check=False).returncode:
            say("no picture: bench.plot failed")
    except EnvError as error:
        say(f"no picture: {error}")
    sys.stdout.write((RESULTS / f"{shape}.md").read_text(encoding="utf-8"))


def say(line: str) -> None:
    """Print a line of progress at once."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


if __name__ == "__main__":
    main()
