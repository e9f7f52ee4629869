"""Files that only a killed run needs: temporary ones of `io.atomic`, and pieces that none wants."""

import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

FOLDERS = (Path("results"), Path("resources"))
"""Where jobs write."""
_INSTALLED = {Path("resources/converter/environment"), Path("resources/converter/source")}
"""Tens of thousands of files, none of them ours."""
_NAME = re.compile(r"\..+\.(part|scratch)|[^.].*\.yaml\.part")
_PIECES = ("work/manifests/pieces", "work/manifests/quantized/*.gguf")


def remove(*folders: Path) -> list[Path]:
    """Remove what killed jobs left in these folders, or in all where jobs write; what it was.

    Downloads stay, because the next run continues them.
    """
    found = [path for path in find(*folders) if not is_download(path)]
    for path in found:
        delete(path)
    return found


def find(*folders: Path) -> Iterator[Path]:
    """What no living process writes to, in these folders, or in all where jobs write."""
    for top in folders or FOLDERS:
        for parent, inside, files in os.walk(top):
            for name in [*inside, *files]:
                if _NAME.fullmatch(name) and not _in_use(Path(parent, name)):
                    yield Path(parent, name)
            entered = [name for name in inside if not _NAME.fullmatch(name)]
            inside[:] = [name for name in entered if Path(parent, name) not in _INSTALLED]


def pieces(results: Path) -> Iterator[Path]:
    """Tensors of quantizations that have not been finished, or verified, in a model's folder.

    Once all files of the model are verified, no plan wants them.
    """
    for pattern in _PIECES:
        yield from sorted(results.glob(pattern))


def is_download(path: Path) -> bool:
    """Whether this is the beginning of a file from the Hub, or of a checkpoint's head."""
    parts = path.parts
    start = parts.index("hub") if "hub" in parts else len(parts)
    # hub/<owner>/<name>/<revision>/<name>/... or hub/<owner>/<name>/<revision>/head/<name>/...
    return len(parts) > start + 5 and parts[start + 4] in (parts[start + 2], "head")


def delete(path: Path) -> None:
    """Remove a file, or a folder with everything in it, as far as that is possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _in_use(path: Path) -> bool:
    """Whether a living process has locked it; a folder that was replaced has its writer's lock."""
    locked = path.with_name(path.name.replace(".old.part", ".part"))
    try:
        descriptor = os.open(locked, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError:  # a link, or gone
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # by another process, or a file system without locks
        return True
    finally:
        os.close(descriptor)
    return False
