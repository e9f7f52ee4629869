"""Quantization of a GGUF with `llama-quantize`: the head at a type of its own, other tensors by recipe where one is given.

llama.cpp has no rule for a NextN head, so the head's type is an override whose pattern comes from the file's own block
count. The program writes its output in place, so it is given a temporary name.
"""

import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import yaml
from gguf.constants import GGUFValueType

from . import gguf_file, mixture, programs, quant_types
from .atomic import replacing
from .errors import ConfigError, GgufError, ToolchainError
from .gguf_file import PADDING, Gguf, TensorInfo, Value
from .imatrix import read as read_imatrix

BUFFER = ["--max-buffer-size", "256"]
"""MiB of a tensor that llama-quantize works on at a time. The bytes are the same, and no tensor is too large for the memory; by
default it takes gigabytes, and a virtual machine can be longer about getting them than it is about quantizing."""

NO_HEAD = "none"
"""What stands for a head's type where no head is wanted."""

Recipe = Sequence[tuple[str, str]]
"""Ordered (pattern, tensor type); the first pattern that is found in a tensor's name decides."""


def quantize(
    source: Path, out: Path | None, file_type: str, head: str | None = None, recipe: Recipe = (), imatrix: Path | None = None,
    threads: int = 0, bin_dir: Path = programs.DEFAULT_BIN, log: Path | None = None,
) -> None:  # fmt: skip
    """Quantize `source` (BF16) to `out`; `head` as `read_head` takes it (default Q8_0, for an unquantized file its own type).

    The mixture of types is shown first, and without `out` nothing else is done. Raises ConfigError for types that cannot be,
    ToolchainError where the program fails.
    """
    opened = gguf_file.read(source)
    types = choose(opened, file_type, head, recipe, imatrix, bin_dir, log)
    if out:
        with replacing(out) as temporary:
            run(opened, temporary, types, file_type, imatrix, threads, bin_dir, log)


def choose(
    source: Gguf, file_type: str, head: str | None = None, recipe: Recipe = (), imatrix: Path | None = None,
    bin_dir: Path = programs.DEFAULT_BIN, log: Path | None = None,
) -> mixture.Types:  # fmt: skip
    """The type that each tensor will have, in the order of the file that llama-quantize writes; the table of them is shown.

    Raises ConfigError for types that cannot be, or not without an importance matrix that covers them.
    """
    overrides = plan_overrides(source, file_type, head, recipe)
    rows = read_imatrix(imatrix) if imatrix else {}
    with _prepared(bin_dir, imatrix) as (command, place):
        shape = gguf_file.lay_out(place / "source.gguf", without_vocabulary(source), list(source.tensors.values()))
        options = [word for pattern, kind in overrides for word in ("--tensor-type", f"{pattern}={kind.lower()}")]
        dry_runs = [[*command, *more, "--dry-run", shape.path, file_type] for more in ([], options)]
        default, chosen = (mixture.parse(said, source) for said in programs.outputs(dry_runs, place))
    table = mixture.show(source, default, chosen)
    print(table, flush=True)
    if log:
        log.write_text(f"{table}\n", encoding="utf-8")
    mixture.check_imatrix(source, chosen, file_type, imatrix, rows)
    return chosen


def run(
    source: Gguf, out: Path, types: mixture.Types, file_type: str, imatrix: Path | None = None,
    threads: int = 0, bin_dir: Path = programs.DEFAULT_BIN, log: Path | None = None,
) -> Gguf:  # fmt: skip
    """Let llama-quantize write `out`, in place: the tensors of `source`, which may be some of a model's, at `types`.

    Each type is given explicitly, because the usual ones depend on which other tensors there are. Raises ToolchainError.
    """
    wanted = {name: kind for name, kind in types.items() if name in source.tensors}
    with _prepared(bin_dir, imatrix) as (command, place):
        lines = [rf"^{re.escape(name)}$={kind.name.lower()}" for name, kind in wanted.items()]
        (place / "types.txt").write_text("\n".join(lines), encoding="utf-8")
        command += ["--tensor-type-file", place / "types.txt"]
        command += BUFFER if programs.knows(command[0], BUFFER[0]) else []  # b10605 has not
        command += [source.path.resolve(), out.resolve(), file_type, *([str(threads)] if threads else [])]
        programs.call(command, log, cwd=place, append=True)
    written = gguf_file.read(out)  # whatever it wrote must at least be whole before it gets its name
    if {name: info.type for name, info in written.tensors.items()} != wanted:
        raise ToolchainError(f"{out}: llama-quantize made other types than it was told: is it of another version?")
    return written


def without_vocabulary(source: Gguf) -> dict[str, Value]:
    """The metadata that llama-quantize needs for a part of `source`; half a million strings take it longer than many a tensor.

    Of the vocabulary that is the size, by which llama.cpp tells some models apart.
    """
    kept = {key: value for key, value in source.metadata.items() if not key.startswith("tokenizer.") and key != PADDING}
    tokens = source.metadata.get("tokenizer.ggml.tokens")
    if tokens is not None and tokens.item_type is not None:
        kept.setdefault(f"{source.architecture}.vocab_size", Value.of(len(tokens), GGUFValueType.UINT32))
    return kept


