"""LLaMA-Factory by its own entry point, with a clock among its callbacks."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

from bench.recipe import LEARNING_RATE, LORA, MAX_LENGTH, ROWS_PER_FORWARD, Job


def stand_in_for_torchaudio() -> None:
    """Let LLaMA-Factory, which imports torchaudio for audio data, start without it (see requirements-lf.txt)."""
    if importlib.util.find_spec("torchaudio") is None:
        spec = importlib.machinery.ModuleSpec("torchaudio", loader=None)
        sys.modules["torchaudio"] = importlib.util.module_from_spec(spec)


def write_data(job: Job, folder: Path) -> None:
    """Write the rows in the Alpaca format, and the list of data sets that names them."""
    columns = {"prompt": "instruction", "query": "input", "response": "output", "system": "system"}
    info = {"rows": {"file_name": "rows.json", "columns": columns}}
    (folder / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    (folder / "rows.json").write_text(json.dumps(job.rows(), ensure_ascii=False), encoding="utf-8")


def arguments(job: Job) -> dict[str, Any]:
    """Return what would stand in LLaMA-Factory's YAML file."""
    return {
        "model_name_or_path": job.model,
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_rank": LORA["r"],
        "lora_alpha": LORA["lora_alpha"],
        "lora_dropout": LORA["lora_dropout"],
        "lora_target": ",".join(LORA["target_modules"]),
        "dataset": "rows",
        "dataset_dir": job.folder,
        "template": "qwen3",
        "enable_thinking": False,
        "cutoff_len": MAX_LENGTH,
        "per_device_train_batch_size": ROWS_PER_FORWARD,
        "gradient_accumulation_steps": job.accumulation,
        "learning_rate": LEARNING_RATE,
        "bf16": job.dtype == "bfloat16",
        "disable_gradient_checkpointing": not job.is_checkpointed,
        "disable_shuffling": True,
        "max_steps": job.num_steps,
        "use_cpu": True,
        "output_dir": str(Path(job.folder) / "out"),
        "save_strategy": "no",
        "report_to": "none",
    }


def main(job: Job) -> None:
    """Take the job's steps."""
    stand_in_for_torchaudio()
    from llamafactory.train.tuner import run_exp

    from bench.contenders.clock import StepClock

    write_data(job, Path(job.folder))
    run_exp(arguments(job), callbacks=[StepClock(job)])


if __name__ == "__main__":
    main(Job.from_command_line())
