"""English texts of full fine-tuning and of training on plain text, faults included."""

TEXTS = {
    "field.finetuning": (
        "What is trained: lora (small matrices beside the weights) or full (every weight; 16 to 18 bytes of memory "
        "each; learning_rate is then 1e-5 by default, since whole weights need to move far less than LoRA's)."
    ),
    "note.full": (
        "Full fine-tuning needs {gigabytes:.1f} GB at least: {each} bytes for each of {count:,} weights "
        "(weight, gradient and AdamW's two moments in fp32); activations come on top."
    ),
    "note.full_copy": (
        "Full fine-tuning needs {gigabytes:.1f} GB at least: {each} bytes for each of {count:,} weights "
        "(weight, gradient and AdamW's two moments in fp32, and a bfloat16 copy to compute with); activations come "
        "on top."
    ),
    "note.texts": (
        "{count} texts without turns: all of their tokens are learned, and at the end {stop}; no text sees another one."
    ),
    "note.pieces": (
        "{texts} texts are longer than max_length ({max_length}): split into {pieces} pieces, each a row of its own. "
        "Up to {overlap} tokens before each piece are read again and not learned again: every token is learned once."
    ),
    "train.full_disk": (
        "Checkpoints: {each:.1f} GB each (three times the weights: fp32 weights and AdamW's two moments), at most "
        "{count} at a time; {total:.1f} GB with the result."
    ),
    "diagnosis.learning_rate_full": (
        "Learning rate {rate:g} is far from what full fine-tuning usually needs (5e-6 to 5e-5)."
    ),
    "card.no_change_rate_full": (
        "Nothing changed (loss {before:.3f} → {after:.3f} on {rows} rows): the learning rate was at most {rate:.1e}, "
        "far below what full fine-tuning needs. Take 5e-6 to 5e-5."
    ),
    "error.config_not_lora": "{name} is LoRA's, and finetuning is full: there is no LoRA",
    "fix.config_not_lora": "Remove {name}, or finetuning: full.",
    "fix.data_text_large": "Divide it into several files; what follows the end of one is not learned anyway.",
    "error.full_too_large": (
        "full fine-tuning needs {needed:.1f} GB at least as {dtype} ({each} bytes a weight), {free:.1f} GB are free"
    ),
    "fix.full_too_large": "Train LoRA (--finetuning lora), or take a smaller model.",
    "error.disk_too_small": "all checkpoints and the result need {needed:.1f} GB, {free:.1f} GB are there",
    "fix.disk_too_small": "Keep fewer (--save-total-limit 1), or write elsewhere: --output-dir.",
    "error.merge_full": "all weights were trained: there is no adapter; the whole model is in {folder}",
    "fix.merge_full": "Use {folder} as it is, in any tool, or truetune export --to gguf.",
    "error.studio_no_base": "only the result of full fine-tuning is served, not its base",
    "fix.studio_no_base": "Compare both with: truetune compare {name}",
}
