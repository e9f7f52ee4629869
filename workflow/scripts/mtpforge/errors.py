"""Errors that a user can act on, and how a program ends with one.

Everything that can go wrong with an input raises a `ForgeError`: one or two lines that say what is wrong, where, and
what to do. `run` turns it into exit code 1 without a traceback; any other exception is a bug of ours and keeps its own.
"""

import signal
import sys
from collections.abc import Callable


class ForgeError(Exception):
    """Something outside this program is wrong; the message says what, where, and what to do."""


class ConfigError(ForgeError):
    """`config.yaml` asks for something that cannot be."""


class CheckpointError(ForgeError):
    """A checkpoint is incomplete, malformed or contradicts itself."""


class GgufError(ForgeError):
    """A GGUF is malformed, or is not what it should be."""


class ToolchainError(ForgeError):
    """A program that we call is missing, too old, or failed."""


class DownloadError(ForgeError):
    """The Hub does not have something, does not give it, or gave something else."""


class VerificationError(ForgeError):
    """A finished file is not what was asked for, and must not be published."""

    table = ""
    """All verdicts on it."""


class UploadError(ForgeError):
    """The Hub does not take something."""


def run(main: Callable[[], None]) -> None:
    """Call `main`; a `ForgeError` or an OSError becomes `error: ...` on stderr and exit code 1, an interrupt exit code 130.

    A termination unwinds like an interrupt, so that temporary files go and child processes end.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        main()
    except ToolchainError as error:
        sys.exit(f"error: {error}")  # may end in the last lines of a build's log
    except ForgeError as error:
        text = " ".join(str(error).split())  # inputs can bring line breaks into a message, and megabytes
        sys.exit(f"error: {text if len(text) < 2000 else text[:2000] + ' ...'}")
    except OSError as error:
        sys.exit(f"error: {error.filename or 'file system'}: {error.strerror or error}")
    except MemoryError:
        sys.exit("error: out of memory")
    except KeyboardInterrupt:
        sys.exit(130)
