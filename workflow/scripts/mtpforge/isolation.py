"""Programs run in the same Python everywhere, whatever the environment says.

Another `gguf` on PYTHONPATH, as in a clone of llama.cpp, would change the bytes of a conversion,
and a locale the meaning of a text file.
"""

import os
import site
import sys
from pathlib import Path

_PROGRAMS = Path(__file__).resolve().parents[1]
_HARMLESS = (
    "PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX", "PYTHONNOUSERSITE"
)  # fmt: skip


def isolate() -> None:
    """If this is a program of workflow/scripts, start it again without such influences.

    Does nothing if there are none, or in any other program.
    """
    started = getattr(sys.modules["__main__"], "__file__", None)
    if started and Path(started).resolve().parent == _PROGRAMS and _is_influenced():
        options = ["-E", "-s", "-X", "utf8", *(["-u"] if "PYTHONUNBUFFERED" in os.environ else [])]
        arguments = sys.orig_argv[-len(sys.argv) :]
        os.execv(sys.executable, [sys.executable, *options, *arguments])  # noqa: S606 - no shell


def forget_variables() -> None:
    """In Snakemake, which cannot start again: remove them from the module path and for all jobs."""
    named = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    added = [Path(path).absolute() for path in named if path]
    sys.path[:] = [path for path in sys.path if Path(path).absolute() not in added]
    for name in _variables():
        del os.environ[name]


def _variables() -> list[str]:
    names = [name for name in os.environ if name.startswith("PYTHON")]
    return [name for name in names if name not in _HARMLESS]


def _is_influenced() -> bool:
    if sys.flags.ignore_environment:
        return False
    return (
        bool(_variables())
        or bool(site.ENABLE_USER_SITE and site.getusersitepackages() in sys.path)
        or sys.getfilesystemencoding() != "utf-8"
    )
