"""An OpenAI-compatible server: requests are answered together while they run, by one model and its adapters."""
