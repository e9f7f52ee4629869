"""Importance matrices: what one covers, read strictly, and a new one from a text by `llama-imatrix`."""

import os
import tempfile
from pathlib import Path
from typing import TypeAlias

from gguf.constants import GGMLQuantizationType, GGUFValueType

from mtpforge.errors import ConfigError, GgufError, ToolchainError
from mtpforge.gguf import reader
from mtpforge.io.atomic import replacing
from mtpforge.io.ranges import FileRange, sha256
from mtpforge.llama_cpp import process, programs

CHUNK = 512
"""Tokens that are run through the model at a time, and what the sums are added up by: another number gives other bytes."""

_NAME_LIMIT = 63  # GGML_MAX_NAME less the closing zero


def compute(
    model: Path, text: Path, out: Path, threads: int = 0, bin_dir: Path = programs.DEFAULT_BIN, log: Path | None = None
) -> None:  # fmt: skip
    """Run a text (UTF-8) through a GGUF and write the importance matrix of its trunk's tensors to `out`, a GGUF.

    Raises ConfigError for a text that is too short, ToolchainError where the program fails.
    """
    program, least = programs.find(bin_dir, "llama-imatrix"), 2 * CHUNK
    short = f"{text}: is too short for an importance matrix: it must have at least {least:,} tokens, in English {4 * least:,} letters"
    if (
        len(text.read_bytes().strip()) < least
    ):  # a token has a byte or more; what the program says as it fails can get lost
        raise ConfigError(short)
    with replacing(out) as temporary, tempfile.TemporaryDirectory() as place:
        (Path(place) / text.name).symlink_to(text.resolve())  # it records the path that it is given
        command: list[str | Path] = [
            program,
            "-m",
            model.resolve(),
            "-f",
            text.name,
            "-o",
            temporary.resolve(),
            "--output-format",
            "gguf",
        ]
        command += [word for option in ("-c", "-b", "-ub") for word in (option, str(CHUNK))]
        try:
            process.call(
                [*command, *(["-t", str(threads)] if threads else [])], log, cwd=Path(place)
            )
        except ToolchainError as error:
            if "you need at least" in str(error):
                raise ConfigError(short) from None
            raise
        read(temporary)


def read(path: Path) -> dict[str, int]:
    """The tensors that an importance matrix covers, each with its number of values. Raises GgufError.

    Both formats: GGUF, and the older one, commonly called .dat.
    """
    return {name: values for name, (values, _) in _rows(path).items()}


def digests(path: Path) -> dict[str, str]:
    """The sha256 of what it has of each tensor, sums and counts. Raises GgufError."""
    return {name: "".join(map(sha256, ranges)) for name, (_, ranges) in _rows(path).items()}


Row: TypeAlias = tuple[int, list[FileRange]]
"""The number of a tensor's values, and where all that it has of this tensor lies."""


def _rows(path: Path) -> dict[str, Row]:
    with path.open("rb") as file:
        rows = _read_gguf(path) if file.read(4) == reader.MAGIC else _read_legacy(path)
    if not rows:
        raise GgufError(f"{path}: an importance matrix of no tensor")
    return rows


def _read_gguf(path: Path) -> dict[str, Row]:
    """Each tensor as NAME.in_sum2, a sum of squares for each column of each expert, and NAME.counts."""
    opened = reader.read(path)
    for key, kind in (
        ("datasets", GGUFValueType.ARRAY),
        ("chunk_count", GGUFValueType.UINT32),
        ("chunk_size", GGUFValueType.UINT32),
    ):
        value = opened.metadata.get(f"imatrix.{key}")
        if value is None or value.type is not kind:
            raise GgufError(
                f"{path}: no importance matrix: metadata key imatrix.{key} is missing or of the wrong type"
            )
    rows = {}
    for name, sums in opened.tensors.items():
        tensor = name.removesuffix(".in_sum2")
        if tensor != name:
            counts = opened.tensors.get(f"{tensor}.counts")
            if (
                counts is None
                or {sums.type, counts.type} != {GGMLQuantizationType.F32}
                or sums.elements % counts.elements
            ):
                raise GgufError(
                    f"{path}: {name} does not go with its counts, or one of them is not F32"
                )
            rows[tensor] = sums.elements, [opened.ranges[name], opened.ranges[counts.name]]
    return rows


def _read_legacy(path: Path) -> dict[str, Row]:
    """Little-endian int32 and float32: the number of entries, each entry's name, calls and values, then calls and data set."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size

        def number() -> int:
            return int.from_bytes(file.read(bounded(4, 1)), "little", signed=True)

        def bounded(count: int, unit: int, limit: int = size) -> int:
            if not 0 <= count <= limit or count * unit > size - file.tell():
                raise GgufError(
                    f"{path}: no importance matrix, or truncated: {count:,} at byte {file.tell():,} cannot be"
                )
            return count * unit

        rows = {}
        for _ in range(number()):
            name = file.read(bounded(number(), 1, _NAME_LIMIT)).decode("utf-8", errors="replace")
            if name in rows or not name.isprintable():
                raise GgufError(
                    f"{path}: no importance matrix: {name[:_NAME_LIMIT]!r} stands twice or is no tensor's name"
                )
            start = file.tell()
            number()
            values = number()
            end = file.seek(bounded(values, 4), os.SEEK_CUR)
            rows[name] = values, [FileRange(path, start, end - start)]
        if file.tell() < size:  # some have neither
            number()
            bounded(number(), 1)
    return rows
