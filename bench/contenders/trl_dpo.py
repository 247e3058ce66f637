"""TRL's DPOTrainer with its defaults but for the recipe's numbers; the reference is the base, adapter off."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer

from bench.contenders.clock import StepClock
from bench.contenders.trl_sft import arguments
from bench.recipe import LORA, Job

ROWS_PER_FORWARD = 8
"""Of two sequences each: as many sequences as the other contenders have in a forward."""


def to_example(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row as TRL's conversational preference."""
    return {
        "prompt": [{"role": "system", "content": row["system"]}, {"role": "user", "content": row["prompt"]}],
        "chosen": [{"role": "assistant", "content": row["chosen"]}],
        "rejected": [{"role": "assistant", "content": row["rejected"]}],
        "chat_template_kwargs": {"enable_thinking": False},
    }


def main(job: Job) -> None:
    """Take the job's steps."""
    trainer = DPOTrainer(
        model=job.model,
        args=DPOConfig(**arguments(job, ROWS_PER_FORWARD)),
        train_dataset=Dataset.from_list([to_example(row) for row in job.rows()]),
        peft_config=LoraConfig(task_type="CAUSAL_LM", **LORA),
        callbacks=[StepClock(job)],
    )
    trainer.train()


if __name__ == "__main__":
    main(Job.from_command_line())
