"""Special token ids, their flags and the chat template, as the pinned upstream writes them.

An older gguf-py reads them; this module corrects it wherever it differs from the pinned upstream.
The chat template is copied and never rendered.
"""

import json
import re
import tempfile
from pathlib import Path
from typing import Any

from gguf import SpecialVocab

from mtpforge.convert import chat_templates
from mtpforge.errors import CheckpointError
from mtpforge.io import atomic
from mtpforge.io.text import is_there, member, read_json

_ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


def special_vocab(directory: Path, settings: dict[str, Any], size: int) -> SpecialVocab:
    """Read the special tokens of a checkpoint with `size` tokens; `settings` is its tokenizer.json.

    Raises CheckpointError.
    """
    path = directory / "tokenizer_config.json"
    config = read_json(path) if is_there(path) else {}
    config.pop("chat_template", None)  # see `chat_templates`
    _check_ids(directory / "config.json", size)
    for key in filter(_is_flag, config):  # gguf-py ignores those of another type
        member(config, key, bool, str(path))
    flagless = {key: value for key, value in config.items() if not _is_flag(key)}
    try:
        steps = _post_processors(settings, config, directory)
        special = _read(directory, settings, config)
        template = _read(directory, settings, flagless)
    except (ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
        raise CheckpointError(f"{directory}: malformed tokenizer files ({error})") from None
    for role, number in special.special_token_ids.items():
        _check_id(directory, f"{role}_token", number, size)
    # A post-processor overrides tokenizer_config.json; a byte-level one means that it adds nothing.
    flags: dict[str, bool] = {}
    for step in steps:
        if step == "ByteLevel":
            flags |= {key: False for key in ("bos", "eos") if key not in flags}
        else:
            flags |= template.add_special_token
    special.add_special_token = flags | {
        key: value for key, value in special.add_special_token.items() if key not in flags
    }
    special.chat_template = chat_templates.templates(directory)
    return special


def _check_ids(path: Path, size: int) -> None:
    """Raise CheckpointError if config.json has a special token that the vocabulary lacks."""
    config = read_json(path)
    for part in (config, member(config, "text_config", dict, str(path)) or {}):
        for role in _ROLES:
            number = part.get(f"{role}_token_id")
            for each in number if isinstance(number, list) else [number]:
                _check_id(path, f"{role}_token_id", each, size)


def _check_id(path: Path, key: str, number: Any, size: int) -> None:
    if number is not None and (type(number) is not int or not 0 <= number < size):
        shown = str(number)[:50]
        raise CheckpointError(f"{path}: {key} is {shown}, not one of {size} tokens")


def _is_flag(key: str) -> bool:
    return key.startswith("add_") and key.endswith("_token")


def _post_processors(
    settings: dict[str, Any], config: dict[str, Any], directory: Path
) -> list[str]:
    """Return the types of the post-processor's steps.

    Raises CheckpointError for a tokenizer that we would not write as upstream does.
    """
    path = directory / "tokenizer.json"
    known = [_text(config.get(role)) for role in ("bos_token", "cls_token")]
    post = settings.get("post_processor") or {}
    steps = [step for step in post.get("processors", [post]) if step]
    for step in steps:
        single = step.get("single") or [{}]
        first = single[0].get("SpecialToken", {}).get("id") if len(single) > 1 else None
        if step["type"] not in ("ByteLevel", "TemplateProcessing") or (
            first and first not in known
        ):
            begins = (
                f" that begins with {first}, which is not the bos_token of tokenizer_config.json"
            )
            raise CheckpointError(
                f"{path}: unsupported post_processor of type {step['type']}"
                f"{begins if first else ''}: restore the base model's post_processor"
            )
    text = json.dumps(settings.get("normalizer"))
    if found := re.search(r'"type": "(Lowercase|StripAccents|BertNormalizer)"', text):
        raise CheckpointError(
            f"{path}: unsupported normalizer of type {found[1]}: "
            "restore the base model's normalizer"
        )
    return [step["type"] for step in steps]


def _text(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def _read(directory: Path, settings: dict[str, Any], config: dict[str, Any]) -> SpecialVocab:
    """Let gguf-py read the checkpoint with `config` as its tokenizer_config.json.

    gguf-py does not need the model in `tokenizer.json`, the largest part, so it is left out. Chat
    templates are read in `chat_templates`.
    """
    rest = {key: value for key, value in settings.items() if key != "model"}
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        (scratch / "config.json").symlink_to(directory / "config.json")
        atomic.write_scratch(scratch / "tokenizer.json", json.dumps(rest))
        if config:
            atomic.write_scratch(scratch / "tokenizer_config.json", json.dumps(config))
        return SpecialVocab(scratch)
