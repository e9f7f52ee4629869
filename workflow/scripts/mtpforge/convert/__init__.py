"""Conversion of a checkpoint to GGUF."""
