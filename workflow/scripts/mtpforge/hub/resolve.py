"""Lists what one commit of a Hub repository holds, reading only the headers of its shards."""

import re
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.hf_api import ModelInfo, RepoSibling

from mtpforge import progress
from mtpforge.checkpoint import model_files, safetensors
from mtpforge.checkpoint.model_files import INDEX, Weights
from mtpforge.checkpoint.safetensors import CheckpointTensor
from mtpforge.errors import DownloadError
from mtpforge.hub import answers
from mtpforge.hub.download import read_text, remote_file
from mtpforge.hub.listing import COMMIT, FILE_PATH, REPOSITORY, File, Listing
from mtpforge.hub.retry import Retry

_FIRST_READ = 64 << 10  # bytes; most shard headers fit, so one request is enough


def model_info(repo: str, revision: str | None = None) -> ModelInfo:
    """Ask the Hub about a commit, branch or tag (default: the main branch), with file sizes.

    Raises DownloadError.
    """
    answers.bound()
    label = f"{repo} at {revision}" if revision else repo

    def ask() -> ModelInfo:
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        info = HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=timeout)
        if not COMMIT.fullmatch(str(info.sha)):
            raise ValueError(f"its commit is {info.sha!r}")
        return info

    try:
        info = Retry(label).call(ask)
    except UnicodeEncodeError:
        raise DownloadError(
            f"{label}: your token has characters that no token has: copy it again, without quotes"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DownloadError(
            f"{label}: malformed answer from the Hub ({type(error).__name__}: {error})"
        ) from None
    if (name := current_name(info, repo)) != repo:
        progress.say(f"{repo} is now called {name}: write `repo: {name}`")
    return info


def current_name(info: ModelInfo, repo: str) -> str:
    """The name that the Hub gives to a repository: another one than `repo` if it was renamed."""
    return info.id if REPOSITORY.fullmatch(str(info.id)) else repo


def list_commit(repo: str, revision: str) -> Listing:
    """List all files and tensors of a commit. Raises DownloadError, CheckpointError."""
    info = model_info(repo, revision)
    if revision != info.sha:
        raise DownloadError(
            f"{repo}: revision {revision!r} is not a commit hash: "
            f"write `revision: {info.sha}`, the commit it names now"
        )
    files = dict(sorted(_files(info.siblings or [])))
    listing = Listing(repo, revision, files, tensors={})
    in_root = [name for name in files if "/" not in name]
    present = [name for name in in_root if name.endswith(".safetensors")]
    if model_files.model_files(present) or (present and INDEX in files):
        weights = _weights(listing, present)
        listing.tensors.update(sorted(weights.tensors.items()))
        listing.lost.update(sorted(weights.lost.items()))
    return listing


def _files(siblings: Iterable[RepoSibling]) -> Iterable[tuple[str, File]]:
    """Yield the files with plain names; those in folders are downloaded only if asked for."""
    for sibling in siblings:
        name = sibling.rfilename
        if not _is_path(name):
            raise DownloadError(f"the Hub lists an impossible file name {name!r}: refused")
        if FILE_PATH.fullmatch(name):
            yield name, _file(sibling)


def _is_path(name: object) -> bool:
    return (
        isinstance(name, str)
        and name.isprintable()
        and "\\" not in name
        and not {"", ".", ".."} & set(name.split("/"))
    )


def _file(sibling: RepoSibling) -> File:
    size = sibling.size
    digest = str(sibling.lfs.sha256 if sibling.lfs else sibling.blob_id)
    expected = r"[0-9a-f]{64}" if sibling.lfs else r"[0-9a-f]{40}"
    if type(size) is not int or size < 0 or not re.fullmatch(expected, digest):
        raise DownloadError(
            f"the Hub lists {sibling.rfilename} with size {size!r} and digest {digest!r}: refused"
        )
    return File(size, digest)


def _weights(listing: Listing, present: list[str]) -> Weights:
    """Read the tensors from the headers of the shards."""

    def read_header(shard: str) -> list[CheckpointTensor]:
        if shard not in listing.files:
            raise DownloadError(
                f"{listing.label}: {INDEX} names {shard}, which the repository does not have"
            )
        remote = remote_file(listing, shard)
        path = Path(listing.repo, shard)
        start = remote.get(0, min(_FIRST_READ, remote.size))
        end = 8 + safetensors.header_length(path, start[:8], remote.size)
        header = (start + remote.get(len(start), end))[8:end]
        return safetensors.parse_shard_header(path, header, remote.size)

    index = read_text(listing, INDEX) if INDEX in listing.files else None
    return model_files.gather_tensors(Path(listing.repo), index, present=present, read=read_header)
