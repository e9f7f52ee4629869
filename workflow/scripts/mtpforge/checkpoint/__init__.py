"""Hugging Face checkpoints: tensors, configuration, architectures."""
