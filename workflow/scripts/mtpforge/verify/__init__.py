"""Verification of a GGUF."""
