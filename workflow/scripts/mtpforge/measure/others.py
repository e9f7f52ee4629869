"""Other people's quantizations of a model: their distance from the same BF16 file, as JSON."""

from dataclasses import replace
from pathlib import Path

from mtpforge import recorded_digests
from mtpforge.errors import GgufError, ToolchainError
from mtpforge.gguf import split
from mtpforge.gguf.file_names import gguf_files
from mtpforge.gguf.reader import Gguf
from mtpforge.inject import match
from mtpforge.llama_cpp import memory
from mtpforge.llama_cpp.programs import LlamaCpp
from mtpforge.measure import perplexity
from mtpforge.measure.measurement import Other


def measure(
    path: Path, like: Path, logits: Path, llama: LlamaCpp, recorded: Path | None = None
) -> Other:
    """Measure a GGUF, given its first file, by the `logits` of the BF16 file `like`.

    A file that cannot be compared gets a `problem`. `recorded` are its digests. Raises ForgeError
    if anything else is wrong, DamagedError if the file has changed.
    """
    ours = split.read(like)
    sizes = [shard.stat().st_size for shard in _shards(path) if shard.exists()]
    version = llama.version("llama-perplexity")
    found = Other(name=path.name, bytes=sum(sizes), llama_cpp=str(version))
    try:
        with recorded_digests.reading(path, recorded) as theirs:
            found = replace(found, bits_per_weight=_bits(theirs))
            return _measured(found, theirs, ours, logits=logits, llama=llama)
    except GgufError as error:
        return replace(found, problem=str(error))


def other_model(theirs: Gguf, ours: Gguf) -> str | None:
    """How a GGUF shows that it is of another model; None if it is of the same.

    Raises GgufError if its metadata is malformed.
    """
    for name, found, expected in _properties(theirs, ours):
        if found != expected:
            return f"of another model: {name} is {str(found)[:100]}, not {str(expected)[:100]}"
    problems = match.tensor_problems(theirs.trunk, ours.trunk.tensors)
    return f"of another model, or incomplete: {problems[0]}" if problems else None


def _properties(theirs: Gguf, ours: Gguf) -> list[match.Difference]:
    """Properties to compare; the architecture decides which there are."""
    if theirs.architecture != ours.architecture:
        return [match.Difference("its architecture", theirs.architecture, ours.architecture)]
    counts = [len(each.need("tokenizer.ggml.tokens", list)) for each in (theirs, ours)]
    blocks = (theirs.head_blocks.start, ours.head_blocks.start)
    vocabulary = match.vocabulary_difference(theirs.metadata, ours.metadata)
    return [
        match.Difference("its number of tokens", *counts),
        match.Difference("its number of blocks", *blocks),
        *match.key_differences(theirs, ours),
        *([vocabulary] if vocabulary else []),
    ]


def _measured(found: Other, theirs: Gguf, ours: Gguf, logits: Path, llama: LlamaCpp) -> Other:
    problem = other_model(theirs, ours) or memory.too_large([theirs.path], llama)
    if not logits.stat().st_size:
        problem = "the BF16 file was not run, because it exceeds the memory"
    if problem:
        return replace(found, problem=problem)
    perplexity.vocabularies(ours.path, logits)
    llama.find("llama-perplexity")
    try:
        value, divergence = perplexity.against_reference(theirs.path, logits, llama)
    except perplexity.NoFiguresError:  # another try can succeed
        raise
    except ToolchainError as error:  # it has types, say, that llama.cpp does not know
        return replace(found, problem=str(error))
    return replace(found, perplexity=value, kl_divergence=divergence)


def _bits(opened: Gguf) -> float:
    infos = opened.tensors.values()
    weights = sum(info.elements for info in infos)
    return round(8 * sum(info.size for info in infos) / max(weights, 1), 3)


def _shards(path: Path) -> list[Path]:
    return [path.with_name(name) for name in gguf_files(path.name)]
