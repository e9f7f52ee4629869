"""Headers of GGUFs of repositories, read by range: metadata, and tensors without values."""

from pathlib import Path

from mtpforge.gguf import reader, split
from mtpforge.gguf.file_names import gguf_files
from mtpforge.gguf.reader import Gguf
from mtpforge.hub.download import remote_file
from mtpforge.hub.listing import Listing
from mtpforge.hub.ranged_reads import RemoteFile


def read(listing: Listing, name: str) -> Gguf:
    """The GGUF with this first file, with the tensors of all its shards.

    Raises DownloadError, GgufError.
    """
    return split.joined([_read(listing, each) for each in gguf_files(name)])


def _read(listing: Listing, name: str) -> Gguf:
    parts = listing.parts(name)
    size = sum(listing.files[part].bytes for part in parts)
    return reader.read_from(Path(listing.repo, name), _Start(remote_file(listing, parts[0])), size)


class _Start:
    """A file of a repository, read from its start like an open one."""

    def __init__(self, remote: RemoteFile) -> None:
        self._remote, self._position = remote, 0

    def read(self, count: int) -> bytes:
        """The next bytes, fewer at the end. Raises DownloadError."""
        begin, self._position = self._position, min(self._position + count, self._remote.size)
        return self._remote.get(begin, self._position)
