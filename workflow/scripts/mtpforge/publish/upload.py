"""Upload of a results folder to the Hub: exactly the files on its list that the repository lacks.

Large files are compared by sha256, small ones by their git id. huggingface_hub finds the token,
streams the files, and keeps what an interrupted upload has sent.
"""

import glob
import hashlib
import re
import time
from collections.abc import Mapping, Sized
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import httpx2
from huggingface_hub import HfApi, constants, set_client_factory
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.hf_api import ModelInfo, RepoSibling

from mtpforge import table
from mtpforge.errors import UploadError, VerificationError
from mtpforge.hub import answers
from mtpforge.hub.retry import LONGEST_WAIT, TRIES, Retry, explain, requested_wait
from mtpforge.io.ranges import digest_of
from mtpforge.progress import say
from mtpforge.publish import receipts
from mtpforge.publish.sums import (
    SUMS,
    Sums,
    check_unchanged,
    check_unchanged_since,
    read_sums,
    unlisted,
)

MESSAGE = "Upload of {} by mtpforge"
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
    private: bool | None = None
    """Whether it is private, or will be; None if that is not known."""

    @property
    def place(self) -> str:
        """The place, with who can see it."""
        seen = {True: " (private)", False: " (public)", None: ""}
        return self.repo + seen[self.private]

    @property
    def preview(self) -> str:
        """What an upload would do."""
        if not self.missing:
            return f"{self.place} has all files already"
        files = count(self.missing)
        if self.exists:
            return f"`make publish` would upload {files} to {self.place}"
        return f"`make publish` would create {self.place}, and upload {files}"

    def show(self) -> None:
        """Print what would be uploaded, and warn of files that stay behind on either side."""
        total = sum(size for _, size in self.missing)
        new = "" if self.exists else f" (new {self.where})"
        print(f"{self.repo}{new}: {count(self.missing)} to upload, {table.size(total)}")
        for name, size in self.missing:
            print(f"  {size:>15,}  {name}")
        for name in unlisted(self.folder, read_sums(self.folder / SUMS)):
            say(f"  not uploaded: {self.folder / name} is no longer configured: delete it")
        for name in self.foreign:
            say(f"  left alone: {name} is only in the {self.where}: delete it there if outdated")


def compare(folder: Path, repo: str, private: bool) -> UploadPlan:
    """Compare a results folder with a repository, which will be `private` if it is created.

    Raises VerificationError if a file differs from the list, UploadError if the Hub fails.
    """
    sums = listed(folder)
    there = _ask(repo)
    uploaded = _files(there)
    return UploadPlan(
        folder,
        repo,
        exists=there is not None,
        missing=_missing(folder, sums, uploaded, repo),
        foreign=sorted(uploaded.keys() - sums.keys() - {".gitattributes"}),
        private=there.private if there else private,
    )


def everything(folder: Path, repo: str) -> UploadPlan:
    """The upload of all files, for want of an answer of the Hub. Raises VerificationError."""
    files = [
        (name, path.stat().st_size) for name in listed(folder) if (path := folder / name).is_file()
    ]
    return UploadPlan(folder, repo, exists=True, missing=files, foreign=[])


def upload(plan: UploadPlan) -> None:
    """Upload what is missing, creating the repository if needed.

    Raises VerificationError before anything is sent if a file differs from the list; UploadError.
    """
    names = [name for name, _ in plan.missing]
    sums = read_sums(plan.folder / SUMS)
    _check_again(plan.folder, {name: sums[name] for name in names if name in sums})
    _commit(plan)
    _check_arrived(
        plan.repo, _missing(plan.folder, listed(plan.folder), _uploaded(plan.repo), plan.repo)
    )


def address(repo: str) -> str:
    """The page of a repository."""
    return f"{constants.ENDPOINT}/{repo}"


def send(folder: Path, repo: str, files: Sums, private: bool) -> int:
    """Upload those of `files` that the repository lacks, before the rest of the folder.

    Returns how many they are. Raises VerificationError before anything is sent if one differs from
    its digest; UploadError, also unless the Hub reports the sha256 of each at the end.
    """
    there = _ask(repo)
    missing = _missing(folder, files, _files(there), repo)
    if missing:
        _check_again(folder, {name: files[name] for name, _ in missing})
        exists = there is not None
        plan = UploadPlan(folder, repo, exists, missing=missing, foreign=[], private=private)
        _commit(plan)
        _check_arrived(repo, _missing(folder, files, _uploaded(repo), repo))
    return len(missing)


def listed(folder: Path) -> Sums:
    """The listed files and, last, the list itself.

    Raises VerificationError if one is changed, or missing though it has not been uploaded.
    """
    path = folder / SUMS
    sums, sent = read_sums(path), receipts.known(folder)
    for name, digest in sums.items():
        if not (folder / name).is_file():
            if name in sent and sent[name].sha256 == digest:
                continue
            raise VerificationError(
                f"{folder / name}: missing, though {SUMS} lists it: run snakemake again"
            )
        check = check_unchanged_since if name.endswith(".gguf") else check_unchanged
        check(folder / name, digest, path)
    return {**sums, SUMS: digest_of(path)}


def gone(folder: Path, name: str, repo: str) -> UploadError:
    """That a file is neither here nor there."""
    receipt = receipts.listing(folder, name)
    delete = f"delete {receipt} and " if receipt else ""
    return UploadError(
        f"{repo}: {name} is not there any more, nor here: {delete}run again, which makes it anew"
    )


def _missing(
    folder: Path, files: Sums, uploaded: Mapping[str, RepoSibling], repo: str
) -> list[tuple[str, int]]:
    """Those of `files` that the repository lacks, with their bytes."""
    missing = [
        name for name in files if not _is_uploaded(folder / name, files[name], uploaded.get(name))
    ]
    for name in missing:
        if not (folder / name).is_file():
            raise gone(folder, name, repo)
    return [(name, (folder / name).stat().st_size) for name in missing]


