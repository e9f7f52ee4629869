"""The configuration, all paths, the inputs and parameters of each rule, and what a run shows."""
