"""Parser and exit of all programs in workflow/scripts."""

import argparse
import signal
import sys
from collections.abc import Callable

from mtpforge.errors import ForgeError, ToolchainError, printable

_LONGEST_MESSAGE = 2000  # characters; a hostile input can put megabytes into a message


def parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser with a program's docstring as its description, line breaks included."""
    return argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def run(main: Callable[[], None]) -> None:
    """Call `main`. Expected errors end the program with `error: ...` and exit code 1.

    An interrupt ends it with exit code 130. SIGTERM unwinds the stack too, so that temporary files
    are removed and child processes end. Any other exception is a bug and keeps its traceback.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        main()
    except ToolchainError as error:
        sys.exit(f"error: {error}")  # several lines: it may quote the end of a log
    except ForgeError as error:
        text = " ".join(str(error).split())  # an input can put line breaks into a message
        shortened = text[:_LONGEST_MESSAGE] + " ..." if len(text) > _LONGEST_MESSAGE else text
        sys.exit(f"error: {shortened}")
    except OSError as error:
        place = error.filename or "file system"
        sys.exit(printable(f"error: {place}: {error.strerror or error}"))
    except MemoryError:
        sys.exit("error: out of memory")
    except KeyboardInterrupt:
        sys.exit(130)