@contextmanager
def _prepared(bin_dir: Path, imatrix: Path | None) -> Iterator[tuple[list[str | Path], Path]]:
    """A command that has the importance matrix, and the folder that it must be run in."""
    with tempfile.TemporaryDirectory() as folder:
        command: list[str | Path] = [programs.find(bin_dir, "llama-quantize")]
        if imatrix:
            (Path(folder) / imatrix.name).symlink_to(imatrix.resolve())  # the path that it is given gets into the file
            command += ["--imatrix", imatrix.name]
        yield command, Path(folder)


def plan_overrides(source: Gguf, file_type: str, head: str | None, recipe: Recipe) -> list[tuple[str, str]]:
    """The ordered overrides: the head's first, so that no pattern of a recipe reaches into it. Raises ConfigError."""
    quant_types.check_file_type(file_type)
    for pattern, _ in recipe:
        if not any(re.search(pattern, name) for name in source.tensors):
            raise ConfigError(f"tensor pattern {pattern!r} matches no tensor of {source.path}: is it misspelt?")
    types = head_types(source, read_head(head or default_head(file_type)))
    if file_type in quant_types.UNQUANTIZED:
        if recipe or set(types.values()) - {file_type}:
            raise ConfigError(
                f"{file_type} is not quantized, so llama-quantize ignores recipes and head types: keep the head at {file_type}"
            )
        return []
    return [(rf"^{re.escape(name)}$", kind) for name, kind in types.items()] + list(recipe)


def read_head(text: str) -> Recipe:
    """The types of a head as a recipe, of `Q8_0` or, with patterns that go first, `Q4_K,eh_proj=Q8_0`. Raises ConfigError."""
    kind, *exceptions = text.split(",")
    recipe = [(pattern, name) for pattern, _, name in (entry.partition("=") for entry in exceptions)]
    for pattern, _ in recipe:
        check_pattern(pattern)
    recipe.append(("", kind))  # is found in every name
    for _, name in recipe:
        quant_types.check_tensor_type(name)
    return recipe


def head_types(source: Gguf, recipe: Recipe) -> dict[str, str]:
    """The type that each matrix of the head is to have. Raises ConfigError for a pattern that none of them matches."""
    prefixes = tuple(f"blk.{block}." for block in head_blocks(source))
    names = [name for name, info in source.tensors.items() if name.startswith(prefixes) and quantizable(info)]
    for pattern, _ in recipe[:-1]:
        if names and not any(re.search(pattern, name) for name in names):
            raise ConfigError(f"tensor pattern {pattern!r} matches no matrix of the head: {', '.join(names)}")
    return {name: kind for name in names if (kind := by_recipe(name, recipe))}


def by_recipe(name: str, recipe: Recipe) -> str | None:
    """The type of the first pattern that is found in a tensor's name; None where there is none."""
    return next((kind for pattern, kind in recipe if re.search(pattern, name)), None)


def head_blocks(source: Gguf) -> range:
    """The numbers of the head's blocks, the last ones by the file's own metadata; empty without a head. Raises GgufError."""
    architecture = source.architecture
    blocks, heads = (
        source.need(f"{architecture}.block_count", int),
        source.get(f"{architecture}.nextn_predict_layers", 0),
    )
    if type(heads) is not int or not 0 <= heads < blocks or heads > len(source.tensors):
        raise GgufError(f"{source.path}: {str(heads)[:40]} head blocks of {blocks}: that cannot be")
    return range(blocks - heads, blocks)


def quantizable(info: TensorInfo) -> bool:
    """Whether llama-quantize changes this tensor: a matrix that is no norm, router or convolution (`llama-quant.cpp`)."""
    kept = ("_norm.weight", "ffn_gate_inp.weight", "ssm_conv1d.weight")
    return sum(n > 1 for n in info.shape) > 1 and info.name.endswith(".weight") and not info.name.endswith(kept)


def default_head(file_type: str) -> str:
    """Q8_0 costs a head next to nothing of its agreement; an unquantized file keeps its head as it is."""
    return file_type if file_type in quant_types.UNQUANTIZED else "Q8_0"


def check_pattern(pattern: str) -> None:
    """llama-quantize lower-cases patterns and splits its file on white space and `=`. Raises ConfigError."""
    if not pattern or re.search(r"[\s=]", pattern) or pattern != pattern.lower():
        raise ConfigError(f"tensor pattern {pattern!r}: must be lower case, without white space and '='")
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"tensor pattern {pattern!r} is no regular expression ({error})") from None


def read_recipe(path: Path | None) -> Recipe:
    """A recipe from a YAML file that maps patterns to types, in order; none for None. Raises ConfigError."""
    if path is None:
        return ()
    try:
        table = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML ({error})") from None
    if not isinstance(table, dict) or any(not isinstance(word, str) for entry in table.items() for word in entry):
        raise ConfigError(f"{path}: must map tensor patterns to types, as in `attn_.*: Q6_K`")
    for pattern, kind in table.items():
        check_pattern(pattern)
        quant_types.check_tensor_type(kind)
    return list(table.items())
