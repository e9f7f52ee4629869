"""Repositories, checkpoints and GGUFs as people write them: names, web addresses, paths."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from huggingface_hub import constants

from mtpforge.errors import ConfigError
from mtpforge.hub.listing import REPOSITORY
from mtpforge.suggest import beside, close

_HOSTS = ("https://huggingface.co/", "https://hf.co/", "https://www.huggingface.co/")
_PAGE = re.compile(r"([^/@:]+/[^/@:]+)(?:/(?:tree|blob|resolve|raw|commit)/([^/]+)(?:/(.+))?)?")
_SHORT = re.compile(r"([^/@:]+/[^/@:]+)(?:@([^:]+))?(?::(.+))?")
_PATH = re.compile(r"([^/@:]+/[^/@:]+)(?:@([^/:]+))?(?:[/:](.+))?")


@dataclass(frozen=True)
class Address:
    """A repository of the Hub, with a branch, tag or commit and a file where one was named."""

    repo: str
    revision: str | None = None
    file: str | None = None


def repository(text: str) -> Address:
    """The repository in OWNER/NAME, OWNER/NAME@TAG:FILE or a Hub URL. Raises ConfigError."""
    text = text.strip()
    address = _on_page(text) or _match(_SHORT, text)
    if address is None or not REPOSITORY.fullmatch(address.repo):
        raise ConfigError(
            f"{text[:200]!r} is not a repository: write OWNER/NAME, with single '-' and '.' inside "
            "a name, OWNER/NAME@TAG or a Hub URL"
        )
    return address


def checkpoint(text: str) -> Address | Path:
    """The checkpoint: a folder on this machine, or a repository. Raises ConfigError."""
    text = text.strip()
    path = Path(text).expanduser()
    if path.is_dir():
        return _snapshot(path)
    if path.is_file() and path.suffix != ".gguf":
        raise ConfigError(f"{text[:200]}: is a file: give its folder, {path.parent}")
    if path.is_file() or text.endswith(".gguf"):
        raise ConfigError(
            f"{text[:200]}: is a GGUF, not a checkpoint: `make inject BASE={text[:200]} "
            "SOURCE=OWNER/NAME` puts the head of a checkpoint into it"
        )
    if text.startswith((".", "/", "~")):
        raise ConfigError(f"{text[:200]}: no such folder{beside(path)}")
    name = re.split("[@:]", text)[0]
    meant = beside(path) if "/" in text else ""
    # A folder may be named after an owner of repositories.
    folder = text.endswith("/") and (name.count("/") == 1 or path.parent.exists())
    if (meant or folder or name.rstrip("/").count("/") > 1) and not _on_page(text):
        raise ConfigError(
            f"{text[:200]}: no such folder; if it is a repository, write its Hub URL{meant}"
        )
    return repository(text)


def _snapshot(folder: Path) -> Path:
    """The one snapshot in a repository's folder of the Hub's cache; another folder itself."""
    snapshots = folder / "snapshots"
    if not (folder.name.startswith("models--") and snapshots.is_dir()):
        return folder
    found = sorted(each.name for each in snapshots.iterdir())
    if len(found) != 1:
        has = "has several snapshots: choose one of" if found else "has no snapshot in"
        raise ConfigError(f"{folder}: {has} {snapshots}{': ' * bool(found)}{', '.join(found)}")
    return snapshots / found[0]


def gguf(text: str) -> Address | Path:
    """The GGUF: a file on this machine, or one of a repository. Raises ConfigError."""
    text = text.strip()
    path = Path(text).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        raise ConfigError(f"{path}: is a folder: name a GGUF in it, {path}/FILE.gguf")
    if text.endswith(".gguf") and ":" not in text and not _on_page(text):
        address = _match(_PATH, text)
        in_repository = address and address.file and REPOSITORY.fullmatch(address.repo)
        if address and in_repository and not Path(path.parts[0]).exists():
            return address
        found = path.parent.glob("*.gguf") if path.parent.is_dir() else ()
        raise ConfigError(f"{text[:200]}: no such file{close(path.name, (f.name for f in found))}")
    address = repository(text)
    if address.file is None:
        raise ConfigError(
            f"{text[:200]!r} names no file: write OWNER/NAME:FILE.gguf, or "
            "OWNER/NAME:TYPE, such as OWNER/NAME:Q4_K_M"
        )
    return address


def _on_page(text: str) -> Address | None:
    """The repository that a page of the Hub belongs to; None for another text."""
    address = re.sub(r"^(?:http://|(?=(?:www\.)?(?:huggingface|hf)\.co/))", "https://", text)
    for host in (*_HOSTS, constants.ENDPOINT.rstrip("/") + "/"):
        for given in (text, address):
            if given.startswith(host):
                page = urlsplit(given.removeprefix(host))
                found = _match(_PAGE, page.path) or _match(_SHORT, page.path)
                shown = parse_qs(page.query).get("show_file_info")
                return replace(found, file=shown[0]) if found and shown else found
    return _match(_PATH, text.removeprefix("hf://")) if text.startswith("hf://") else None


def _match(pattern: re.Pattern[str], text: str) -> Address | None:
    found = pattern.fullmatch(text.rstrip("/"))
    return Address(found[1], found[2], found[3]) if found else None
