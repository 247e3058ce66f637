"""The well-known notebook recipe, as it is written: prompt and answer tokenised apart, glued, cut and padded."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, TaskType, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from bench.contenders.clock import StepClock
from bench.recipe import LEARNING_RATE, LORA, MAX_LENGTH, ROWS_PER_FORWARD, Job


def encode(row: dict[str, Any], tokenizer: Any) -> dict[str, list[int]]:
    """Return input ids, attention mask and labels of one row. "<s>" is the recipe's own and no token of Qwen3."""
    prompt = tokenizer(
        f"<s><|im_start|>system\n{row['system']}<|im_end|>\n"
        f"<|im_start|>user\n{row['instruction'] + row['input']}<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n",
        add_special_tokens=False,
    )
    answer = tokenizer(row["output"], add_special_tokens=False)
    ids = prompt["input_ids"] + answer["input_ids"] + [tokenizer.pad_token_id]
    mask = prompt["attention_mask"] + answer["attention_mask"] + [1]
    labels = [-100] * len(prompt["input_ids"]) + answer["input_ids"] + [tokenizer.pad_token_id]
    return {"input_ids": ids[:MAX_LENGTH], "attention_mask": mask[:MAX_LENGTH], "labels": labels[:MAX_LENGTH]}


def main(job: Job) -> None:
    """Take the job's steps."""
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    data = Dataset.from_list([encode(row, tokenizer) for row in job.rows()])
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=getattr(torch, job.dtype))
    model.enable_input_require_grads()
    model = get_peft_model(model, LoraConfig(task_type=TaskType.CAUSAL_LM, inference_mode=False, **LORA))
    arguments = TrainingArguments(
        output_dir=job.folder,
        per_device_train_batch_size=ROWS_PER_FORWARD,
        gradient_accumulation_steps=job.accumulation,
        logging_steps=10,
        learning_rate=LEARNING_RATE,
        gradient_checkpointing=True,
        # For the benchmark: a few steps in the given order, and nothing written.
        max_steps=job.num_steps,
        use_cpu=True,
        train_sampling_strategy="sequential",
        save_strategy="no",
        report_to="none",
    )
    collator = DataCollatorForSeq2Seq(tokenizer=tokenizer, padding=True)
    trainer = Trainer(
        model=model, args=arguments, train_dataset=data, data_collator=collator, callbacks=[StepClock(job)]
    )
    trainer.train()


if __name__ == "__main__":
    main(Job.from_command_line())
