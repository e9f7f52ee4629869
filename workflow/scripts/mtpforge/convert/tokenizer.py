"""The tokenizer of a checkpoint as GGUF metadata: tokens, types, merges, special tokens, pre-tokenizer, chat template.

Follows llama.cpp's `conversion/base.py` (0c1e57098) for byte-level BPE, with the `tokenizers` package in place of
transformers, so nothing that a checkpoint brings is executed. The chat template is copied and never rendered.
"""

import json
import os
import re
import resource
import tempfile
from dataclasses import dataclass
from hashlib import sha256
from multiprocessing import Pipe, Process
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, SpecialVocab, TokenType
from gguf.constants import GGUFValueType, Keys
from tokenizers import AddedToken, Tokenizer

from mtpforge.errors import CheckpointError, GgufError
from mtpforge.gguf.metadata import Value
from mtpforge.io.text import parse_json, read_json, read_text

# Upstream tells pre-tokenizers apart by the ids that this text gets: data of convert_hf_to_gguf_update.py.
PROBE = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶\u200d🌫️ (multiple emojis concatenated) ✅ 🦙🦙 3 33 333 3333 "
    "33333 333333 3333333 33333333 3.3 3..3 3...3 កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天～ ------======= нещо на Български "
    "''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, 'RE you sure? 'M not sure I'll make it, "
    "'D you like some tea? We'Ve a'lL"
)

_MEMORY, _SECONDS = 4 << 30, 300  # several times what the largest vocabulary takes

_SPACE = chr(ord(" ") + 256)

# sha256 of the probe's ids -> name of the pre-tokenizer in llama.cpp; the models that first had them.
PRE_TOKENIZERS = {
    "d30d75d9059f1aa2c19359de71047b3ae408c70875e8a3ccf8c5fba56c9d8af4": "qwen35",  # Qwen3.5-9B-Instruct
    "1444df51289cfa8063b96f0e62b1125440111bc79a52003ea14b6eac7016fd5f": "qwen35",  # MiniCPM-V-4_6
    "e636dc30a262dcc0d8c323492e32ae2b70728f4df7dfe9737d9f920a282b8aea": "qwen2",  # Qwen1.5-7B
    "d4540891389ea895b53b399da6ac824becc30f2fba0e9ddbb98f92e55ca0e97c": "qwen2",  # Qwen3-Embedding-0.6B
}


def describe(writer: GGUFWriter, directory: Path, vocab_size: int, pre: str | None) -> None:
    """Write all `tokenizer.*` keys; `vocab_size` rows of the embedding, `pre` overrides the checksum. CheckpointError."""
    path = directory / "tokenizer.json"
    text = read_text(path)
    # A process of its own: the package takes as long as all the rest, and a hostile file may end the process that reads it.
    answers, answer = Pipe(duplex=False)
    beside = Process(target=_answer, args=(answer, text, read_named(directory)), daemon=True)
    beside.start()
    answer.close()
    try:
        settings = parse_json(path, text)
        merges = _merges(settings, path)
    except BaseException:
        beside.kill()  # before multiprocessing ends it in a way that it could answer with a traceback
        raise
    del text
    try:
        package = answers.recv()
    except EOFError:
        package = "it crashed, or needed too much memory or time"
    beside.join()
    if not isinstance(package, Package):
        raise CheckpointError(f"{path}: the tokenizers package cannot read it ({package})")
    # The package has read the model, so it is there.
    tokens, types = vocabulary(settings["model"]["vocab"], package.added, vocab_size, directory)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre or pre_tokenizer(package.checksum, directory))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_key_value(Keys.Tokenizer.MERGES, merges, GGUFValueType.ARRAY)
    _special(directory, settings).add_to_gguf(writer, quiet=True)


@dataclass(frozen=True)
class Package:
    """What the `tokenizers` package says of a `tokenizer.json`."""

    added: dict[int, tuple[str, bool]]
    """Of the tokens beside the model's own: id -> text, normalized, and whether it is marked special."""
    checksum: str
    """sha256 of the probe's ids."""


