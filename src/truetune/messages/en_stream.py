"""English texts of streamed data."""

TEXTS = {
    "field.streaming": "Read, check and learn rows as they come, for data larger than memory; needs max_steps.",
    "field.shuffle_rows": "Of streamed data: rows that are read together and shuffled.",
    "note.streaming": (
        "Streamed: these are the first {rows:,} rows. The others are read, checked and learned as they come, shuffled "
        "within {buffer:,} rows; exact duplicates cannot be told over the whole stream."
    ),
    "train.stream_refused": "Rows of the stream that were not trained so far: {count:,}; see {path}",
    "error.stream_max_steps": "a stream has no known length, and max_steps is not given",
    "fix.stream_max_steps": "Give --max-steps N: the learning rate's curve needs it.",
    "error.stream_key": "{name} is not for streamed data",
    "fix.stream_key": "Leave {name} out, or leave out streaming, so that all rows are prepared first.",
    "error.stream_refused": "{count} rows of the stream cannot be used; the state of the step before is saved",
    "fix.stream_refused": (
        "Mend them and begin anew, or go on without them: --invalid skip --resume --allow-changed --output-dir RUN."
    ),
    "error.row_apart": "its prompt is that of a held-out row, so it is not trained",
    "fix.row_apart": "Nothing to do; or give rows to evaluate on by eval_data.",
    "error.stream_changed": "the files that were streamed are others now, or were touched",
    "fix.stream_changed": "Put them back, with their times of change, or start a new run in another folder.",
    "error.tune_stream": "a search does not stream: it needs the same rows again and again",
    "fix.tune_stream": "Give it a part of the rows, and leave streaming out.",
}
