"""Settings of a search, apart from the code so that the rules can read them."""

PROBE = "Q3_K"
"""The type of a group that is tried: coarse enough that its effect is not lost in rounding."""
CHUNKS = 4
"""Chunks of the text."""
SMALL = 1 << 30
"""Bytes of a model that is run on one thread, several at a time."""
STEP = 16
"""One row in this many is quantized to find an error; of small matrices more."""