@dataclass(frozen=True)
class Named:
    """The tokens that a checkpoint names beside `tokenizer.json`, each as a JSON object or as its text alone."""

    listed: dict[int, dict[str, Any]]
    """Tokens with their properties; the ids only order them, because the package numbers them itself."""
    special: list[dict[str, Any] | str]
    """Special tokens by role (eos_token, additional_special_tokens, ...), in the order in which transformers takes them."""
    complete: bool
    """Whether `listed` is an `added_tokens_decoder`; if not, the tokens of `tokenizer.json` belong to it too."""


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
"""Roles that the Qwen2 tokenizer class fills by itself, and whose tokens it always marks as special."""


def read_named(directory: Path) -> Named:
    """Read the tokens that only `tokenizer_config.json`, `special_tokens_map.json` or `added_tokens.json` name.

    Follows transformers 4.57: real Qwen3.5 checkpoints have seven tokens in `added_tokens_decoder` alone.
    Raises CheckpointError if one of these files is malformed.
    """
    config = _read_optional(directory / "tokenizer_config.json")
    try:
        if "added_tokens_decoder" in config:
            listed = {int(i): dict(token) for i, token in config["added_tokens_decoder"].items()}
            return Named(listed, _special_tokens(config, listed), complete=True)
        config |= _special_tokens_map(_read_optional(directory / "special_tokens_map.json"), config)
        special = _special_tokens(config, {})
        contents = {_content(token) for token in special}
        listed = {}
        for text, i in _read_optional(directory / "added_tokens.json").items():
            listed[int(i)] = {
                "content": text,
                "special": text in contents,
                "normalized": text not in contents,
            }
        return Named(listed, special, complete=False)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise CheckpointError(
            f"{directory}: malformed tokens in tokenizer_config.json or beside it ({error!r})"
        ) from None


def _read_optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _special_tokens_map(roles: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """The older file of roles; its additional tokens extend those of the configuration."""
    merged = {
        key: {**value, "special": True} if isinstance(value, dict) else value
        for key, value in roles.items()
    }
    more = [
        {**token, "special": True} if isinstance(token, dict) else token
        for token in roles.get("additional_special_tokens") or []
    ]
    if more:
        merged["additional_special_tokens"] = [
            *(config.get("additional_special_tokens") or []),
            *more,
        ]
    return merged


def _special_tokens(
    config: dict[str, Any], listed: dict[int, dict[str, Any]]
) -> list[dict[str, Any] | str]:
    known = {_content(token): token for token in listed.values()}
    qwen2 = (
        _QWEN2_ROLES
        if config.get("tokenizer_class") in ("Qwen2Tokenizer", "Qwen2TokenizerFast")
        else {}
    )
    found: list[dict[str, Any] | str] = []
    for role in _ROLES:
        token = config.get(role, qwen2.get(role))
        if token is None:
            continue
        if isinstance(token, str) and token in known:
            token = known[token]
        elif isinstance(token, str) and role in qwen2:
            token = {"content": token, "special": True, "normalized": False}
        found.append(token)
    extra = config.get("extra_special_tokens") or {}
    more = [
        *(config.get("additional_special_tokens") or []),
        *(extra.values() if isinstance(extra, dict) else extra),
    ]
    for token in [*found, *more]:
        _content(token)  # raises for what is no token
    return [*found, *more]


def _content(token: dict[str, Any] | str) -> str:
    text = token["content"] if isinstance(token, dict) else token
    if not isinstance(text, str):
        raise TypeError(f"{text!r} is not a token")
    return text


def _answer(connection: Connection, text: str, named: Named) -> None:
    """In a process beside ours, which may not outgrow the machine: send what the package says, or says against the file."""
    resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY, _MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (_SECONDS, _SECONDS))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the package's own words, where it panics
    try:
        connection.send(ask_package(text, named))
    except ValueError as error:
        connection.send(str(error))


