"""Upload of a folder of results to the Hub: exactly the files that its list names, and of these what the repository lacks.

What is there already is told by sha256, and small files by the id that git gives them. huggingface_hub finds the token, streams,
and keeps what an interrupted upload has brought.
"""

import glob
import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path

import httpx2
from huggingface_hub import HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.hf_api import RepoFile

from mtpforge.errors import UploadError, VerificationError
from mtpforge.hub import remote
from mtpforge.hub.remote import Patience
from mtpforge.io.ranges import digest_of
from mtpforge.publish.sums import (
    SUMS,
    Sums,
    certainly_unchanged,
    read_sums,
    surplus,
    unchanged,
)

MESSAGE = "Upload of {} files by mtpforge"
_FAILURES = (
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    httpx2.HTTPError,
    RuntimeError,
    ValueError,
)


@dataclass(frozen=True)
class Plan:
    """What an upload of `folder` would do: `missing` (path, bytes) is uploaded, `foreign` lies in the repository and is left."""

    folder: Path
    repo: str
    exists: bool
    missing: list[tuple[str, int]]
    foreign: list[str]


def plan(folder: Path, repo: str) -> Plan:
    """Compare a folder of results with a repository, which need not exist. Raises VerificationError, UploadError."""
    sums = _own(folder)
    there = _there(repo)
    missing = [
        (name, (folder / name).stat().st_size)
        for name, digest in sums.items()
        if not _same(folder / name, digest, there, name)
    ]
    foreign = sorted((there or {}).keys() - sums.keys() - {".gitattributes"})
    return Plan(folder, repo, there is not None, missing, foreign)


def upload(todo: Plan, private: bool) -> str:
    """Do what is planned, in a repository that is made if it does not exist; the address of the commit.

    Raises VerificationError, before anything is sent, for a file that is not the one that was listed; UploadError.
    """
    api, names, listed = HfApi(), [name for name, _ in todo.missing], todo.folder / SUMS
    for name, digest in read_sums(listed).items():
        if name in names:  # what may never be taken back is read once more
            certainly_unchanged(todo.folder / name, digest, listed)
    try:
        if not todo.exists:
            api.create_repo(todo.repo, private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=todo.repo,
            folder_path=todo.folder,
            allow_patterns=[glob.escape(name) for name in names],
            commit_message=MESSAGE.format(len(names)),
        )
    except _FAILURES as error:
        cause = error.__cause__ or error
        why = remote.explain(cause if isinstance(cause, Exception) else error)
        raise UploadError(
            f"{todo.repo}: {why}: run again: what has come until then is kept"
        ) from None
    if left := plan(todo.folder, todo.repo).missing:
        raise UploadError(
            f"{todo.repo}: is now without, or with another, {', '.join(name for name, _ in left)}: run again"
        )
    return str(done.commit_url)


def _own(folder: Path) -> Sums:
    """What is to be there: what the list names, and the list. Raises VerificationError for a file unlike its entry."""
    listed = folder / SUMS
    sums = read_sums(listed)
    for name, digest in sums.items():
        if not (folder / name).is_file():
            raise VerificationError(
                f"{folder / name}: is missing, and {SUMS} names it: run snakemake for it again"
            )
        check = unchanged if name.endswith(".gguf") else certainly_unchanged
        check(folder / name, digest, listed)
    return {**sums, SUMS: digest_of(listed)}


def _there(repo: str) -> dict[str, RepoFile] | None:
    """The files of a repository; None where there is none that we may see. Raises UploadError."""

    def ask() -> dict[str, RepoFile] | None:
        try:
            tree = HfApi().list_repo_tree(repo, recursive=True)
            return {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
        except RepositoryNotFoundError:
            return None

    return Patience(repo).call(ask)


def _same(path: Path, digest: str, there: dict[str, RepoFile] | None, name: str) -> bool:
    """Whether the repository has these bytes: by their sha256 where they are stored apart, else by git's id of them."""
    entry = (there or {}).get(name)
    if entry is None or entry.size != path.stat().st_size:
        return False
    if entry.lfs is not None:
        return bool(entry.lfs.sha256 == digest)
    content = path.read_bytes()
    return (
        entry.blob_id
        == hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
    )


def tell(plan: Plan) -> None:
    """Print what goes where, and what does not."""
    total = sum(size for _, size in plan.missing)
    new = "" if plan.exists else ", a new repository"
    print(f"{plan.repo}{new}: {len(plan.missing)} files to upload, {total / 1e9:.2f} GB")
    for name, size in plan.missing:
        print(f"  {size:>15,}  {name}")
    for name in surplus(plan.folder, read_sums(plan.folder / SUMS)):
        print(
            f"  not uploaded: {plan.folder / name} is not asked for any more: delete it",
            file=sys.stderr,
        )
    for name in plan.foreign:
        print(
            f"  left as it is: {name} is in the repository and not in {plan.folder}: delete it there if it is old",
            file=sys.stderr,
        )
