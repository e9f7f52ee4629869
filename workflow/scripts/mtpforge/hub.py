"""Checkpoints from the Hugging Face Hub, pinned to a commit and hashed: only the files that conversion reads.

The download itself is huggingface_hub's, which resumes what an earlier run left. It checks sizes, so contents are hashed here.
"""

import re
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from huggingface_hub.hf_api import RepoSibling

from .errors import DownloadError
from .ranges import FileRange, sha256

# Never *.bin, *.pt or *.py: nothing that could be executed reaches the disk.
_WANTED = re.compile(
    r"[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors|model\.safetensors\.index\.json|(config|generation_config|tokenizer|tokenizer_config"
    r"|special_tokens_map|added_tokens|vocab|preprocessor_config|processor_config|video_preprocessor_config)\.json"
    r"|chat_template\.(jinja|json)|merges\.txt|tokenizer\.model|README\.md"
)

_FAILURES = (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    httpx2.HTTPError,
    OSError,
)


def fetch(repo: str, revision: str, folder: Path) -> dict[str, Any]:
    """Download a checkpoint into `folder`; its manifest: repository, commit, and name, size and sha256 of each file.

    Raises DownloadError; what was fetched until then stays, and a second call goes on from there.
    """
    try:
        siblings = HfApi().model_info(repo, revision=revision, files_metadata=True).siblings or []
    except _FAILURES as error:
        raise DownloadError(f"{repo} at {revision}: {_explain(error)}") from None
    wanted = [sibling for sibling in siblings if _WANTED.fullmatch(sibling.rfilename)]
    if not any(sibling.rfilename.endswith(".safetensors") for sibling in wanted):
        raise DownloadError(f"{repo} at {revision}: has no *.safetensors files: only safetensors checkpoints can be converted")
    files = [_fetch_file(repo, revision, sibling, folder) for sibling in sorted(wanted, key=lambda s: s.rfilename)]
    return {"repo": repo, "revision": revision, "files": files}


def _fetch_file(repo: str, revision: str, sibling: RepoSibling, folder: Path) -> dict[str, Any]:
    name = sibling.rfilename
    try:
        path = Path(hf_hub_download(repo, name, revision=revision, local_dir=folder))
    except _FAILURES as error:
        raise DownloadError(f"{repo}: {name}: {_explain(error)}") from None
    digest = sha256(FileRange(path, 0, path.stat().st_size))
    if sibling.lfs is not None and digest != sibling.lfs.sha256:
        path.unlink()
        raise DownloadError(f"{repo}: {name}: sha256 is {digest}, the Hub says {sibling.lfs.sha256}: removed it, run again")
    return {"name": name, "bytes": path.stat().st_size, "sha256": digest}


def _explain(error: Exception) -> str:
    """The first line of what went wrong; huggingface_hub's messages carry no token."""
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, and it is not on this machine"
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