def ask_package(text: str, named: Named) -> Package:
    """Let the package load a `tokenizer.json` and add the tokens named beside it. Raises ValueError with its complaint."""
    if re.search(r'"(padding|truncation)"\s*:\s*{', text):
        # They change no token, and a hostile padding length aborts the process.
        text = json.dumps(
            {**json.loads(text), "padding": None, "truncation": None}, ensure_ascii=False
        )
    try:
        tokenizer = Tokenizer.from_str(text)
        tokenizer.add_tokens(_missing(tokenizer, named))
        added = {
            i: (_normalized(tokenizer, token), token.special)
            for i, token in tokenizer.get_added_tokens_decoder().items()
        }
        return Package(added, sha256(str(tokenizer.encode(PROBE).ids).encode()).hexdigest())
    except KeyboardInterrupt:
        raise
    except (
        BaseException
    ) as error:  # it raises bare Exception, and where its own parser panics a BaseException
        raise ValueError(str(error).partition("\n")[0]) from None


def _missing(tokenizer: Tokenizer, named: Named) -> list[AddedToken]:
    """The tokens that transformers adds after it has loaded `tokenizer.json`, in its order.

    It adds every listed token again, which only changes properties of a token that is there, such as whether it is special.
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


def _added_token(token: dict[str, Any] | str) -> AddedToken:
    if isinstance(token, str):
        return AddedToken(token, special=True)
    return AddedToken(**{key: value for key, value in token.items() if key != "__type"})


def _normalized(tokenizer: Tokenizer, token: AddedToken) -> str:
    """llama.cpp takes control and user-defined tokens as already normalized, so normalize those that are not."""
    if token.normalized:
        return str(token.content)
    return str(
        tokenizer.decode(
            tokenizer.encode(token.content, add_special_tokens=False).ids, skip_special_tokens=False
        )
    )


def pre_tokenizer(checksum: str, directory: Path) -> str:
    """llama.cpp's name of the pre-tokenizer, by checksum. Raises CheckpointError where it is unknown."""
    if checksum not in PRE_TOKENIZERS:
        raise CheckpointError(
            f"{directory}: unknown pre-tokenizer (checksum {checksum[:12]}...): if this is a fine-tune with a changed vocabulary, "
            "name that of its base model (tokenizer_pre: qwen35 in config.yaml, or --tokenizer-pre qwen35)"
        )
    return PRE_TOKENIZERS[checksum]


def _merges(settings: dict[str, Any], path: Path) -> Value:
    """The merges as GGUF has them; encoded here, while the package is at work. Raises CheckpointError."""
    model = settings.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE":
        raise CheckpointError(f"{path}: only byte-level BPE tokenizers are supported")
    try:
        return Value.of(
            [_joined(merge) for merge in model["merges"]], GGUFValueType.ARRAY, GGUFValueType.STRING
        )
    except (LookupError, TypeError, AttributeError, GgufError) as error:
        raise CheckpointError(f"{path}: malformed merges ({error})") from None


def _joined(merge: str | list[str]) -> str:
    """A merge as GGUF has it: a space inside one of its two parts is written as byte-level BPE writes one."""
    if isinstance(merge, str):
        return merge
    text = " ".join(merge)
    return text if text.count(" ") == 1 else " ".join(part.replace(" ", _SPACE) for part in merge)


def vocabulary(
    model: dict[str, int], added: dict[int, tuple[str, bool]], size: int, directory: Path
) -> tuple[list[str], list[TokenType]]:
    """Texts and types of ids 0 to size-1; ids that the tokenizer leaves out are padding that is never produced."""
    last = max([*model.values(), *added], default=-1)
    if not 0 <= last < size:
        raise CheckpointError(
            f"{directory}: the tokenizer has ids up to {last}, the embedding {size} rows"
        )
    tokens, types = [f"[PAD{i}]" for i in range(size)], [TokenType.UNUSED] * size
    for token, i in model.items():
        tokens[i], types[i] = token, TokenType.NORMAL
    for i, (token, special) in added.items():
        control = special or _looks_special(token)
        tokens[i] = token if control else token.replace("\u2581", " ")
        types[i] = TokenType.CONTROL if control else TokenType.USER_DEFINED
    return tokens, types


