"""English texts of the kinds of LoRA and of quantised bases; zh_kinds.py holds the same keys in the same order."""

from __future__ import annotations

TEXTS = {
    "field.use_rslora": "rsLoRA: LoRA's scale is lora_alpha / sqrt(lora_r), for high ranks.",
    "field.use_dora": "DoRA: direction and length of the weights are trained apart. Slower; helps at low ranks.",
    "field.lora_init": (
        "What LoRA starts at: default (nothing), pissa or olora (the main part of the base itself); pissa_niter_16 is "
        "pissa, found faster."
    ),
    "field.loraplus_lr_ratio": "LoRA+: the learning rate of B over that of A, at least 1 (16 is usual).",
    "field.quantization": "Keep the base in 4bit or 8bit (bitsandbytes): less memory, slower. None: as it is.",
    "preflight.gguf": (
        "The GGUF file has {file:.2f} GB; it is read dequantised, and its weights take {memory:.2f} GB as {kind}."
    ),
    "train.quantised": (
        "The base's weights take {held:.2f} GB as {kind}, measured; as bfloat16 they would take {plain:.2f} GB "
        "({share:.0%})."
    ),
    "train.rates_b": "LoRA+: B learns at {times:g} times that rate.",
    "use.quantised": "The base is kept as {kind}, as it was in training.",
    "merge.quantised": (
        "The adapter was trained on the base as {kind} and now stands on its full weights. From what was trained that "
        "is {kl:.1e} nats a token away; {same:.1%} of {tokens} tokens have the same likeliest token."
    ),
    "error.config_lora_init": "lora_init: {init} does not go with {name}",
    "fix.config_lora_init": (
        "Leave one of the two out: {init} starts at the main part of the base's own weights, which has no DoRA, may "
        "not be dropped, and has to be there in full."
    ),
    "error.lora_init_layer": "{name} is no linear layer, and only those have LoRA that starts at the base's weights",
    "fix.lora_init_layer": "Name linear layers in target_modules, or lora_init: default.",
    "error.lora_init_rank": "lora_r is {r}, and {name} has only {most} directions to start at",
    "fix.lora_init_rank": "Take a lora_r of at most {most}, or lora_init: default.",
    "error.quantised_twice": "the base is quantised already ({method}), and {kind} was asked for",
    "fix.quantised_twice": "Take the unquantised base of the same name, or leave quantization out.",
    "error.quantisation_machine": "bitsandbytes {version} has no code for this machine, so that {kind} cannot run",
    "fix.quantisation_machine": "Leave quantization out and take a smaller base, or train on another machine.",
    "error.quantisation_width": "{name} has rows of {width} weights: bitsandbytes reads back wrong ones in 4 bits",
    "fix.quantisation_width": "Take 8bit, or leave quantization out: 4 bits need rows of a multiple of 64.",
    "error.vllm_kind": "vLLM would not compute what was trained: {kind}",
    "fix.vllm_kind": "truetune merge RUN --output-dir DIR, and serve that folder; or leave out --engine.",
}
