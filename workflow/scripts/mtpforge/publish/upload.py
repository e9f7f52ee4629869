"""Upload of a results folder to the Hub: exactly the files on its list that the repository lacks.

Large files are compared by sha256, small ones by their git id. huggingface_hub finds the token,
streams the files, and keeps what an interrupted upload has sent.
"""

import glob
import hashlib
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
from mtpforge.hub.retry import Retry, explain
from mtpforge.io.ranges import digest_of
from mtpforge.progress import say
from mtpforge.publish.sums import (
    SUMS,
    Sums,
    check_unchanged,
    check_unchanged_since,
    read_sums,
    unlisted,
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
class UploadPlan:
    """The files of `folder` that `repo` lacks, with their bytes, and those that only `repo` has.

    `repo` is a repository of the Hub, or the address of a folder in object storage.
    """

    folder: Path
    repo: str
    exists: bool
    missing: list[tuple[str, int]]
    foreign: list[str]
    where: str = "repository"
    """The kind of place that `repo` is, for messages."""

    def show(self) -> None:
        """Print what would be uploaded, and warn of files that stay behind on either side."""
        total = sum(size for _, size in self.missing)
        new = "" if self.exists else f" (new {self.where})"
        print(f"{self.repo}{new}: {len(self.missing)} files to upload, {total / 1e9:.2f} GB")
        for name, size in self.missing:
            print(f"  {size:>15,}  {name}")
        for name in unlisted(self.folder, read_sums(self.folder / SUMS)):
            say(f"  not uploaded: {self.folder / name} is no longer configured: delete it")
        for name in self.foreign:
            say(f"  left alone: {name} is only in the {self.where}: delete it there if outdated")


def compare(folder: Path, repo: str) -> UploadPlan:
    """Compare a results folder with a repository, which need not exist.

    Raises VerificationError if a file differs from the list, UploadError if the Hub fails.
    """
    sums = listed(folder)
    uploaded = _uploaded(repo)
    missing = [
        (name, (folder / name).stat().st_size)
        for name, digest in sums.items()
        if not _is_uploaded(folder / name, digest, (uploaded or {}).get(name))
    ]
    foreign = sorted((uploaded or {}).keys() - sums.keys() - {".gitattributes"})
    return UploadPlan(folder, repo, exists=uploaded is not None, missing=missing, foreign=foreign)


def upload(plan: UploadPlan, private: bool) -> str:
    """Upload what is missing, creating the repository if needed; the URL of the commit.

    Raises VerificationError before anything is sent if a file differs from the list; UploadError.
    """
    api = HfApi()
    names = [name for name, _ in plan.missing]
    _check_again(plan.folder, names)
    try:
        if not plan.exists:
            api.create_repo(plan.repo, private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=plan.repo,
            folder_path=plan.folder,
            allow_patterns=[glob.escape(name) for name in names],
            commit_message=MESSAGE.format(len(names)),
        )
    except _FAILURES as error:
        cause = error.__cause__ or error
        why = explain(cause if isinstance(cause, Exception) else error)
        raise UploadError(
            f"{plan.repo}: {why}: run again, which continues from what was uploaded"
        ) from None
    if left := compare(plan.folder, plan.repo).missing:
        wrong = ", ".join(name for name, _ in left)
        raise UploadError(f"{plan.repo}: missing or different after the upload: {wrong}: run again")
    return str(done.commit_url)


def listed(folder: Path) -> Sums:
    """The listed files and, last, the list itself.

    Raises VerificationError if one is missing or changed.
    """
    path = folder / SUMS
    sums = read_sums(path)
    for name, digest in sums.items():
        if not (folder / name).is_file():
            raise VerificationError(
                f"{folder / name}: missing, though {SUMS} lists it: run snakemake again"
            )
        check = check_unchanged_since if name.endswith(".gguf") else check_unchanged
        check(folder / name, digest, path)
    return {**sums, SUMS: digest_of(path)}


def _check_again(folder: Path, names: list[str]) -> None:
    """Hash every file once more, because an upload cannot always be undone."""
    for name, digest in read_sums(folder / SUMS).items():
        if name in names:
            check_unchanged(folder / name, digest, folder / SUMS)


def _uploaded(repo: str) -> dict[str, RepoFile] | None:
    """The files of a repository; None if there is none that we may see. Raises DownloadError."""

    def ask() -> dict[str, RepoFile] | None:
        try:
            tree = HfApi().list_repo_tree(repo, recursive=True)
            return {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
        except RepositoryNotFoundError:
            return None

    return Retry(repo).call(ask)


def _is_uploaded(path: Path, digest: str, entry: RepoFile | None) -> bool:
    """Whether the repository has a file's bytes: by sha256 if it uses LFS, else by git id."""
    if entry is None or entry.size != path.stat().st_size:
        return False
    if entry.lfs is not None:
        return bool(entry.lfs.sha256 == digest)
    content = path.read_bytes()
    blob = b"blob %d\0" % len(content) + content
    return bool(entry.blob_id == hashlib.sha1(blob, usedforsecurity=False).hexdigest())
