"""English texts of preference losses: keys, faults, what a run and its report card say."""

TEXTS = {
    "field.loss": (
        "What is learned: sft (the answers), or of chosen and rejected answers dpo, ipo, orpo, simpo or kto."
    ),
    "field.dpo_beta": (
        "How far the rejected answer is pushed: beta of dpo, simpo and kto, ipo's tau, orpo's lambda (simpo: 2)."
    ),
    "field.simpo_gamma": "SimPO's gamma: the margin that the chosen answer is to have (simpo: 1).",
    "note.compared": "{count} rows are preference pairs: {loss} makes chosen answers likelier than rejected ones.",
    "train.first_rejected": "Its rejected answer:",
    "train.eval_compared": (
        "step {step}: held-out loss {loss}, chosen answers preferred in {accuracy}, margin {margin}"
    ),
    "card.preferred": (
        "It learned the preference: on {rows} rows{never_seen} the chosen answer gained on the rejected one "
        "in {gained:.0%}, by {margin:.2f} nats in the mean; it is the likelier one in {after:.0%} (base: "
        "{before:.0%})."
    ),
    "card.not_preferred": (
        "It did not learn the preference: on {rows} rows{never_seen} the chosen answer gained on the "
        "rejected one in {gained:.0%} only, by {margin:.2f} nats in the mean. Take more steps or a higher "
        "learning rate, and look whether the answers differ in what you want."
    ),
    "card.never_seen": " that it never saw",
    "card.chosen_likelier": "chosen answer likelier than the rejected one",
    "card.chosen_gained": "chosen answer gained on the rejected one",
    "studio.rewards": "rewards",
    "studio.reward_chosen": "chosen answers",
    "studio.reward_rejected": "rejected answers",
    "studio.reward_accuracy": "share of rows whose chosen answer is preferred",
    "error.row_no_rejected": "loss: {loss} compares two answers, and this row has one",
    "fix.row_no_rejected": "Give the row chosen and rejected, or take loss: sft.",
    "error.row_two_prompts": "loss: {loss} compares two answers to one prompt, and these follow other turns",
    "fix.row_two_prompts": "Let chosen and rejected differ in their last turn alone.",
    "error.config_full_reference": "loss: {loss} compares with the base, and full fine-tuning changes it",
    "fix.config_full_reference": "Take finetuning: lora, or a loss without a reference: orpo, simpo.",
    "error.config_shard": "strategy: shard cannot do {name}: {value}",
    "fix.config_shard": "Take strategy: replicate.",
    "error.config_other_loss": "{name} is given, but no loss that reads it",
    "fix.config_beta": "Remove it, or take loss: dpo, ipo, orpo, simpo or kto.",
    "fix.config_gamma": "Remove it, or take loss: simpo.",
    "error.config_kto_batch": "loss: kto compares the rows of a step with each other, and a step has one",
    "fix.config_kto_batch": "Take a batch_size of 2 or more.",
    "error.preference_scaled": (
        "the model scales positions for rows of more than {limit:,} tokens, and the longest has {longest:,}"
    ),
    "fix.preference_scaled": "Take max_length: {limit}; two answers of a row cannot be scaled apart.",
}
