"""The tokenizer of a checkpoint as GGUF metadata: tokens, types, merges and pre-tokenizer.

Follows llama.cpp's `conversion/base.py` (b11434) for byte-level BPE, with the `tokenizers`
package instead of transformers, so no code of a checkpoint runs.
"""

import json
import os
import re
import resource
import signal
from dataclasses import dataclass
from hashlib import sha256
from multiprocessing import Pipe, Process
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType
from gguf.constants import GGUFValueType, Keys
from tokenizers import AddedToken, Tokenizer

from mtpforge.convert import added_tokens
from mtpforge.convert.added_tokens import AddedTokens
from mtpforge.convert.special_tokens import special_vocab
from mtpforge.errors import CheckpointError, GgufError
from mtpforge.gguf.metadata import Value
from mtpforge.io.text import MANY_ENTRIES, check_json, decode, parse_json, read_bytes
from mtpforge.llama_cpp import pre_tokenizers

# Upstream recognizes a pre-tokenizer by the ids of this text (convert_hf_to_gguf_update.py).
PROBE = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶\u200d🌫️ (multiple "
    "emojis concatenated) ✅ 🦙🦙 3 33 333 3333 "
    "33333 333333 3333333 33333333 3.3 3..3 3...3 កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天～ "
    "------======= нещо на Български "
    "''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, 'RE you sure? 'M "
    "not sure I'll make it, "
    "'D you like some tea? We'Ve a'lL"
)
# sha256 of the probe's ids -> llama.cpp's name of the pre-tokenizer, and the first model with it.
PRE_TOKENIZERS = {
    # Qwen3.5-9B-Instruct
    "d30d75d9059f1aa2c19359de71047b3ae408c70875e8a3ccf8c5fba56c9d8af4": "qwen35",
    # MiniCPM-V-4_6
    "1444df51289cfa8063b96f0e62b1125440111bc79a52003ea14b6eac7016fd5f": "qwen35",
    # Qwen1.5-7B
    "e636dc30a262dcc0d8c323492e32ae2b70728f4df7dfe9737d9f920a282b8aea": "qwen2",
    # Qwen3-Embedding-0.6B
    "d4540891389ea895b53b399da6ac824becc30f2fba0e9ddbb98f92e55ca0e97c": "qwen2",
}

# Limits of the process that reads tokenizer.json: several times what real ones take. Each has a
# part for any file, and one for each byte of it.
_MEMORY = 32 << 20, 100  # bytes; real ones take 30 for each byte
_SECONDS = 0.5, 1e-6  # of CPU; real ones take a tenth

_ASLEEP = 5
"""Tenths of a second."""

_SPACE = chr(ord(" ") + 256)


def describe(writer: GGUFWriter, directory: Path, vocab_size: int, pre: str | None) -> None:
    """Write all `tokenizer.*` keys. Raises CheckpointError, or ConfigError for an unknown `pre`.

    `vocab_size` is the number of rows of the embedding; `pre` overrides the pre-tokenizer that the
    checksum gives.
    """
    if pre:
        pre_tokenizers.check(pre)
    path = directory / "tokenizer.json"
    content = read_bytes(path)
    check_json(path, content, entries=MANY_ENTRIES)  # before the child reads it
    text = decode(path, content)
    del content
    # The package runs in a child process: it takes as long as everything else together, and a
    # hostile file may crash it.
    receiver, sender = Pipe(duplex=False)
    child = Process(target=_child, args=(sender, text, added_tokens.read(directory)), daemon=True)
    child.start()
    sender.close()
    try:
        settings = parse_json(path, text, entries=MANY_ENTRIES)
        merges = _merges(settings, path)
    except BaseException:
        child.kill()  # multiprocessing would end it in a way that prints a traceback
        raise
    del text
    loaded = _receive(receiver, child, path)
    model = settings["model"]["vocab"]  # it exists: the package has loaded it
    tokens, types = vocabulary(model, loaded.added, size=vocab_size, directory=directory)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre or pre_tokenizer(loaded.checksum, directory))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_key_value(Keys.Tokenizer.MERGES, merges, GGUFValueType.ARRAY)
    special_vocab(directory, settings, vocab_size).add_to_gguf(writer, quiet=True)
    if names := writer.kv_data[0].get(Keys.Tokenizer.CHAT_TEMPLATES):
        names.value.sort()  # gguf-py writes them in the order of a set, which varies


def pre_tokenizer(checksum: str, directory: Path) -> str:
    """Return llama.cpp's name of a pre-tokenizer. Raises CheckpointError if it is unknown."""
    if checksum not in PRE_TOKENIZERS:
        raise CheckpointError(
            f"{directory}: unknown pre-tokenizer (checksum {checksum[:12]}...): if this is a "
            "fine-tune with a changed vocabulary, set that of its base model "
            "(tokenizer_pre: qwen35 in config.yaml, or --tokenizer-pre qwen35)"
        )
    return PRE_TOKENIZERS[checksum]


