"""Split a GGUF as verify.py does when it publishes one."""

from pathlib import Path

from mtpforge.gguf import reader
from mtpforge.gguf.split import splitting


def split(source: Path, folder: Path, stem: str, limit: int) -> list[Path]:
    """Write `source` into `folder` in files of at most `limit` bytes of tensors; the files."""
    with splitting(reader.read(source), folder, stem, limit) as files:
        pass
    return [folder / file.name for file in files]
