"""Chinese texts of the report card, of `truetune eval` and of `truetune compare`."""

TEXTS = {
    "command.eval": "在给定数据上测量一次训练或一个模型：损失、困惑度、 token 准确率、回答。",
    "command.compare": "并排显示基座和微调后模型的回答。",
    "help.answers": "把每行的提问、数据中的回答和模型的回答写入 FILE（JSON lines）。",
    "help.compare_message": "要问的问题（可多次给出；不给则用该次训练的留出样本）。",
    "status.report": "正在与基座比较",
    "status.eval": "正在 {rows} 条样本上测量",
    "status.answering": "正在回答 {count} 个提问",
    "card.title": "报告：{name}",
    "card.learned": (
        "学会了：在 {rows} 条它从未见过的样本上，回答的困惑度从 {base[perplexity]:,.1f} 降到 "
        "{tuned[perplexity]:,.1f}（每个 token 的损失 {before:.3f} → {after:.3f}）。"
    ),
    "card.learned_trained": (
        "在 {rows} 条训练样本上，回答的困惑度从 {base[perplexity]:,.1f} 降到 {tuned[perplexity]:,.1f}；"
        "没有留出样本，所以看不出是学会了还是背下来了。"
    ),
    "card.worse": (
        "变差了：在 {rows} 条样本上，回答的损失从每 token {before:.3f} 升到 {after:.3f}。"
        "请降低学习率或减少轮数，并看看这些数据与训练样本是否相似。"
    ),
    "card.no_change": (
        "没有变化：在 {rows} 条样本上，回答的损失从每 token {before:.3f} 到 {after:.3f}。"
        "要么学习率太低，要么从提问推不出回答。"
    ),
    "card.no_change_known": "没有变化：基座本来就这样回答（{rows} 条样本，损失 {before:.3f} → {after:.3f}）。",
    "card.no_change_rate": (
        "没有变化（{rows} 条样本，损失 {before:.3f} → {after:.3f}）：学习率最高只有 {rate:.1e}，"
        "远低于 LoRA 所需。请用 1e-4 到 1e-3。"
    ),
    "card.no_change_steps": (
        "没有变化（{rows} 条样本，损失 {before:.3f} → {after:.3f}）：只训练了 {steps} 步。请增加轮数或数据。"
    ),
    "card.manners": (
        "{num_answers} 个回答中有 {num_ended} 个自己结束；基座对 {num_questions} 个常识问题原来的回答，"
        "损失从 {before:.2f} 变为 {after:.2f}。"
    ),
    "card.manners_forgetting": ("基座对 {num_questions} 个常识问题原来的回答，损失从 {before:.2f} 变为 {after:.2f}。"),
    "card.overfit_rising": (
        "开始死记：留出样本的损失在第 {step} 步最低（{lowest:.3f}），之后升到 {last:.3f}。"
        "请减少轮数、降低学习率或减小 lora_r。"
    ),
    "card.overfit_gap": (
        "开始死记：训练样本的损失为 {trained:.3f}，留出样本的为 {held_out:.3f}。请减少轮数或增加数据。"
    ),
    "card.never_stops": (
        "不会停：只有 {share:.0%} 的回答自己结束（在该结束处，最可能的 token 是结束符的占 {likely:.0%}）。"
        "请多训练一些，或用 truetune check --show 5 看看回答的结尾。"
    ),
    "card.repeats": (
        "重复自己：回答中 {share:.0%} 的 token 片段前面已出现过（基座：{base:.0%}）。"
        "请减少轮数或降低学习率，并检查数据中的重复。"
    ),
    "card.forgot": (
        "有遗忘：基座对 {questions} 个常识问题原来的回答，每个 token 的可能性现在降到 1/{times:,.1f}。"
        "请降低学习率、减少轮数，或加入一些通用数据。"
    ),
    "card.learned_title": "训练了什么",
    "card.metrics_title": "基座与微调后",
    "card.curve_title": "损失",
    "card.answers": "回答",
    "card.base": "基座",
    "card.tuned": "微调后",
    "card.expected": "数据中的回答",
    "card.question": "提问",
    "card.rows_held_out": "在 {count} 条未训练的样本上",
    "card.rows_trained": "在 {count} 条训练样本上（没有留出样本）",
    "card.rows_trained_too": "微调后，训练样本",
    "card.legend": "步 · 线：训练样本 · 点：留出样本",
    "card.kind_best": "进步最大",
    "card.kind_worst": "进步最小",
    "card.kind_random": "抽取",
    "card.answer_title": "{kind} · {where} · 损失 {base_loss:.2f} → {tuned_loss:.2f}",
    "card.trained": "训练",
    "card.trained_value": "{num_rows:,} 条样本，{num_epochs:.3g} 遍；共学习 {num_learned_tokens:,} 个 token",
    "card.steps": "步数",
    "card.steps_value": "{num_steps:,} 步，{minutes:.1f} 分钟，学习率最高 {learning_rate:.1e}",
    "card.result": "适配器",
    "card.result_value": "第 {step:,} 步的",
    "card.overhead": "训练之外",
    "card.overhead_value": "评估、示例回答和本报告占用时间的 {overhead_share:.1%}",
    "card.loss": "损失，全部学习的 token",
    "card.answer_loss": "损失，回答",
    "card.perplexity": "困惑度，回答",
    "card.template_loss": "损失，模板写的部分",
    "card.token_accuracy": "会写出的 token",
    "card.stop_accuracy": "在回答结尾处停下",
    "card.ended": "自己结束的回答",
    "card.repeated": "回答中的重复",
    "card.general_loss": "损失，基座对常识问题原来的回答",
    "card.metric": "指标",
    "card.value": "测量值",
    "card.path": "报告：{path}",
    "eval.title": "{name}，{count} 条样本",
    "eval.answers": "回答：{path}",
}
