"""TRL's preparation: what SFTTrainer does to its data before the first step; the tiny model's time is not counted."""

from __future__ import annotations

import json
import sys
import tempfile
import time

from datasets import Dataset, disable_progress_bars, load_dataset
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM
from trl import SFTConfig, SFTTrainer

from bench.contenders.trl_sft import to_example
from bench.recipe import MAX_LENGTH, peak_bytes


def main(path: str, tokenizer: str) -> None:
    """Prepare the rows and print what it took."""
    disable_progress_bars()
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = Qwen3Config(vocab_size=len(loaded), num_key_value_heads=1, head_dim=16, **sizes)
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(output_dir=folder, max_length=MAX_LENGTH, use_cpu=True, bf16=False, report_to="none")

        def prepare(data: Dataset) -> float:
            began = time.perf_counter()
            model = Qwen3ForCausalLM(config)
            SFTTrainer(model=model, args=arguments, train_dataset=data, processing_class=loaded)
            return time.perf_counter() - began

        one = {"system": "a", "instruction": "b", "input": "", "output": "c"}
        without = prepare(Dataset.from_list([to_example(one)]))
        began = time.perf_counter()
        data = load_dataset("json", data_files=path, split="train")
        data = data.map(to_example, remove_columns=data.column_names)
        loading = time.perf_counter() - began
        seconds = loading + prepare(data) - without
    sys.stdout.write(json.dumps({"seconds": seconds, "peak_bytes": peak_bytes(), "rows": len(data)}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
