"""Chinese texts of the kinds of LoRA and of quantised bases; en_kinds.py holds the same keys in the same order."""

from __future__ import annotations

TEXTS = {
    "field.use_rslora": "rsLoRA：LoRA 的缩放为 lora_alpha / sqrt(lora_r)，适合较大的秩。",
    "field.use_dora": "DoRA：分开训练权重的方向和长度。较慢；秩较小时有帮助。",
    "field.lora_init": (
        "LoRA 从哪里开始：default（从零开始）、pissa 或 olora（从基座自身的主要部分开始）；"
        "pissa_niter_16 是更快算出的 pissa。"
    ),
    "field.loraplus_lr_ratio": "LoRA+：B 的学习率与 A 的学习率之比，至少为 1（常用 16）。",
    "field.quantization": "基座权重以 4bit 或 8bit 保存在内存里（bitsandbytes）：省内存，较慢；不量化就不写。",
    "preflight.gguf": "GGUF 文件有 {file:.2f} GB；读入时会反量化，权重以 {kind} 占 {memory:.2f} GB 内存。",
    "train.quantised": "基座权重以 {kind} 占 {held:.2f} GB（实测）；用 bfloat16 要占 {plain:.2f} GB（{share:.0%}）。",
    "train.rates_b": "LoRA+：B 的学习率是它的 {times:g} 倍。",
    "use.quantised": "基座以 {kind} 保存，与训练时相同。",
    "merge.quantised": (
        "适配器是在 {kind} 的基座上训练的，现在加在完整权重上。与训练时的模型相比，每 token 相差 {kl:.1e} nats；"
        "{tokens} 个 token 中，最可能 token 相同的占 {same:.1%}。"
    ),
    "error.config_lora_init": "lora_init: {init} 不能与 {name} 一起用",
    "fix.config_lora_init": (
        "请去掉其中一个：{init} 从基座权重的主要部分开始，没有 DoRA，不能随机丢弃，也需要完整的权重。"
    ),
    "error.lora_init_layer": "{name} 不是线性层：从基座权重开始的 LoRA 只能加在线性层上",
    "fix.lora_init_layer": "请在 target_modules 里只写线性层，或用 lora_init: default。",
    "error.lora_init_rank": "lora_r 是 {r}，而 {name} 只有 {most} 个方向可以作为起点",
    "fix.lora_init_rank": "请把 lora_r 设为最多 {most}，或用 lora_init: default。",
    "error.quantised_twice": "基座本身已经量化（{method}），又要求 {kind}",
    "fix.quantised_twice": "请换成同名的未量化基座，或去掉 quantization。",
    "error.quantisation_machine": "bitsandbytes {version} 没有适合这台机器的代码，无法使用 {kind}",
    "fix.quantisation_machine": "请去掉 quantization 并换一个较小的基座，或换一台机器训练。",
    "error.quantisation_width": "{name} 每行有 {width} 个权重：bitsandbytes 用 4 位时会读回错误的权重",
    "fix.quantisation_width": "请用 8bit，或去掉 quantization：4 位要求每行是 64 的倍数。",
    "error.vllm_kind": "vLLM 算出的不会是训练的结果：{kind}",
    "fix.vllm_kind": "请先 truetune merge RUN --output-dir DIR，再对外服务那个文件夹；或去掉 --engine。",
}
