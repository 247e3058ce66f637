"""What every contender is given: shapes, the recipe's numbers, and the job of one process.

Standard library only: each contender imports this in an environment of its own.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parent
RESULTS = BENCH / "results"
SHARED = Path(os.environ.get("TRUETUNE_SHARED", ROOT.parent / "shared"))
CACHE = Path(os.environ.get("TRUETUNE_BENCH_CACHE", BENCH / ".cache"))
DATA = SHARED / "data" / "huanhuan.json"
TOKENIZER = SHARED / "assets" / "qwen3-tokenizer"

SYSTEM = "现在你要扮演皇帝身边的女人--甄嬛"
MAX_LENGTH = 1024
LEARNING_RATE = 1e-4
WARM_UP_STEPS = 1
"""First steps of a process that no number comes from: they allocate."""

ROWS_PER_FORWARD = 16
"""Of the contenders that run on Trainer; the rest of a step is gradient accumulation."""

LORA: dict[str, Any] = {
    "r": 8,
    "lora_alpha": 32,
    "lora_dropout": 0.1,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}


@dataclass(frozen=True)
class Contender:
    """`env`: the environment it runs in (see envs.py), None for the one that runs the benchmark."""

    title: str
    env: str | None
    may_skip_checkpointing: bool = False


CONTENDERS = {
    "notebook": Contender("notebook recipe (Trainer, padding, checkpointing)", "hf"),
    "trl_sft": Contender("TRL 1.16.0 SFTTrainer", "hf", may_skip_checkpointing=True),
    "llamafactory": Contender("LLaMA-Factory 0.9.5", "lf", may_skip_checkpointing=True),
    "peft_sorted": Contender("plain PEFT, rows sorted by length, no checkpointing", "hf"),
    "truetune_run": Contender("truetune", None),
}


@dataclass(frozen=True)
class Shape:
    """A Qwen3 shape, and how it is measured: `rounds` times WARM_UP_STEPS and `steps` measured ones."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int = 8
    head_dim: int = 128
    vocab_size: int = 151936
    rows_per_step: int = 32
    contenders: tuple[str, ...] = tuple(CONTENDERS)
    rounds: int = 3
    steps: int = 2

    def linears(self) -> list[tuple[int, int]]:
        """Return (out, in) of the seven projections of a layer."""
        query, key = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        attention = [(query, self.hidden_size), *[(key, self.hidden_size)] * 2, (self.hidden_size, query)]
        gated = [(self.intermediate_size, self.hidden_size)] * 2
        return [*attention, *gated, (self.hidden_size, self.intermediate_size)]

    @property
    def layer_weights(self) -> int:
        """Weights in the projections of all layers."""
        return self.num_hidden_layers * sum(outputs * inputs for outputs, inputs in self.linears())

    @property
    def head_weights(self) -> int:
        """Weights of the head, which are those of the embedding."""
        return self.vocab_size * self.hidden_size


SHAPES = {
    "0.6b": Shape(1024, 3072, 28, 16),
    "4b": Shape(2560, 9728, 36, 32, rows_per_step=16, contenders=("truetune_run",), rounds=1, steps=6),
    # Not worth a number; it tries the benchmark itself in a minute or two.
    "tiny": Shape(64, 128, 2, 4, num_key_value_heads=2, head_dim=32, rounds=2, steps=1),
}


@dataclass(frozen=True)
class Job:
    """What one process is to do. `rows_file`: the rows in the order of the steps. `seed`: of that order.

    `steps_file`: a line of JSON is added for each step. `folder`: for whatever the contender writes.
    """

    contender: str
    shape: str
    model: str
    rows_file: str
    steps_file: str
    folder: str
    seed: int
    num_steps: int
    rows_per_step: int
    dtype: str
    is_checkpointed: bool

    @classmethod
    def from_command_line(cls) -> Job:
        """Return the job in the file that the only argument names."""
        return cls(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))

    def save(self, path: Path) -> None:
        """Write the job for `from_command_line`."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows: id, system, instruction, input, output."""
        rows: list[dict[str, Any]] = json.loads(Path(self.rows_file).read_text(encoding="utf-8"))
        return rows

    @property
    def accumulation(self) -> int:
        """Forwards of ROWS_PER_FORWARD rows in one step."""
        return self.rows_per_step // ROWS_PER_FORWARD

    def record(self, step: int, seconds: float, **more: Any) -> None:
        """Add the line of one step; `more` may replace the peak memory so far."""
        line = {"step": step, "seconds": seconds, "rows": self.rows_per_step, "peak_bytes": peak_bytes()} | more
        with Path(self.steps_file).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"contender": self.contender} | line) + "\n")


def peak_bytes() -> int:
    """Return the most memory this process has held at once, and the largest process that it started."""
    peak = sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    # Kilobytes everywhere but on macOS.
    return peak if sys.platform == "darwin" else peak * 1024
