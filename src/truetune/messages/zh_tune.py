"""Chinese texts of `truetune tune`."""

TEXTS = {
    "command.tune": "用短的试验，按留出损失搜索学习率和 LoRA 秩。",
    "help.trials": "最多试验几次（12）。",
    "help.timeout": "会超过这么多秒才结束的试验不再开始。",
    "help.rates": "要试的最低和最高学习率，写作 LOW,HIGH（默认 --learning-rate 的十分之一到十倍）。",
    "help.ranks": "要试的 LoRA 秩，写作 8,16,32（默认 8,16,32,64）；lora_alpha 按比例跟随。",
    "help.tune_resume": "继续 --output-dir 里的搜索；已结束的试验不重做。",
    "help.tune_output": "搜索的文件夹（runs/<数据>-<模型>-tune-NNN）。",
    "help.tune_steps": "每次试验的优化步数（默认 50；整个训练更短时取其步数）。",
    "tune.space": "搜索范围：学习率 {low:.3g} 到 {high:.3g}，秩 {ranks}。",
    "tune.first": (
        "第一次试验就是给定的配置：learning_rate {learning_rate:.3g}，lora_r {lora_r}，lora_alpha {lora_alpha}。"
    ),
    "tune.plan": (
        "{trials} 次试验，每次 {steps} 步，每步 {step_seconds:.2f} 秒：约 {minutes:,.1f} 分钟；提前放弃的会更短。"
    ),
    "tune.rows": "按 {total:,} 条留出样本中 {rows:,} 条的损失来评判。",
    "tune.budget": "{seconds:,.0f} 秒大约够 {trials} 次完整的试验。",
    "tune.budget_used": "{trials} 次试验之后，再来一次就不能在 {seconds:,.0f} 秒内结束。",
    "tune.resumed": "接着前 {trials} 次试验继续。",
    "tune.trial": "第 {number} 次试验，共 {trials} 次：learning_rate {learning_rate:.3g}，lora_r {lora_r}",
    "tune.ended": "试验 {number}：留出损失 {loss:.4f}（{seconds:.1f} 秒）",
    "tune.given_up": "试验 {number}：在第 {step} 步后放弃，当时损失 {loss:.4f}（{seconds:.1f} 秒）",
    "tune.broke": "试验 {number}：在第 {step} 步后失败：{problem}",
    "tune.complete": "完成",
    "tune.pruned": "提前放弃",
    "tune.failed": "失败",
    "tune.best": (
        "{trials} 次中最好的：learning_rate {learning_rate:.3g}，lora_r {lora_r}，lora_alpha {lora_alpha}，"
        "留出损失 {loss:.4f}。"
    ),
    "tune.given_best": "那就是给定的配置：试过的都不比它好。",
    "tune.given_failed": "给定的配置没有训练到头。",
    "tune.gain": (
        "给定的配置是 {given:.4f}：高出 {gain:.4f}（± {error:.4f}，由 {rows:,} 条样本逐条比较得出），超出噪声。"
    ),
    "tune.gain_noise": (
        "给定的配置是 {given:.4f}：高出 {gain:.4f}（± {error:.4f}，由 {rows:,} 条样本逐条比较得出）。"
        "这只是噪声：保持原来的配置，或用更多留出样本或步数再搜索。"
    ),
    "tune.close": "还有 {count} 次试验在这些样本上与最好的分不出高下。",
    "tune.caution": (
        "试验只有 {steps} 步；更长的训练可能要更低的学习率。"
        "从许多次里挑出的最好一次，在挑选它的样本上看来总比实际略好。"
    ),
    "tune.counts": "{pruned} 次试验提前放弃，{failed} 次失败。",
    "tune.path": "搜索结果：{path}",
    "tune.train": "用最好的配置训练：truetune train --config {path}",
    "tune.title": "搜索：{name}",
    "tune.scatter": "留出损失与学习率",
    "tune.legend": "小点：提前放弃。竖条：失败。圈：最好的。",
    "tune.rank": "秩：",
    "tune.best_mark": "最好的",
    "tune.curves": "留出损失与步数",
    "column.trial": "试验",
    "column.learning_rate": "学习率",
    "column.lora_r": "秩",
    "column.behind": "比最好的高",
    "column.seconds": "秒",
    "error.tune_no_held_out": "没有留出样本，而搜索正是看留出样本的损失",
    "fix.tune_no_held_out": "给出 --eval-data FILE，或让 --eval-split 大于 0 且样本不少于 32 条。",
    "error.tune_exists": "文件夹里已经有一次搜索",
    "error.tune_none": "文件夹里没有可以继续的搜索",
    "error.tune_changed": "搜索开始之后有改动，各次试验不再可比：{names}",
    "fix.tune_changed": "恢复原样，或在另一个文件夹重新搜索。",
    "error.tune_numbers": "“{value}” 不是这样的列表",
    "fix.tune_numbers": "写两个学习率，低的在前（--rates 1e-5,1e-3），或整数的秩（--ranks 8,16）。",
    "error.tune_not_fresh": "它开始时的留出损失是 {start}，而基座本身是 {base}",
    "fix.tune_not_fresh": "这是 Truetune 的错误，或内存有故障：请带上模型名报告。",
    "error.tune_all_failed": "没有一次试验训练到头（{count} 次失败或放弃）",
    "fix.tune_all_failed": "搜索更低的学习率：--rates 1e-6,1e-4。查看数据：truetune check。",
}
