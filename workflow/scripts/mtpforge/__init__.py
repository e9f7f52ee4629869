"""What mtpforge's programs share: one module per idea, none of which needs torch or runs code from a checkpoint."""

import os

# Nothing here multiplies matrices. numpy's threads for that would spin for a tenth of a second on each processor, at every start.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