def _looks_special(token: str) -> bool:
    """Some checkpoints do not mark their control tokens; upstream goes by these spellings."""
    return (
        token in ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
        or (token.startswith("<|") and token.endswith("|>"))
        or (token.startswith("<｜") and token.endswith("｜>"))
        or (token.startswith("<unused") and token.endswith(">"))
    )


def _special(directory: Path, settings: dict[str, Any]) -> SpecialVocab:
    """Special ids, flags and the template as the pinned upstream has them, with the help of an older gguf-py."""
    path = directory / "tokenizer_config.json"
    config = read_json(path) if path.exists() else {}
    read_json(directory / "config.json")  # ours names the file in its error
    flagless = {
        key: value
        for key, value in config.items()
        if not (key.startswith("add_") and key.endswith("_token"))
    }
    try:
        steps = _post_processors(settings, config, directory)
        special, template = (
            _read_special(directory, settings, used) for used in (config, flagless)
        )
        if not isinstance(special.chat_template, str | None):
            raise ValueError("a chat_template that is not one text")
    except (ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
        raise CheckpointError(f"{directory}: malformed tokenizer files ({error})") from None
    # What a post-processor adds goes before what tokenizer_config.json says; a byte-level one says that it adds nothing.
    flags: dict[str, bool] = {}
    for step in steps:
        if step == "ByteLevel":
            flags |= {key: False for key in ("bos", "eos") if key not in flags}
        else:
            flags |= template.add_special_token
    special.add_special_token = flags | {
        key: value for key, value in special.add_special_token.items() if key not in flags
    }
    return special


def _post_processors(
    settings: dict[str, Any], config: dict[str, Any], directory: Path
) -> list[str]:
    """The kinds of the post-processor's steps. Raises CheckpointError for what we do not write as upstream does."""
    post = settings.get("post_processor") or {}
    kinds = []
    for step in post.get("processors", [post]):
        if not step:
            continue
        kinds.append(step["type"])
        single = step.get("single") or [{}]
        first = single[0].get("SpecialToken", {}).get("id") if len(single) > 1 else None
        known = [
            entry.get("content") if isinstance(entry, dict) else entry
            for entry in map(config.get, ("bos_token", "cls_token"))
        ]
        if step["type"] not in ("ByteLevel", "TemplateProcessing") or (
            first and first not in known
        ):
            raise CheckpointError(
                f"{directory / 'tokenizer.json'}: a post-processor of type {step['type']}"
                + (
                    f" that begins with {first}, which is no bos_token of tokenizer_config.json"
                    if first
                    else ""
                )
                + ", which no known model of these architectures has: restore the base model's post_processor"
            )
    text = json.dumps(settings.get("normalizer"))
    if found := re.search(r'"type": "(Lowercase|StripAccents|BertNormalizer)"', text):
        raise CheckpointError(
            f"{directory / 'tokenizer.json'}: a normalizer of type {found[1]}, which no known model of these architectures has"
        )
    return kinds


def _read_special(
    directory: Path, settings: dict[str, Any], config: dict[str, Any]
) -> SpecialVocab:
    """gguf-py reads all of `tokenizer.json` again, of which it needs everything but the model: so that is what it gets."""
    rest = {key: value for key, value in settings.items() if key != "model"}
    with tempfile.TemporaryDirectory() as scratch:
        for path in directory.iterdir():
            if path.name not in ("tokenizer.json", "tokenizer_config.json"):
                (Path(scratch) / path.name).symlink_to(path)
        (Path(scratch) / "tokenizer.json").write_text(json.dumps(rest), encoding="utf-8")
        if config:
            (Path(scratch) / "tokenizer_config.json").write_text(
                json.dumps(config), encoding="utf-8"
            )
        return SpecialVocab(scratch)