def vocabulary(
    model: dict[str, int], added: dict[int, tuple[str, bool]], size: int, directory: Path
) -> tuple[list[str], list[TokenType]]:
    """Return texts and types of ids 0 to size-1. Ids without a token are unused padding."""
    last = max([*model.values(), *added], default=-1)
    if not 0 <= last < size:
        raise CheckpointError(
            f"{directory}: the tokenizer has ids up to {last}, the embedding only {size} rows: "
            "use the tokenizer with which the model was saved"
        )
    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [TokenType.UNUSED] * size
    for token, i in model.items():
        tokens[i] = token
        types[i] = TokenType.NORMAL
    for i, (token, special) in added.items():
        control = special or _looks_special(token)
        tokens[i] = token if control else token.replace("\u2581", " ")
        types[i] = TokenType.CONTROL if control else TokenType.USER_DEFINED
    return tokens, types


def _looks_special(token: str) -> bool:
    """Whether upstream takes an unmarked token for a control token because of its spelling."""
    return (
        token in ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
        or (token.startswith("<|") and token.endswith("|>"))
        or (token.startswith("<｜") and token.endswith("｜>"))
        or (token.startswith("<unused") and token.endswith(">"))
    )


def _merges(settings: dict[str, Any], path: Path) -> Value:
    """Return the merges as GGUF stores them. Raises CheckpointError.

    Encoded here, while the child process loads the tokenizer.
    """
    model = settings.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE":
        raise CheckpointError(f"{path}: only byte-level BPE tokenizers are supported")
    try:
        merges = [_joined(merge) for merge in model["merges"]]
        return Value.of(merges, GGUFValueType.ARRAY, GGUFValueType.STRING)
    except (LookupError, TypeError, AttributeError, GgufError) as error:
        raise CheckpointError(f"{path}: malformed merges ({error})") from None


def _joined(merge: str | list[str]) -> str:
    """Join the parts of a merge; a space inside a part is written as byte-level BPE does."""
    if isinstance(merge, str):
        return merge
    text = " ".join(merge)
    return text if text.count(" ") == 1 else " ".join(part.replace(" ", _SPACE) for part in merge)


# ── the tokenizers package, in a separate process ──


@dataclass(frozen=True)
class LoadedTokenizer:
    """Answers of the `tokenizers` package about a `tokenizer.json`."""

    added: dict[int, tuple[str, bool]]
    """Tokens outside the model's own vocabulary: id -> normalized text, whether special."""
    checksum: str
    """sha256 of the probe's ids."""


def load(text: str, named: AddedTokens) -> LoadedTokenizer:
    """Load a `tokenizer.json` and add the tokens named beside it.

    Raises ValueError with the package's message.
    """
    if re.search(r'"(padding|truncation)"\s*:\s*{', text):
        # They change no token, and a hostile padding length aborts the process.
        settings = {**json.loads(text), "padding": None, "truncation": None}
        text = json.dumps(settings, ensure_ascii=False)
    try:
        tokenizer = Tokenizer.from_str(text)
        tokenizer.add_tokens(added_tokens.missing(tokenizer, named))
        added = {
            i: (_normalized(tokenizer, token), token.special)
            for i, token in tokenizer.get_added_tokens_decoder().items()
        }
        ids = tokenizer.encode(PROBE).ids
        return LoadedTokenizer(added, sha256(str(ids).encode()).hexdigest())
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # bare Exception, and BaseException if its parser panics
        raise ValueError(str(error).partition("\n")[0]) from None


def _child(sender: Connection, text: str, named: AddedTokens) -> None:
    """Send the loaded tokenizer or an error message, within limits of memory and time."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the package prints its panics
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads take memory
    _limit_memory(_MEMORY[0] + _MEMORY[1] * len(text))
    signal.setitimer(signal.ITIMER_PROF, _SECONDS[0] + _SECONDS[1] * len(text))
    try:
        sender.send(load(text, named))
    except ValueError as error:
        sender.send(str(error))


def _limit_memory(more: int) -> None:
    """Let this process allocate that many bytes more than it has."""
    usage = Path("/proc/self/statm")
    if usage.exists():
        used = int(usage.read_text().split()[5]) * resource.getpagesize()
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        limit = used + more if hard == resource.RLIM_INFINITY else min(used + more, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def _receive(receiver: Connection, child: Process, path: Path) -> LoadedTokenizer:
    asleep = 0
    while not receiver.poll(0.1):
        # Without memory the package can wait for itself, which takes no time of the processor.
        asleep = asleep + 1 if _is_asleep(child) else 0
        if asleep > _ASLEEP:
            child.kill()
    try:
        answer = receiver.recv()
    except EOFError:
        answer = "it crashed, or needed too much memory or time"
    child.join()
    if not isinstance(answer, LoadedTokenizer):
        raise CheckpointError(f"{path}: the tokenizers package cannot read it ({answer})")
    return answer


def _is_asleep(child: Process) -> bool:
    state = Path(f"/proc/{child.pid}/stat")
    return state.exists() and state.read_text().rpartition(") ")[2].startswith("S")


def _normalized(tokenizer: Tokenizer, token: AddedToken) -> str:
    """Normalize a token, because llama.cpp takes control and user-defined tokens as normalized."""
    if token.normalized:
        return str(token.content)
    ids = tokenizer.encode(token.content, add_special_tokens=False).ids
    return str(tokenizer.decode(ids, skip_special_tokens=False))
