"""Reading, writing and splitting GGUF files."""
