"""Recipes that are found: errors and sensitivities of tensors, and the mixture that follows."""
