"""Measurements: speed and perplexity."""
