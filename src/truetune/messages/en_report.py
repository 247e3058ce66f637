"""English texts of the report card, of `truetune eval` and of `truetune compare`."""

TEXTS = {
    "command.eval": "Measure a run or a model on given rows: loss, perplexity, token accuracy, answers.",
    "command.compare": "Show the answers of base and tuned model side by side.",
    "help.answers": "Write each row's prompt, given answer and the model's answer into FILE (JSON lines).",
    "help.compare_message": "A question to ask (may be given several times; otherwise held-out rows of the run).",
    "status.report": "Comparing with the base",
    "status.eval": "Measuring on {rows} rows",
    "status.answering": "Answering {count} prompts",
    "card.title": "Report: {name}",
    "card.learned": (
        "It learned: on {rows} rows that it never saw, the perplexity of the answers fell from {base[perplexity]:,.1f} "
        "to {tuned[perplexity]:,.1f} (loss {before:.3f} → {after:.3f} nats a token)."
    ),
    "card.learned_trained": (
        "On {rows} of the trained rows, the perplexity of the answers fell from {base[perplexity]:,.1f} to "
        "{tuned[perplexity]:,.1f}; no rows were held out, so this does not show whether it learned or memorised."
    ),
    "card.worse": (
        "It got worse: on {rows} rows the loss of the answers rose from {before:.3f} to {after:.3f} nats a token. "
        "Take a lower learning rate or fewer epochs, and look whether these rows are like the trained ones."
    ),
    "card.no_change": (
        "Nothing changed: on {rows} rows the loss of the answers went from {before:.3f} to {after:.3f} nats a token. "
        "Either the learning rate is too low, or the answers do not follow from the prompts."
    ),
    "card.no_change_known": (
        "Nothing changed: the base gives these answers already (loss {before:.3f} → {after:.3f} on {rows} rows)."
    ),
    "card.no_change_rate": (
        "Nothing changed (loss {before:.3f} → {after:.3f} on {rows} rows): the learning rate was at most {rate:.1e}, "
        "far below what LoRA needs. Take 1e-4 to 1e-3."
    ),
    "card.no_change_steps": (
        "Nothing changed (loss {before:.3f} → {after:.3f} on {rows} rows): there were only {steps} steps. "
        "Take more epochs or more rows."
    ),
    "card.manners": (
        "Of {num_answers} answers it ended {num_ended} by itself; what the base itself says to {num_questions} "
        "general questions went from loss {before:.2f} to {after:.2f}."
    ),
    "card.manners_forgetting": (
        "What the base itself says to {num_questions} general questions went from loss {before:.2f} to {after:.2f}."
    ),
    "card.overfit_rising": (
        "It memorises: the held-out loss was lowest at step {step} ({lowest:.3f}) and rose to {last:.3f}. "
        "Take fewer epochs, a lower learning rate or a smaller lora_r."
    ),
    "card.overfit_gap": (
        "It memorises: trained rows have loss {trained:.3f}, held-out rows {held_out:.3f}. "
        "Take fewer epochs or more rows."
    ),
    "card.never_stops": (
        "It does not stop: only {share:.0%} of its answers end by themselves (where an answer should end, stopping was "
        "the likeliest token in {likely:.0%}). Train longer, or look at the ends in truetune check --show 5."
    ),
    "card.repeats": (
        "It repeats itself: {share:.0%} of the token runs in its answers stood there before (base: {base:.0%}). "
        "Take fewer epochs or a lower learning rate, and look for repetition in the data."
    ),
    "card.forgot": (
        "It forgot: each token of what the base says to {questions} general questions is {times:,.1f} times less "
        "likely now. Take a lower learning rate or fewer epochs, or add general rows."
    ),
    "card.learned_title": "What was trained",
    "card.metrics_title": "Base against tuned",
    "card.curve_title": "Loss",
    "card.answers": "Answers",
    "card.base": "Base",
    "card.tuned": "Tuned",
    "card.expected": "Given in the data",
    "card.question": "Question",
    "card.rows_held_out": "On {count} rows that were not trained",
    "card.rows_trained": "On {count} of the trained rows (none were held out)",
    "card.rows_trained_too": "Tuned, on trained rows",
    "card.legend": "steps · line: trained rows · dots: held-out rows",
    "card.kind_best": "improved most",
    "card.kind_worst": "improved least",
    "card.kind_random": "drawn",
    "card.answer_title": "{kind} · {where} · loss {base_loss:.2f} → {tuned_loss:.2f}",
    "card.trained": "trained",
    "card.trained_value": "{num_rows:,} rows, {num_epochs:.3g} times; {num_learned_tokens:,} tokens learned in all",
    "card.steps": "steps",
    "card.steps_value": "{num_steps:,} in {minutes:.1f} min, learning rate at most {learning_rate:.1e}",
    "card.result": "adapter",
    "card.result_value": "that of step {step:,}",
    "card.overhead": "beside training",
    "card.overhead_value": "{overhead_share:.1%} of the time for evaluations, samples and this report",
    "card.loss": "loss, all learned tokens",
    "card.answer_loss": "loss, answers",
    "card.perplexity": "perplexity, answers",
    "card.template_loss": "loss, written by the template",
    "card.token_accuracy": "tokens it would have written",
    "card.stop_accuracy": "stops where the answer ends",
    "card.ended": "answers that ended by themselves",
    "card.repeated": "repetition in answers",
    "card.general_loss": "loss, the base's own answers to general questions",
    "card.metric": "measure",
    "card.value": "measured",
    "card.path": "Report: {path}",
    "eval.title": "{name} on {count} rows",
    "eval.answers": "Answers: {path}",
}
