"""Chinese texts of preference losses; see en_preference.py."""

TEXTS = {
    "field.loss": "学什么：sft（学回答）；或用 chosen 和 rejected 两个回答：dpo、ipo、orpo、simpo、kto。",
    "field.dpo_beta": "偏好的力度：dpo、simpo、kto 的 beta，ipo 的 tau，orpo 的 lambda（simpo 默认 2）。",
    "field.simpo_gamma": "SimPO 的 gamma：chosen 回答应领先多少（simpo 默认 1）。",
    "note.compared": "有 {count} 条偏好样本：{loss} 让 chosen 回答比 rejected 回答更可能出现。",
    "train.first_rejected": "它的 rejected 回答：",
    "train.eval_compared": "第 {step} 步：留出样本的损失 {loss}，偏好 chosen 的占 {accuracy}，差距 {margin}",
    "card.preferred": (
        "学到了偏好：在 {rows} 条{never_seen}样本上，{gained:.0%} 的 chosen 回答相对 rejected 有了提升，平均 "
        "{margin:.2f} nats；chosen 更可能出现的占 {after:.0%}（基座：{before:.0%}）。"
    ),
    "card.not_preferred": (
        "没有学到偏好：在 {rows} 条{never_seen}样本上，只有 {gained:.0%} 的 chosen 回答相对 rejected 有了提升，平均 "
        "{margin:.2f} nats。请增加步数或提高学习率，并检查两个回答的差别是否就是你想要的。"
    ),
    "card.never_seen": "没有见过的",
    "card.chosen_likelier": "chosen 回答比 rejected 更可能",
    "card.chosen_gained": "chosen 回答相对 rejected 有提升",
    "studio.rewards": "奖励",
    "studio.reward_chosen": "chosen 回答",
    "studio.reward_rejected": "rejected 回答",
    "studio.reward_accuracy": "偏好 chosen 的样本占比",
    "error.row_no_rejected": "loss: {loss} 要比较两个回答，这条只有一个",
    "fix.row_no_rejected": "请给出 chosen 和 rejected，或改用 loss: sft。",
    "error.row_two_prompts": "loss: {loss} 比较同一个提示的两个回答，这两个回答前面的对话不同",
    "fix.row_two_prompts": "请让 chosen 和 rejected 只在最后一轮不同。",
    "error.config_full_reference": "loss: {loss} 要与基座比较，而全参数微调会改变基座",
    "fix.config_full_reference": "请用 finetuning: lora，或不需要参考模型的损失：orpo、simpo。",
    "error.config_shard": "strategy: shard 不支持 {name}: {value}",
    "fix.config_shard": "请用 strategy: replicate。",
    "error.config_other_loss": "给了 {name}，但所选的 loss 用不到它",
    "fix.config_beta": "请删去它，或改用 loss: dpo、ipo、orpo、simpo 或 kto。",
    "fix.config_gamma": "请删去它，或改用 loss: simpo。",
    "error.config_kto_batch": "loss: kto 要把一步里的样本互相比较，而一步只有一条",
    "fix.config_kto_batch": "请把 batch_size 设为 2 或更大。",
    "error.preference_scaled": "样本超过 {limit:,} 个 token 时模型会缩放位置，最长的有 {longest:,} 个",
    "fix.preference_scaled": "请设 max_length: {limit}；一条样本的两个回答不能分别缩放。",
}
