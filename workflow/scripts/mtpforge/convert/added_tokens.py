"""Tokens that a checkpoint names beside `tokenizer.json`, and how to add them.

Follows transformers 4.57: real Qwen3.5 checkpoints have seven tokens in `added_tokens_decoder` of
`tokenizer_config.json` alone.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from mtpforge.errors import CheckpointError
from mtpforge.io.text import is_there, member, read_json

_FILES = "tokenizer_config.json, special_tokens_map.json or added_tokens.json"
_ROLES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_QWEN2_ROLES = {
    "bos_token": None,
    "eos_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
}
"""Default roles of the Qwen2 tokenizer class, which always marks their tokens as special."""

Token = dict[str, Any] | str
"""A token as JSON has it: an object with its properties, or only its text."""


@dataclass(frozen=True)
class AddedTokens:
    """The tokens named beside `tokenizer.json`."""

    listed: dict[int, dict[str, Any]]
    """Tokens with their properties. The ids only order them: the package numbers them itself."""
    special: list[Token]
    """Special tokens (eos_token, additional_special_tokens, ...), in transformers' order."""
    complete: bool
    """Whether `listed` is an `added_tokens_decoder`; else it lacks those of `tokenizer.json`."""


def read(directory: Path) -> AddedTokens:
    """Read `tokenizer_config.json`, `special_tokens_map.json` and `added_tokens.json`.

    Raises CheckpointError if one of these files is malformed.
    """
    config = _read_optional(directory / "tokenizer_config.json")
    member(config, "tokenizer_class", str, str(directory / "tokenizer_config.json"))
    try:
        if "added_tokens_decoder" in config:
            listed = {int(i): dict(token) for i, token in config["added_tokens_decoder"].items()}
            return AddedTokens(listed, _special_tokens(config, listed), complete=True)
        config |= _special_tokens_map(_read_optional(directory / "special_tokens_map.json"), config)
        special = _special_tokens(config, {})
        contents = {_content(token) for token in special}
        listed = {}
        for text, i in _read_optional(directory / "added_tokens.json").items():
            is_special = text in contents
            listed[int(i)] = {"content": text, "special": is_special, "normalized": not is_special}
        return AddedTokens(listed, special, complete=False)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise CheckpointError(f"{directory}: malformed tokens in {_FILES} ({error!r})") from None


def missing(tokenizer: Tokenizer, named: AddedTokens) -> list[AddedToken]:
    """Return the tokens that transformers adds after loading `tokenizer.json`, in its order.

    It adds every listed token again. For a token that is already there, this only changes
    properties, such as whether it is special.
    """
    own = tokenizer.get_added_tokens_decoder()
    listed = {i: _added_token(token) for i, token in named.listed.items()}
    if not named.complete:
        listed |= own
    tokens = [token for _, token in sorted(listed.items())]
    known = {token.content for token in (*own.values(), *tokens)}
    special = {_content(token) for token in named.special}
    for token in named.special:
        added = _added_token(token)
        if added not in tokens if isinstance(token, dict) else token not in known:
            tokens.append(added)
            known.add(added.content)
    for added in tokens:
        added.special = added.special or added.content in special
    return tokens


def _read_optional(path: Path) -> dict[str, Any]:
    return read_json(path) if is_there(path) else {}


def _special_tokens_map(roles: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Return the settings in the older file of roles.

    Its additional tokens extend those of `config`.
    """
    merged = {key: _marked_special(value) for key, value in roles.items()}
    more = [_marked_special(token) for token in _additional(roles)]
    if more:
        merged["additional_special_tokens"] = [*_additional(config), *more]
    return merged


def _additional(roles: dict[str, Any]) -> list[Any]:
    return member(roles, "additional_special_tokens", list, _FILES) or []


def _marked_special(token: Any) -> Any:
    return {**token, "special": True} if isinstance(token, dict) else token


def _special_tokens(config: dict[str, Any], listed: dict[int, dict[str, Any]]) -> list[Token]:
    known = {_content(token): token for token in listed.values()}
    is_qwen2 = config.get("tokenizer_class") in ("Qwen2Tokenizer", "Qwen2TokenizerFast")
    defaults = _QWEN2_ROLES if is_qwen2 else {}
    found: list[Token] = []
    for role in _ROLES:
        token = config.get(role, defaults.get(role))
        if token is None:
            continue
        if isinstance(token, str) and token in known:
            token = known[token]
        elif isinstance(token, str) and role in defaults:
            token = {"content": token, "special": True, "normalized": False}
        found.append(token)
    found += _additional(config)
    extra = config.get("extra_special_tokens")
    if isinstance(extra, list):
        found += extra
    else:
        found += (member(config, "extra_special_tokens", dict, _FILES) or {}).values()
    for token in found:
        _content(token)  # raises if it is not a token
    return found


def _content(token: Token) -> str:
    text = token["content"] if isinstance(token, dict) else token
    if not isinstance(text, str):
        raise TypeError(f"{text!r} is not a token")
    return text


def _added_token(token: Token) -> AddedToken:
    if isinstance(token, str):
        return AddedToken(token, special=True)
    return AddedToken(**{key: value for key, value in token.items() if key != "__type"})
