"""English texts of `truetune tune`."""

TEXTS = {
    "command.tune": "Search for a learning rate and LoRA rank by held-out loss, with short trials.",
    "help.trials": "Trials at most (12).",
    "help.timeout": "Begin no trial that would end later than this, in seconds.",
    "help.rates": "Lowest and highest learning rate to try, as LOW,HIGH (a tenth to ten times --learning-rate).",
    "help.ranks": "LoRA ranks to try, as 8,16,32 (8,16,32,64); lora_alpha stays in proportion.",
    "help.tune_resume": "Go on with the search in --output-dir; trials that ended are not repeated.",
    "help.tune_output": "Folder of the search (runs/<data>-<model>-tune-NNN).",
    "help.tune_steps": "Optimizer steps of a trial (50, or the whole run if that is shorter).",
    "tune.space": "Searched: learning rates from {low:.3g} to {high:.3g}, ranks {ranks}.",
    "tune.first": (
        "The first trial is the configuration as given: learning_rate {learning_rate:.3g}, lora_r {lora_r}, "
        "lora_alpha {lora_alpha}."
    ),
    "tune.plan": (
        "{trials} trials of {steps} steps, {step_seconds:.2f} s a step: about {minutes:,.1f} minutes; less where "
        "trials are given up early."
    ),
    "tune.rows": "Judged by the loss on {rows:,} of {total:,} held-out rows.",
    "tune.budget": "{seconds:,.0f} s are enough for about {trials} whole trials.",
    "tune.budget_used": "After {trials} trials another one would not end within {seconds:,.0f} s.",
    "tune.resumed": "Going on after {trials} trials.",
    "tune.trial": "Trial {number} of {trials}: learning_rate {learning_rate:.3g}, lora_r {lora_r}",
    "tune.ended": "trial {number}: held-out loss {loss:.4f} ({seconds:.1f} s)",
    "tune.given_up": "trial {number}: given up after step {step}, at {loss:.4f} ({seconds:.1f} s)",
    "tune.broke": "trial {number}: failed after step {step}: {problem}",
    "tune.complete": "complete",
    "tune.pruned": "given up",
    "tune.failed": "failed",
    "tune.best": (
        "Best of {trials}: learning_rate {learning_rate:.3g}, lora_r {lora_r}, lora_alpha {lora_alpha}, "
        "held-out loss {loss:.4f}."
    ),
    "tune.given_best": "That is the configuration as given: nothing that was tried is better.",
    "tune.given_failed": "The configuration as given did not come to its end.",
    "tune.gain": (
        "The configuration as given came to {given:.4f}: {gain:.4f} more (± {error:.4f}, from row to row of {rows:,}), "
        "which is more than noise."
    ),
    "tune.gain_noise": (
        "The configuration as given came to {given:.4f}: {gain:.4f} more (± {error:.4f}, from row to row of {rows:,}). "
        "That is noise: keep what you have, or search with more held-out rows or steps."
    ),
    "tune.close": "{count} more trials cannot be told from the best on these rows.",
    "tune.caution": (
        "The trials took {steps} steps; a longer run may want a lower rate. The best of many looks a little better on "
        "the rows that chose it than it is."
    ),
    "tune.counts": "{pruned} trials were given up early, {failed} failed.",
    "tune.path": "The search: {path}",
    "tune.train": "Train with the best: truetune train --config {path}",
    "tune.title": "Search: {name}",
    "tune.scatter": "Held-out loss over learning rate",
    "tune.legend": "Small: given up early. Bar: failed. Rim: the best.",
    "tune.rank": "Rank:",
    "tune.best_mark": "the best",
    "tune.curves": "Held-out loss over steps",
    "column.trial": "Trial",
    "column.learning_rate": "Learning rate",
    "column.lora_r": "Rank",
    "column.behind": "Behind the best",
    "column.seconds": "Seconds",
    "error.tune_no_held_out": "no rows are held out, and they are what a search looks at",
    "fix.tune_no_held_out": "Give --eval-data FILE, or an --eval-split above 0 and at least 32 rows.",
    "error.tune_exists": "the folder holds a search already",
    "error.tune_none": "the folder holds no search to continue",
    "error.tune_changed": "changed since the search began, so that its trials could not be compared: {names}",
    "fix.tune_changed": "Put it back as it was, or begin a new search in another folder.",
    "error.tune_numbers": '"{value}" is no such list',
    "fix.tune_numbers": "Write two rates, the lower first (--rates 1e-5,1e-3), or whole ranks (--ranks 8,16).",
    "error.tune_not_fresh": "it began at a held-out loss of {start}; the base's own is {base}",
    "fix.tune_not_fresh": "This is a bug of Truetune, or memory is failing: report it with the model's name.",
    "error.tune_all_failed": "no trial came to its end ({count} failed or were given up)",
    "fix.tune_all_failed": "Search lower learning rates: --rates 1e-6,1e-4. Look at the rows: truetune check.",
}
