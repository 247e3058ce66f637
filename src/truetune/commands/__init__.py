"""One file per command: `command(lang)` builds it; what is heavy is imported when it runs."""
