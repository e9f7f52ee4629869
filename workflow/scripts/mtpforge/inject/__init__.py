"""Injection of a head into a GGUF."""
