"""TRL's SFTTrainer with its defaults but for the recipe's numbers: the loss on completions, bf16 where there is one."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from bench.contenders.clock import StepClock
from bench.recipe import LEARNING_RATE, LORA, MAX_LENGTH, ROWS_PER_FORWARD, Job


def to_example(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row as prompt and completion; the template writes the empty think block into the prompt."""
    return {
        "prompt": [
            {"role": "system", "content": row["system"]},
            {"role": "user", "content": row["instruction"] + row["input"]},
        ],
        "completion": [{"role": "assistant", "content": row["output"]}],
        "chat_template_kwargs": {"enable_thinking": False},
    }


def arguments(job: Job, rows_per_forward: int) -> dict[str, Any]:
    """Return what TRL's trainers are all told: the recipe's numbers, nothing saved or reported."""
    return {
        "output_dir": job.folder,
        "per_device_train_batch_size": rows_per_forward,
        "gradient_accumulation_steps": job.rows_per_step // rows_per_forward,
        "learning_rate": LEARNING_RATE,
        "max_length": MAX_LENGTH,
        "bf16": job.dtype == "bfloat16",
        "gradient_checkpointing": job.is_checkpointed,
        "model_init_kwargs": {"dtype": job.dtype},
        "max_steps": job.num_steps,
        "use_cpu": True,
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "report_to": "none",
    }


def main(job: Job) -> None:
    """Take the job's steps."""
    trainer = SFTTrainer(
        model=job.model,
        args=SFTConfig(**arguments(job, ROWS_PER_FORWARD)),
        train_dataset=Dataset.from_list([to_example(row) for row in job.rows()]),
        peft_config=LoraConfig(task_type="CAUSAL_LM", **LORA),
        callbacks=[StepClock(job)],
    )
    trainer.train()


if __name__ == "__main__":
    main(Job.from_command_line())
