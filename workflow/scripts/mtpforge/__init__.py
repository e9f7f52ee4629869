"""What mtpforge's programs share: one module per idea, none of which needs torch or runs code from a checkpoint."""
