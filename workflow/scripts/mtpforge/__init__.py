"""The library of mtpforge's programs: no module needs torch or runs code from a checkpoint."""

import os

from mtpforge.isolation import isolate

isolate()  # before any other package is imported

# Nothing here multiplies matrices, and numpy's threads would spin for 0.1 s per core at each start.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
