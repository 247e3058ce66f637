"""Chinese texts of full fine-tuning and of training on plain text, faults included."""

TEXTS = {
    "field.finetuning": (
        "训练什么：lora（权重旁边的小矩阵）或 full（全部权重，每个权重占 16 到 18 字节内存；"
        "此时 learning_rate 默认为 1e-5，因为整个权重需要移动的幅度远小于 LoRA）。"
    ),
    "note.full": (
        "全参数微调至少需要 {gigabytes:.1f} GB：{count:,} 个权重，每个 {each} 字节"
        "（fp32 的权重、梯度和 AdamW 的两个动量）；激活值另计。"
    ),
    "note.full_copy": (
        "全参数微调至少需要 {gigabytes:.1f} GB：{count:,} 个权重，每个 {each} 字节"
        "（fp32 的权重、梯度和 AdamW 的两个动量，以及用来计算的 bfloat16 副本）；激活值另计。"
    ),
    "note.texts": "{count} 条纯文本（没有对话轮次）：学习其中全部 token，并在末尾学习 {stop}；文本之间互不可见。",
    "note.pieces": (
        "{texts} 条文本超过 max_length（{max_length}）：切成 {pieces} 段，每段算一条样本。"
        "每段之前最多 {overlap} 个 token 会再读一遍但不再学习：每个 token 恰好学习一次。"
    ),
    "train.full_disk": (
        "检查点：每个 {each:.1f} GB（权重的三倍：fp32 权重和 AdamW 的两个动量），同时最多 {count} 个；"
        "连同结果共 {total:.1f} GB。"
    ),
    "diagnosis.learning_rate_full": "学习率 {rate:g} 与全参数微调通常需要的（5e-6 到 5e-5）相差很远。",
    "card.no_change_rate_full": (
        "没有变化（{rows} 条样本，损失 {before:.3f} → {after:.3f}）：学习率最高只有 {rate:.1e}，"
        "远低于全参数微调所需。请用 5e-6 到 5e-5。"
    ),
    "error.config_not_lora": "{name} 只属于 LoRA，而 finetuning 是 full：没有 LoRA",
    "fix.config_not_lora": "去掉 {name}，或去掉 finetuning: full。",
    "fix.data_text_large": "请分成几个文件；文件结尾之后的内容本来就不会连着学。",
    "error.full_too_large": (
        "以 {dtype} 全参数微调至少需要 {needed:.1f} GB（每个权重 {each} 字节），空闲 {free:.1f} GB"
    ),
    "fix.full_too_large": "改用 LoRA（--finetuning lora），或换更小的模型。",
    "error.disk_too_small": "全部检查点和结果需要 {needed:.1f} GB，这里只有 {free:.1f} GB",
    "fix.disk_too_small": "少留几个（--save-total-limit 1），或写到别处：--output-dir。",
    "error.merge_full": "训练的是全部权重：没有适配器；完整的模型在 {folder}",
    "fix.merge_full": "任何工具都可以直接使用 {folder}，也可以用 truetune export --to gguf 导出。",
    "error.studio_no_base": "全参数微调只提供训练结果的服务，不提供基座",
    "fix.studio_no_base": "对比两者：truetune compare {name}",
}
