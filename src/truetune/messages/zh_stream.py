"""Chinese texts of streamed data."""

TEXTS = {
    "field.streaming": "边读边检查边学，用于比内存大的数据；需要 max_steps。",
    "field.shuffle_rows": "流式数据：一起读入并打乱的样本数。",
    "note.streaming": (
        "流式：以上是前 {rows:,} 条样本。其余的边读边检查边学，在 {buffer:,} 条之内打乱；整个流中的完全重复无法识别。"
    ),
    "train.stream_refused": "流中至今没有训练的样本：{count:,} 条；见 {path}",
    "error.stream_max_steps": "流的长度未知，又没有给出 max_steps",
    "fix.stream_max_steps": "给出 --max-steps N：学习率曲线需要它。",
    "error.stream_key": "{name} 不能用于流式数据",
    "fix.stream_key": "去掉 {name}，或去掉 streaming，先准备好全部样本。",
    "error.stream_refused": "流中有 {count} 条样本不能用；前一步的状态已保存",
    "fix.stream_refused": (
        "改好后重新开始，或跳过它们继续：--invalid skip --resume --allow-changed --output-dir RUN。"
    ),
    "error.row_apart": "它的提示与留出样本相同，因此不训练",
    "fix.row_apart": "无需处理；或用 eval_data 给出评估样本。",
    "error.stream_changed": "流式读取的文件已不是原来的，或被动过",
    "fix.stream_changed": "恢复文件及其修改时间，或在另一个文件夹重新训练。",
    "error.tune_stream": "搜索不能用流式数据：它要反复用同样的样本",
    "fix.tune_stream": "给它一部分样本，并去掉 streaming。",
}
