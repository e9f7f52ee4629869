"""Whether the Hub would take an upload: asked before a build, and by a dry run."""

from typing import Any

import httpx2
from huggingface_hub import constants, get_token
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # documented, not typed
    build_hf_headers,
    hf_raise_for_status,
)

from mtpforge.errors import UploadError
from mtpforge.hub import answers
from mtpforge.hub.retry import REQUEST_ERRORS, explain

SECONDS = 20.0
"""In which the Hub must answer. It is asked once: an upload asks again."""
_TOKENS = "https://huggingface.co/settings/tokens"


def check(repo: str) -> str:
    """Ask whether the token may write to a repository, which need not exist.

    Returns why the Hub could not be asked, empty if it was. Raises UploadError if it may not.
    """
    try:
        with answers.client() as client:
            client.timeout = httpx2.Timeout(SECONDS)
            try:
                _get(client, f"models/{repo}/auth-check/write")
            except RepositoryNotFoundError:  # or it is private, or there is no token
                _check_owner(repo, _get(client, "whoami-v2").json())
    except REQUEST_ERRORS as error:
        refused = _refusal(error)
        if refused:
            raise UploadError(f"{repo}: {refused}") from None
        return explain(error)
    return ""


def _get(client: httpx2.Client, path: str) -> httpx2.Response:
    response = client.get(f"{constants.ENDPOINT}/api/{path}", headers=build_hf_headers())
    hf_raise_for_status(response)
    return response


def _refusal(error: Exception) -> str:
    """What a failed request says of the token; empty if nothing."""
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
    if status == 401 and get_token() is None:
        return "there is no token: set HF_TOKEN, or log in with `hf auth login`"
    return {
        401: f"your token was rejected (expired, revoked or mistyped): renew it at {_TOKENS}",
        403: "your token may not write there: correct `publish`, or take a token with write access"
        f" to it from {_TOKENS}",
    }.get(status, "")


def _check_owner(repo: str, user: Any) -> None:
    """Raise UploadError unless a user can create a repository; `user` is the Hub's answer."""
    owner, name = repo.partition("/")[0], user.get("name")
    organizations = [each for each in user.get("orgs", []) if each.get("roleInOrg") != "read"]
    writable = [str(each.get("name")).lower() for each in (user, *organizations)]
    if owner.lower() not in writable:
        raise UploadError(
            f"{repo}: your token is that of {name}, who cannot create repositories of {owner}: "
            "correct `publish`, or take another token"
        )
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise UploadError(f"{repo}: your token can only read: take one that writes from {_TOKENS}")