def _commit(plan: UploadPlan) -> None:
    """Send the missing files as one commit.

    huggingface_hub tries requests again, but not the commit itself. A commit that the Hub puts off
    was not made, so it is tried again here.
    """
    _watch()
    for left in reversed(range(TRIES)):
        try:
            _send(plan)
        except _FAILURES as error:
            # That of one file is the cause of another error.
            cause = error if hasattr(error, "response") else error.__cause__ or error
            if isinstance(cause, UploadError):  # of `_refuse_long_wait`
                raise cause from None
            if not left or not (seconds := _put_off(cause)):
                why = _explain(cause if isinstance(cause, Exception) else error)
                raise UploadError(f"{plan.repo}: {why}") from None
            wait = f"going on in {table.duration(seconds)}"
            say(f"{plan.repo}: the Hub limits requests and commits: {wait}")
            time.sleep(seconds)
        else:
            return


def _send(plan: UploadPlan) -> None:
    api = HfApi()
    names = [name for name, _ in plan.missing]
    about = names[0] if len(names) == 1 else count(names)
    if not plan.exists:
        api.create_repo(plan.repo, private=plan.private, exist_ok=True)
    api.upload_folder(
        repo_id=plan.repo,
        folder_path=plan.folder,
        allow_patterns=[glob.escape(name) for name in names],
        commit_message=MESSAGE.format(about),
    )


def _put_off(error: BaseException) -> float:
    """The seconds that the Hub asks to wait for a commit; 0 if it does not ask for that."""
    response = getattr(error, "response", None)
    if response is None or response.status_code != 429 or "/commit/" not in response.url.path:
        return 0.0
    return requested_wait(response.headers)


def _explain(error: Exception) -> str:
    """Why an upload failed, and what to do."""
    again = "run again, which continues from what was uploaded"
    response = getattr(error, "response", None)
    status = response.status_code if response is not None else 0
    said = str(getattr(error, "server_message", None) or "").strip()[:300]
    if status == 429 and response is not None:
        return _rate_limited(response, said)
    if status == 413:
        return (
            f"the Hub takes no file of this size{f' ({said})' if said else ''}: set `split: 48G` "
            f"on its variant, and {again}"
        )
    if status in (402, 403) and re.search(r"(?i)storage|quota|too large|exceed", said):
        return (
            f"the Hub takes no more: {said}: free space or buy some "
            "(https://huggingface.co/settings/billing; private repositories have less than public "
            f"ones: `private: false`), then {again}"
        )
    if status == 403:
        return (
            f"your token cannot write there{f' ({said})' if said else ''}: take one with write "
            "access to it from https://huggingface.co/settings/tokens"
        )
    return f"{re.sub(r'[?][^ ]*', '', explain(error))[:300]}: {again}"  # no signed address


def _rate_limited(response: httpx2.Response, said: str = "") -> str:
    seconds = requested_wait(response.headers)
    wait = f"in {table.duration(seconds)}" if seconds > 0 else "in an hour"
    about = f" ({said})" if said else ""
    return (
        f"the Hub limits requests and commits{about}: run again {wait}, which continues from what "
        "was uploaded"
    )


@cache
def _watch() -> None:
    """Let huggingface_hub not wait in silence for longer than we would; once for each process."""
    set_client_factory(_client)


def _client() -> httpx2.Client:
    client = answers.client()
    client.event_hooks["response"].insert(0, _refuse_long_wait)
    return client


def _refuse_long_wait(response: httpx2.Response) -> None:
    """Raise UploadError for an answer that asks to wait for long."""
    if response.status_code == 429 and requested_wait(response.headers) > LONGEST_WAIT:
        raise UploadError(f"{response.url.host}: {_rate_limited(response)}")


def _check_arrived(repo: str, missing: list[tuple[str, int]]) -> None:
    if missing:
        wrong = ", ".join(name for name, _ in missing)
        raise UploadError(f"{repo}: missing or different after the upload: {wrong}: run again")


def _check_again(folder: Path, files: Sums) -> None:
    """Hash files once more, because an upload cannot always be undone."""
    for name, digest in files.items():
        check_unchanged(folder / name, digest, folder / SUMS)


def count(files: Sized) -> str:
    """The number of files, in words."""
    return "1 file" if len(files) == 1 else f"{len(files)} files"


def _uploaded(repo: str) -> dict[str, RepoSibling]:
    """The files of a repository, if there is one. Raises DownloadError."""
    return _files(_ask(repo))


def _files(there: ModelInfo | None) -> dict[str, RepoSibling]:
    return {entry.rfilename: entry for entry in (there and there.siblings) or ()}


def _ask(repo: str) -> ModelInfo | None:
    """What the Hub says of a repository; None if there is none that we may see.

    Raises DownloadError. One request without retries of its own, so that `Retry` is the only loop.
    """
    _watch()

    def ask() -> ModelInfo | None:
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        try:
            return HfApi().model_info(repo, files_metadata=True, timeout=timeout)
        except RepositoryNotFoundError:
            return None

    return Retry(repo).call(ask)


def _is_uploaded(path: Path, digest: str, entry: RepoSibling | None) -> bool:
    """Whether the repository has a file's bytes: by sha256 if it uses LFS, else by git id."""
    if entry is None:
        return False
    if entry.lfs is not None:
        return bool(entry.lfs.sha256 == digest)
    if not path.is_file() or entry.size != path.stat().st_size:
        return False
    content = path.read_bytes()
    blob = b"blob %d\0" % len(content) + content
    return bool(entry.blob_id == hashlib.sha1(blob, usedforsecurity=False).hexdigest())
