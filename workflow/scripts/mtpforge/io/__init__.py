"""Files, byte ranges, and text."""
