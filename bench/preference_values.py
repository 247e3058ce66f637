"""TRL's own preference losses and gradients of a small case, for the tests: written to tests/assets.

    python -m bench.preference_values       a minute, after the environment `hf` is there

Starts itself again in TRL's environment. Each value is a trainer's own: its collator makes the batch of all rows, its
loss function computes it, backward gives the gradient. What it saw as token ids is written, too.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from typing import Any

from bench.envs import python_of
from bench.recipe import ROOT

PACKAGES = ("trl", "transformers", "peft", "torch")


def main() -> None:
    """Compute where TRL is, else start the program that does."""
    if "--here" not in sys.argv:
        words = [str(python_of("hf")), "-m", "bench.preference_values", "--here"]
        sys.exit(subprocess.run(words, cwd=ROOT, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, check=False).returncode)
    from tests import preference_case as case

    found = [values(one, getattr(case, one["rows"])) for one in case.CASES]
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    text = json.dumps({"versions": versions, "cases": found}, indent=None, separators=(",", ":"))
    case.FIXTURE.write_text(text.replace('{"loss"', '\n{"loss"') + "\n", encoding="utf-8")


def values(case: dict[str, Any], rows: Any) -> dict[str, Any]:
    """Return a case with its ids, value, rewards and gradients."""
    from tests import preference_case

    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(case, rows, folder)
        model = trainer.model.train()
        preference_case.fill_lora(model)
        # Not a loader's batch: of one that shuffles, the order would be another one.
        batch = trainer.data_collator([trainer.train_dataset[number] for number in range(len(trainer.train_dataset))])
        if case["loss"] in ("orpo", "simpo"):
            loss, told = trainer.get_batch_loss_metrics(model, batch, train_eval="train")
        else:
            loss = trainer._compute_loss(model, batch, False)
            told = {name: found[-1] for name, found in trainer._metrics["train"].items()}
        loss.backward()
    gradients = {
        name: weight.grad.flatten().tolist() for name, weight in model.named_parameters() if weight.requires_grad
    }
    rewards = {name: float(value) for name, value in told.items() if name.startswith("rewards/") or name == "kl"}
    return {**case, "pairs": pairs_of(batch), "value": loss.item(), "told": rewards, "gradients": gradients}


def make_trainer(case: dict[str, Any], rows: Any, folder: str) -> Any:
    """Return TRL's trainer of the case, with a fresh adapter on the base."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    from tests import preference_case

    trainers = {
        "dpo": (DPOConfig, DPOTrainer, {"loss_type": "sigmoid"}),
        "ipo": (DPOConfig, DPOTrainer, {"loss_type": "ipo"}),
        "orpo": (ORPOConfig, ORPOTrainer, {}),
        # TRL's page on SimPO: loss_type simpo and cpo_alpha 0.
        "simpo": (CPOConfig, CPOTrainer, {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": case["gamma"]}),
        "kto": (KTOConfig, KTOTrainer, {}),
    }
    configuration, trainer, more = trainers[case["loss"]]
    texts = [{"prompt": words(p), "chosen": " " + words(c), "rejected": " " + words(r)} for p, c, r in rows]
    arguments = configuration(
        output_dir=folder,
        beta=case["beta"],
        per_device_train_batch_size=2 * len(rows) if case["loss"] == "kto" else len(rows),
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
        max_length=64,
        **more,
    )
    return trainer(
        model=preference_case.make_model(),
        args=arguments,
        train_dataset=Dataset.from_list(texts),
        processing_class=make_tokenizer(),
        peft_config=LoraConfig(task_type="CAUSAL_LM", **preference_case.LORA),
    )


def make_tokenizer() -> Any:
    """Return a tokenizer of words: w7 is token 7."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from tests.preference_case import NUM_WORDS

    vocabulary = {"<pad>": 0, "<stop>": 1} | {f"w{number}": number for number in range(2, NUM_WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<stop>")


def words(ids: Any) -> str:
    """Return ids as the text that the tokenizer makes them of."""
    return " ".join(f"w{number}" for number in ids)


def pairs_of(batch: Any) -> list[list[list[int]]]:
    """Return [prompt ids, answer ids] of each sequence of a batch: chosen ones first, then rejected ones."""
    if "completion_mask" in batch:
        sides = [(batch["input_ids"], batch["attention_mask"], batch["completion_mask"])]
    else:
        sides = [
            (batch[f"{side}_input_ids"], batch[f"{side}_attention_mask"], batch[f"{side}_labels"] != -100)
            for side in ("chosen", "rejected")
        ]
    return [
        [row[known.bool() & ~learned.bool()].tolist(), row[learned.bool()].tolist()]
        for ids, is_known, is_learned in sides
        for row, known, learned in zip(ids, is_known, is_learned, strict=True)
    ]


if __name__ == "__main__":
    main()
