"""What the rules need from the configuration, and what a run shows."""
