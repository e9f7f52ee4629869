"""The tokenizer of a checkpoint as GGUF metadata: tokens, types, merges, special tokens, pre-tokenizer, chat template.

Follows llama.cpp's `conversion/base.py` (0c1e57098) for byte-level BPE, with the `tokenizers` package in place of
transformers, so nothing that a checkpoint brings is executed. The chat template is copied and never rendered.
"""

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, SpecialVocab, TokenType
from tokenizers import Tokenizer

from .checkpoint import read_json
from .errors import CheckpointError

# Upstream tells pre-tokenizers apart by the ids that this text gets: data of convert_hf_to_gguf_update.py.
PROBE = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶\u200d🌫️ (multiple emojis concatenated) ✅ 🦙🦙 3 33 333 3333 "
    "33333 333333 3333333 33333333 3.3 3..3 3...3 កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天～ ------======= нещо на Български "
    "''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, 'RE you sure? 'M not sure I'll make it, "
    "'D you like some tea? We'Ve a'lL"
)

_SPACE = chr(ord(" ") + 256)

# sha256 of the probe's ids -> name of the pre-tokenizer in llama.cpp; the models that first had them.
PRE_TOKENIZERS = {
    "d30d75d9059f1aa2c19359de71047b3ae408c70875e8a3ccf8c5fba56c9d8af4": "qwen35",  # Qwen3.5-9B-Instruct
    "1444df51289cfa8063b96f0e62b1125440111bc79a52003ea14b6eac7016fd5f": "qwen35",  # MiniCPM-V-4_6
    "e636dc30a262dcc0d8c323492e32ae2b70728f4df7dfe9737d9f920a282b8aea": "qwen2",  # Qwen1.5-7B
    "d4540891389ea895b53b399da6ac824becc30f2fba0e9ddbb98f92e55ca0e97c": "qwen2",  # Qwen3-Embedding-0.6B
}


def load(directory: Path) -> Tokenizer:
    """The checkpoint's `tokenizer.json`. Raises CheckpointError."""
    return _parse(read_json(directory / "tokenizer.json"), directory)


def _parse(settings: dict[str, Any], directory: Path) -> Tokenizer:
    # Padding and truncation change no token, and a hostile padding length aborts the process.
    text = json.dumps({**settings, "padding": None, "truncation": None}, ensure_ascii=False)
    try:
        return Tokenizer.from_str(text)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the package raises bare Exception, and where its own parser panics a BaseException
        what = str(error).partition("\n")[0]
        raise CheckpointError(f"{directory / 'tokenizer.json'}: the tokenizers package cannot read it ({what})") from None


def pre_tokenizer(tokenizer: Tokenizer, directory: Path) -> str:
    """llama.cpp's name of the pre-tokenizer, by checksum. Raises CheckpointError where it is unknown."""
    checksum = sha256(str(tokenizer.encode(PROBE).ids).encode()).hexdigest()
    if checksum not in PRE_TOKENIZERS:
        raise CheckpointError(
            f"{directory}: unknown pre-tokenizer (checksum {checksum[:12]}...): if this is a fine-tune with a changed vocabulary, "
            "name that of its base model (tokenizer_pre: qwen35 in config.yaml, or --tokenizer-pre qwen35)"
        )
    return PRE_TOKENIZERS[checksum]


def describe(writer: GGUFWriter, directory: Path, vocab_size: int, pre: str | None) -> None:
    """Write all `tokenizer.*` keys; `vocab_size` rows of the embedding, `pre` overrides the checksum. CheckpointError."""
    settings = read_json(directory / "tokenizer.json")
    tokenizer = _parse(settings, directory)
    model = settings["model"]  # the tokenizers package has read it, so it is there
    if model.get("type") != "BPE":
        raise CheckpointError(f"{directory / 'tokenizer.json'}: only byte-level BPE tokenizers are supported")
    tokens, types = vocabulary(tokenizer, vocab_size, directory)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre or pre_tokenizer(tokenizer, directory))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([merge if isinstance(merge, str) else _joined(*merge) for merge in model["merges"]])
    _special(directory, settings).add_to_gguf(writer, quiet=True)


def _joined(left: str, right: str) -> str:
    """The two parts of a merge as GGUF has them: a space inside a part is written as byte-level BPE writes one."""
    return f"{left.replace(' ', _SPACE)} {right.replace(' ', _SPACE)}"


def vocabulary(tokenizer: Tokenizer, size: int, directory: Path) -> tuple[list[str], list[int]]:
    """Texts and types of ids 0 to size-1; ids that the tokenizer leaves out are padding that is never produced."""
    by_id = {token_id: token for token, token_id in tokenizer.get_vocab(with_added_tokens=True).items()}
    if not by_id or max(by_id) >= size:
        raise CheckpointError(f"{directory}: the tokenizer has ids up to {max(by_id, default=-1)}, the embedding {size} rows")
    added = tokenizer.get_added_tokens_decoder()
    tokens, types = [], []
    for i in range(size):
        token, kind = by_id.get(i, f"[PAD{i}]"), TokenType.NORMAL if i in by_id else TokenType.UNUSED
        if i in added:
            token, kind = _added_token(tokenizer, token, added[i].normalized, added[i].special)
        tokens.append(token)
        types.append(int(kind))
    return tokens, types


def _added_token(tokenizer: Tokenizer, token: str, normalized: bool, special: bool) -> tuple[str, TokenType]:
    """llama.cpp takes control and user-defined tokens as already normalized, so normalize those that are not."""
    if not normalized:
        token = tokenizer.decode(tokenizer.encode(token, add_special_tokens=False).ids, skip_special_tokens=False)
    if special or _looks_special(token):
        return token, TokenType.CONTROL
    return token.replace("\u2581", " "), TokenType.USER_DEFINED


def _looks_special(token: str) -> bool:
    """Some checkpoints do not mark their control tokens; upstream goes by these spellings."""
    return (
        token in ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
        or (token.startswith("<|") and token.endswith("|>"))
        or (token.startswith("<｜") and token.endswith("｜>"))
        or (token.startswith("<unused") and token.endswith(">"))
    )


def _special(directory: Path, settings: dict[str, Any]) -> SpecialVocab:
    """Special ids and the template as gguf-py reads them, with what upstream's newer copy does better."""
    for name in ("tokenizer_config.json", "config.json"):
        if (directory / name).exists():
            read_json(directory / name)  # ours names the file in its error
    try:
        special = SpecialVocab(directory)
        if not isinstance(special.chat_template, str | None):
            raise ValueError("a chat_template that is not one text")
        post = settings.get("post_processor") or {}
        steps = [step["type"] for step in post.get("processors", [post]) if step]
    except (ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
        raise CheckpointError(f"{directory}: malformed tokenizer files ({error})") from None
    if "ByteLevel" in steps:
        # A byte-level post-processor adds no token, whatever tokenizer_config.json says of bos and eos.
        special.add_special_token = {"bos": False, "eos": False, **special.add_special_token} | {"bos": False, "eos": False}
    return special
