"""Whether the Hub would take an upload: asked before a build, and by a dry run."""

import httpx2
from huggingface_hub import constants, get_token
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # documented, not typed
    build_hf_headers,
    hf_raise_for_status,
)
from pydantic import BaseModel, Field, ValidationError

from mtpforge.errors import DownloadError, UploadError
from mtpforge.hub import answers
from mtpforge.hub.retry import REQUEST_ERRORS, UnusableAnswer, explain

SECONDS = 20.0
"""In which the Hub must answer. It is asked once: an upload asks again."""
_TOKENS = "https://huggingface.co/settings/tokens"
_OF_THE_HUB = ("X-Error-Code", "X-Request-Id")
"""Headers of its refusals, which those of a proxy lack."""


class _Named(BaseModel):
    name: str


class _Organization(_Named):
    role: str | None = Field(default=None, alias="roleInOrg")


class _Scope(BaseModel):
    entity: _Named
    """An owner, or one repository."""
    permissions: list[str]


class _FineGrained(BaseModel):
    scoped: list[_Scope] | None = None


class _Token(BaseModel):
    role: str | None = None
    fine_grained: _FineGrained | None = Field(default=None, alias="fineGrained")


class _Auth(BaseModel):
    token: _Token | None = Field(default=None, alias="accessToken")


class _User(_Named):
    """The fields of the Hub's answer that are needed."""

    organizations: list[_Organization] = Field(default=[], alias="orgs")
    auth: _Auth = _Auth()


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
                _check_owner(repo, _user(client))
    except (*REQUEST_ERRORS, DownloadError) as error:
        refused = _refusal(error)
        if refused:
            raise UploadError(f"{repo}: {refused}") from None
        return explain(error)
    return ""


def _get(client: httpx2.Client, path: str) -> httpx2.Response:
    """An answer of the Hub. Raises UnusableAnswer if something else gives it."""
    response = client.get(f"{constants.ENDPOINT}/api/{path}", headers=build_hf_headers())
    if response.is_success and "html" in response.headers.get("Content-Type", ""):
        raise UnusableAnswer(f"{response.url} is a web page: does the network want a login?")
    if response.status_code == 403 and not any(key in response.headers for key in _OF_THE_HUB):
        raise UnusableAnswer(f"{response.url}: status 403, but not of the Hub: of a proxy?")
    hf_raise_for_status(response)
    return response


def _user(client: httpx2.Client) -> _User:
    """Whose the token is. Raises UnusableAnswer if the answer has another form."""
    response = _get(client, "whoami-v2")
    try:
        return _User.model_validate_json(response.content)
    except ValidationError:
        raise UnusableAnswer(f"{response.url} answers in an unexpected form") from None


def _refusal(error: Exception) -> str:
    """What a failed request says of the token; empty if nothing."""
    if not isinstance(error, HfHubHTTPError):
        return ""
    status = error.response.status_code
    if status == 401 and get_token() is None:
        return "there is no token: set HF_TOKEN, or log in with `.venv/bin/hf auth login`"
    said = " ".join((error.server_message or "").split())[:300]
    return {
        401: f"your token was rejected (expired, revoked or mistyped): renew it at {_TOKENS}",
        403: f"your token may not write there{f' ({said})' if said else ''}: correct `publish`, or "
        f"take a token with write access to it from {_TOKENS}",
    }.get(status, "")


def _check_owner(repo: str, user: _User) -> None:
    """Raise UploadError unless a user's token can create a repository.

    That of a fine-grained one can if it says so itself, or says nothing of this.
    """
    owner, token = repo.partition("/")[0], user.auth.token or _Token()
    if token.role == "fineGrained":
        scopes = token.fine_grained.scoped if token.fine_grained else None
        if scopes is not None and not any(_writes(each, owner, repo) for each in scopes):
            raise UploadError(
                f"{repo}: your fine-grained token may not write to repositories of {owner}: "
                f"correct `publish`, or give it that right at {_TOKENS}"
            )
        return
    organizations = [each for each in user.organizations if each.role != "read"]
    if owner.lower() not in [each.name.lower() for each in (user, *organizations)]:
        raise UploadError(
            f"{repo}: your token is that of {user.name}, who cannot create repositories of "
            f"{owner}: correct `publish`, or take another token"
        )
    if token.role == "read":
        raise UploadError(f"{repo}: your token can only read: take one that writes from {_TOKENS}")


def _writes(scope: _Scope, *names: str) -> bool:
    """Whether a scope is to write to one of these, whose case does not matter."""
    return "repo.write" in scope.permissions and scope.entity.name.lower() in map(str.lower, names)
