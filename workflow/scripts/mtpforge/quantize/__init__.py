"""Quantization of a GGUF."""
