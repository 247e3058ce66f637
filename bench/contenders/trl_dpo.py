"""TRL's DPOTrainer with its defaults but for the recipe's numbers; the reference is the base, adapter off."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer

from bench.contenders.clock import StepClock
from bench.recipe import LEARNING_RATE, LORA, MAX_LENGTH, Job

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
    arguments = DPOConfig(
        output_dir=job.folder,
        per_device_train_batch_size=ROWS_PER_FORWARD,
        gradient_accumulation_steps=job.rows_per_step // ROWS_PER_FORWARD,
        learning_rate=LEARNING_RATE,
        max_length=MAX_LENGTH,
        bf16=job.dtype == "bfloat16",
        gradient_checkpointing=job.is_checkpointed,
        model_init_kwargs={"dtype": job.dtype},
        max_steps=job.num_steps,
        use_cpu=True,
        train_sampling_strategy="sequential",
        save_strategy="no",
        report_to="none",
    )
    trainer = DPOTrainer(
        model=job.model,
        args=arguments,
        train_dataset=Dataset.from_list([to_example(row) for row in job.rows()]),
        peft_config=LoraConfig(task_type="CAUSAL_LM", **LORA),
        callbacks=[StepClock(job)],
    )
    trainer.train()


if __name__ == "__main__":
    main(Job.from_command_line())
