"""How far a model's predictions move if one group of tensors is quantized and the rest is not."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from gguf.constants import GGMLQuantizationType

from mtpforge import progress, table
from mtpforge.errors import ConfigError, ToolchainError
from mtpforge.gguf import quant_types
from mtpforge.gguf.reader import Gguf
from mtpforge.io import atomic
from mtpforge.io.records import Record
from mtpforge.llama_cpp import memory
from mtpforge.llama_cpp.programs import LlamaCpp
from mtpforge.measure import perplexity
from mtpforge.quantize.llama_quantize import checked_rows
from mtpforge.search import groups, unit_files
from mtpforge.search.errors import check_rows
from mtpforge.search.settings import CHUNKS, PROBE, SMALL
from mtpforge.search.unit_files import UnitFiles


@dataclass(frozen=True, kw_only=True)
class Sensitivities(Record):
    """The results of sensitivity.py: for each group, the KL divergence in nats that it causes.

    The groups are units (`by` tensor), or classes and layers: see `groups`.
    """

    written_by: ClassVar[str] = "sensitivity.py"
    by: groups.By
    kl_divergence: dict[str, float]


@dataclass(frozen=True)
class _Kept(Record):
    """One result, for a search that goes on later."""

    written_by: ClassVar[str] = "sensitivity.py"
    kl_divergence: float


@dataclass(frozen=True)
class Search:
    """What decides the results: an unquantized model, its logits on a text, and the programs.

    `identity` stands for model, text and importance matrix in the names of results that are kept
    in `keep`.
    """

    source: Gguf
    logits: Path
    matrix: Path | None
    llama: LlamaCpp
    keep: Path
    identity: str

    def kept(self, names: Sequence[str]) -> Path:
        """Where the result of a group is kept."""
        content = json.dumps([self.identity, PROBE, *names])
        return self.keep / f"{hashlib.sha256(content.encode()).hexdigest()[:32]}.json"


def measure(search: Search, by: groups.By, piece: int = 1, pieces: int = 1) -> Sensitivities:
    """Try each group that has no result yet. Prints the number of runs first, then the time left.

    Of several `pieces`, only the groups of one, counted from 1, are tried and returned. All pieces
    can share the folder of results. Raises ConfigError if the model does not fit into the memory,
    or for logits or an importance matrix of another model; ToolchainError.
    """
    _check(search)
    search.keep.mkdir(parents=True, exist_ok=True)
    found = _of_piece(groups.tried(search.source, by), piece, pieces)
    missing = {search.kept(names): names for names in found.values()}
    todo = [names for path, names in missing.items() if not path.exists()]
    left = progress.Left()
    workers = _workers(search)
    for number, _ in enumerate(_results(search, todo, workers), 1):
        if number >= workers and left.due():
            progress.say(f"{number} of {len(todo)} runs{left.of(number, len(todo))}")
    results = {name: _Kept.read(search.kept(names)) for name, names in found.items()}
    return Sensitivities(
        by=by, kl_divergence={name: each.kl_divergence for name, each in results.items()}
    )


def _of_piece(tried: groups.Groups, piece: int, pieces: int) -> groups.Groups:
    """The groups of a piece. Those of the same tensors, which have one result, are in one piece."""
    distinct = dict.fromkeys(map(tuple, tried.values()))
    own = {names for place, names in enumerate(distinct) if place % pieces == piece - 1}
    return {name: names for name, names in tried.items() if tuple(names) in own}


def _check(search: Search) -> None:
    source = search.source
    types = dict(_probed(source, groups.matrices(source)))
    check_rows(source, types, search.matrix, checked_rows(source, search.matrix))
    if not search.logits.stat().st_size:
        raise ConfigError(
            f"{source.path}: does not fit into the memory, so its sensitivities cannot be measured "
            "here: set `sensitivity: prior`"
        )
    own, others = perplexity.vocabularies(source.path, search.logits)
    if own != others:
        raise ConfigError(
            f"{search.logits}: logits of another model: {others:,} tokens, and {source.path} has "
            f"{own:,}: run reference_logits.py again"
        )


def _workers(search: Search) -> int:
    """The number of runs at a time: several if the model is small."""
    size = _size(search.source)
    if size >= SMALL:
        return 1
    return memory.at_a_time(size, search.llama.processors, memory.usable())


def _size(source: Gguf) -> int:
    return sum(info.size for info in source.tensors.values())


def _results(search: Search, todo: Sequence[Sequence[str]], workers: int) -> Iterator[None]:
    """Try groups, `workers` at a time; a failure ends the others."""
    if not todo:
        progress.say("no runs, because all results are kept")
        return
    source = search.source
    types = dict(_probed(source, groups.matrices(source)))
    _say_before(len(todo), workers, _size(source), unit_files.disk(source, types))
    with atomic.scratch_folder(search.kept(["shards", *todo[0]])) as folder:
        shards = UnitFiles.write(source, folder, types, search.matrix, search.llama)
        search = replace(search, llama=replace(search.llama, quiet=True))
        if workers == 1:
            yield from map(_try(search, shards), todo)
            return
        one = replace(search, llama=replace(search.llama, threads=1))
        pool = ThreadPoolExecutor(workers)
        try:
            yield from pool.map(_try(one, shards), todo)
        finally:
            pool.shutdown(cancel_futures=True)


def _say_before(runs: int, workers: int, size: int, disk: int) -> None:
    """Print what a search takes."""
    at_a_time = f"{workers} at a time" if workers > 1 else "one at a time"
    needed = f"{table.size(workers * memory.needed(size))} of memory, {table.size(disk)} of disk"
    progress.say(f"{runs} runs of {CHUNKS} chunks, {at_a_time}: {needed}")


def _try(search: Search, shards: UnitFiles) -> Callable[[Sequence[str]], None]:
    def measure_one(names: Sequence[str]) -> None:
        with atomic.scratch_folder(search.kept(names)) as folder:
            made = shards.link(names, folder)
            try:
                moved = perplexity.mean_divergence(made, search.logits, search.llama)
            except ToolchainError as error:
                raise ToolchainError(f"with {_first(names)} at {PROBE}, {error}") from None
        _Kept(moved).write(search.kept(names))

    return measure_one


def _first(names: Sequence[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _probed(source: Gguf, names: Sequence[str]) -> Iterator[tuple[str, GGMLQuantizationType]]:
    for name in names:
        kind = quant_types.effective_type(PROBE, source.tensors[name].shape[-1])
        yield name, GGMLQuantizationType[kind]
