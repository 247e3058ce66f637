"""A trained model as other programs take it: GGUF, Ollama, the hub."""
