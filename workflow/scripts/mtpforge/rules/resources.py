"""Threads, memory, disk and time that jobs ask a cluster for.

They follow from the sizes of checkpoints and the types of variants, by the same reckoning as a
forecast. They are generous: a job that gets too little is killed. They are no parameters, so a
change reruns nothing.
"""

import inspect
import json
import math
import mmap
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from mtpforge import processors
from mtpforge.errors import ForgeError
from mtpforge.forecast import costs, sweep
from mtpforge.forecast.costs import Cost, Machine, ProgramSpeed, Tokens
from mtpforge.gguf import quant_types
from mtpforge.gguf.file_names import gguf_files
from mtpforge.gguf.split import parse_size
from mtpforge.io.text import read_json, text_files
from mtpforge.prompts import read_measured
from mtpforge.rules import layout, lean
from mtpforge.rules.config import Model
from mtpforge.rules.fetch import given_paths, listed, local_size
from mtpforge.rules.stage import Stage, Wildcards
from mtpforge.rules.variant import (
    HubFile,
    HubRepository,
    Imatrix,
    ImatrixText,
    OwnBase,
    Source,
    Variant,
)
from mtpforge.search.settings import CHUNKS, STEP

DOWNLOADS = 2
"""How many can run at a time, unless the profile says otherwise."""
UPLOADS = 1
"""As long as a commit is made, a repository takes no other."""
ALL = 1_000_000
"""Processors of a job that runs alone: Snakemake lowers it to those that it may use."""
UNKNOWN = 20 << 30
"""Bytes at BF16 of a checkpoint that is not listed yet."""
_HEAD = 0.05
"""The most that a head is of a checkpoint."""
_PYTHON = 1 << 30
"""Memory of a program that reads files in pieces, and room for what a job takes besides."""
_COMPILER = 1 << 30
"""Memory for each compiler that runs."""
_BUILD = 4 << 30
"""Disk of llama.cpp's build, or of the converter's environment."""
_LARGEST_TENSOR = 10 << 30
_EMBEDDINGS = 4 << 30
_SHARD = 20 << 30
"""Bytes that a build shard by shard holds at most besides its results."""
_MIXTURE = 1.5
"""Bits per weight that a file can have beyond its main type: embeddings, output and head."""
_VOCABULARY = 300_000
_TEXT = 500_000
"""Bytes of a text for an importance matrix that is not there."""
_DISK = 12e6
_NETWORK = 2e6
"""Slow, in bytes a second."""
_PROGRAMS = ProgramSpeed(server=30, token=0.03, drafted=0.03, quantize=3)
"""Those of a slow machine."""
_BANDWIDTH = 1.3e9
"""Bytes of weights that it reads a second, to make tokens."""
_MACHINE = Machine(threads=1, memory=0, disk=_DISK, bandwidth=_BANDWIDTH, programs=_PROGRAMS)
"""A slow one, whose memory keeps no file."""
_CLASSES = 80
"""Classes of tensors and layers of a large model."""
_TENSORS = 600
_ATTEMPTS = 4
_LEAST_SECONDS = 1200
_MOST_MINUTES = 24 * 60
"""Partitions of a cluster often allow no more."""
_LEAST_DISK = 100e6
_CUDA = b"libcuda"


@dataclass(frozen=True)
class Needs:
    """Bytes of memory and of new files, and seconds."""

    memory: float = _PYTHON / 2
    disk: float = 0
    seconds: float = 0


def free_downloads(workflow: Any) -> None:
    """Let downloads run beside jobs that use all processors of this machine.

    So may the compilation of programs that these jobs do not run. Snakemake starts nothing while
    all cores are taken. So it gets more of them here, and jobs other than downloads and
    compilations are limited by `processors` and by the threads of one job. A job that runs alone
    takes all `processors`, however many threads it has.
    """
    cores = workflow.global_resources["_cores"].value
    if not (workflow.is_main_process and workflow.local_exec and cores):
        return
    if "download" not in workflow.global_resources:
        workflow.global_resources["download"] = DOWNLOADS
    downloads = workflow.global_resources["download"].value
    if "upload" not in workflow.global_resources:
        workflow.global_resources["upload"] = UPLOADS
    workflow.global_resources["processors"] = cores
    workflow.global_resources["_cores"] = 2 * cores + downloads
    most = workflow.resource_settings.max_threads
    workflow.resource_settings.max_threads = min(most or cores, cores)


class ResourceRules(Stage):
    """What the jobs of each rule need."""

    def asked(
        self, needs: Callable[..., Needs], beside: bool = False, alone: bool = False
    ) -> dict[str, Callable[..., int]]:
        """A rule's `mem_mb`, `disk_mb` and `runtime` in minutes; more of them in further attempts.

        `needs` takes the job's wildcards, and its threads if they matter: those of the machine that
        runs Snakemake say nothing of a node.
        Memory is at most `memory` of the configuration. `processors` are its threads: none if it
        may run `beside` jobs that use all of them, all if it must run `alone`.
        """
        most = parse_size(self.config.memory) if self.config.memory else math.inf
        counts = "threads" in inspect.signature(needs).parameters

        def found(wildcards: Wildcards, threads: int) -> Needs:
            return needs(wildcards, threads) if counts else needs(wildcards)

        def mem_mb(wildcards: Wildcards, threads: int, attempt: int) -> int:
            return math.ceil(min(attempt * found(wildcards, threads).memory, most) / 1e6)

        def disk_mb(wildcards: Wildcards, threads: int) -> int:
            return math.ceil(max(found(wildcards, threads).disk, _LEAST_DISK) / 1e6)

        def runtime(wildcards: Wildcards, threads: int, attempt: int) -> int:
            seconds = _LEAST_SECONDS + found(wildcards, threads).seconds
            return min(math.ceil(attempt * seconds / 60), _MOST_MINUTES)

        def processors(_: Wildcards, threads: int) -> int:
            return ALL if alone else threads

        asked: dict[str, Callable[..., int]] = {
            "mem_mb": mem_mb, "disk_mb": disk_mb, "runtime": runtime
        }  # fmt: skip
        if not beside:
            asked["processors"] = processors
        for function in asked.values():  # Snakemake asks for it several times a job
            vars(function)["__signature__"] = inspect.signature(function)
        return asked

    def threads(self, _: Wildcards) -> int:
        """Threads of jobs that can use many."""
        return self.config.threads or processors.available()

    def piece_threads(self, most: int | None) -> int:
        """Threads of a quantization, for a short job of one thread that decides on its pieces.

        A node says nothing of them if it gives that job one processor, but `most`, from
        `--max-threads`, holds for all jobs.
        """
        most = most or processors.available()
        return min(self.config.threads or most, most)

    def gpu(self, _: Wildcards) -> int:
        """The GPUs of a job that runs a model: one if the programs can use one."""
        given = self.config.toolchain.llama_cpp
        return int(given.cuda or (bool(given.bin_dir) and _uses_cuda(Path(given.bin_dir))))

    def small(self, _: Wildcards) -> Needs:
        """A job that reads and writes small files."""
        return Needs()

    def toolchain(self, _: Wildcards, threads: int = 1) -> Needs:
        """A compiler for each thread, which take an hour together; none if they are only linked."""
        if self.config.toolchain.llama_cpp.bin_dir:
            return Needs()
        hours = 24 if self.config.toolchain.llama_cpp.cuda else 3
        return Needs(_PYTHON + threads * _COMPILER, _BUILD, hours * 3600 / threads)

    def converter(self, _: Wildcards) -> Needs:
        """The environment of llama.cpp's converter, with torch."""
        return Needs(_PYTHON, _BUILD, _BUILD / _NETWORK)

    def resolve(self, _: Wildcards) -> Needs:
        """A listing, of up to 200,000 tensors."""
        return Needs(_PYTHON)

    def fetch(self, wildcards: Wildcards) -> Needs:
        """A file of the Hub."""
        found = listed(wildcards)
        size = found.sizes.get(wildcards.file, 0) if found else 5e9
        return Needs(_PYTHON / 2, size, size / _NETWORK)

    def fetch_head(self, wildcards: Wildcards) -> Needs:
        """The head of a checkpoint."""
        found = listed(wildcards)
        size = _HEAD * (found.weights if found else UNKNOWN)
        return Needs(_PYTHON, size, size / _NETWORK)

    def local_files(self, wildcards: Wildcards) -> Needs:
        """Reading local files whole, which can be large."""
        paths = given_paths(self.config)
        sizes = [local_size(path) for path in paths if layout.place(path) == wildcards.place]
        return _needs(costs.record(max(sizes, default=UNKNOWN), _MACHINE))

    def materials(self, wildcards: Wildcards) -> Needs:
        """Listing the files of a checkpoint, which may be read whole."""
        return Needs(seconds=self._weights(wildcards) / _DISK)

    def convert(self, wildcards: Wildcards, threads: int = 1) -> Needs:
        """The checkpoint at BF16, or a part of it."""
        size = _of_part(self._weights(wildcards), wildcards.part)
        cost = costs.convert(size, _MACHINE, computed=1)
        model = self.model(wildcards)
        if lean.by_shards(self.config, model):
            cost = replace(cost, kept=_SHARD)
            for variant in model.variants.values():
                cost += _quantize(size, _types(variant), threads)
        return _needs(cost)

    def convert_upstream(self, wildcards: Wildcards) -> Needs:
        """The same in torch, which converts a tensor at a time."""
        size = self._weights(wildcards)
        return _needs(costs.convert_upstream(size, _MACHINE, largest=_largest(size)))

    def donor(self, wildcards: Wildcards) -> Needs:
        """The head of another checkpoint."""
        return _needs(costs.convert(_HEAD * self._weights(wildcards), _MACHINE, computed=1))

    def imatrix(self, wildcards: Wildcards) -> Needs:
        """Running the BF16 file over a text."""
        size = self._weights(wildcards)
        texts = [each.imatrix for each in self.model(wildcards).variants.values()]
        tokens = costs.text_tokens(max(map(_text_size, texts)))
        return _needs(self._run(wildcards, size, Tokens(text=tokens)) + Cost(kept=0.01 * size))

    def logits(self, wildcards: Wildcards) -> Needs:
        """Running the BF16 file over the measured text."""
        settings = self.model(wildcards).measure
        return self._logits(wildcards, settings.chunks if settings else 0)

    def search_logits(self, wildcards: Wildcards) -> Needs:
        """The same over the text of a search."""
        return self._logits(wildcards, CHUNKS)

    def errors(self, wildcards: Wildcards, threads: int = 1) -> Needs:
        """A part of the rows of each matrix, at one type."""
        weights = self._weights(wildcards)
        cpu = weights / 2e9 / STEP * quant_types.SECONDS[wildcards.type]
        return _needs(costs.errors(weights, _machine(threads), cpu_seconds=cpu))

    def compare(self, wildcards: Wildcards, threads: int = 1) -> Needs:
        """Making a file like the variant, and running it over the measured text."""
        size, weights = self._size(wildcards), self._weights(wildcards)
        settings = self.model(wildcards).measure
        tokens = costs.CHUNK * settings.chunks if settings else 0
        seconds = quant_types.SECONDS[quant_types.main_type(self.variant(wildcards).file_type)]
        cost = costs.quantize(
            weights,
            size,
            _machine(threads),
            cpu_seconds=weights / 2e9 * seconds,
            largest=_largest(weights),
            scratch=size,
        )
        return _needs(cost + self._run(wildcards, size, Tokens(text=tokens)))

    def sensitivities(self, wildcards: Wildcards) -> Needs:
        """Running the BF16 file for each class and layer, or for each tensor.

        Time for a part of the runs of a share: another attempt goes on with the others.
        """
        shares = int(getattr(wildcards, "pieces", 1))
        runs = _TENSORS if wildcards.method == "tensor" else _CLASSES
        runs = math.ceil(runs / shares / _ATTEMPTS)
        return _needs(costs.sensitivities(self._weights(wildcards), _MACHINE, runs))

    def quantize(self, wildcards: Wildcards, threads: int = 1) -> Needs:
        """A quantization, and room for its pieces."""
        weights = self._weights(wildcards)
        variant = (
            self.find(wildcards.model, wildcards.name) if wildcards.kind == "quantized" else None
        )
        types = _types(variant) if variant else [wildcards.name]
        return _needs(_quantize(_of_part(weights, wildcards.kind), types, threads))

    def inject(self, wildcards: Wildcards, threads: int = 1) -> Needs:
        """A copy of the base with a head, which is quantized first."""
        types = self.variant(wildcards).head_types
        assert types is not None
        kinds = [types.type, *(types.tensors or {}).values()]
        head = _quantize(_HEAD * self._weights(wildcards), kinds, threads)
        return _needs(costs.inject(self._size(wildcards), _MACHINE, head))

    def acceptance(self, wildcards: Wildcards) -> Needs:
        """Running the BF16 file, and a drafter for it."""
        size = (1 + _HEAD) * self._weights(wildcards)
        tokens = costs.verified_tokens(self._prompts(wildcards))
        return _needs(self._run(wildcards, size, Tokens(drafted=tokens)))

    def verify(self, wildcards: Wildcards) -> Needs:
        """Comparing a variant with its checkpoint, and running it twice."""
        size = self._size(wildcards)
        cost = self._verify(wildcards, size)
        if self.variant(wildcards).split or self.model(wildcards).split:
            cost += costs.copy(size, _MACHINE)
        return _needs(cost)

    def verify_beside(self, wildcards: Wildcards) -> Needs:
        """Running the BF16 file with a sidecar or a vision tower."""
        return _needs(self._verify(wildcards, (1 + _HEAD) * self._weights(wildcards)))

    def measure(self, wildcards: Wildcards) -> Needs:
        """Running a variant many times, for `minutes` and a round.

        A machine so slow that it takes longer, with the rounds that must follow, tries again.
        """
        settings = self.model(wildcards).measure
        assert settings is not None
        prompts = _count_prompts(self.model(wildcards).measured_prompts)
        planned = sweep.sweep(settings, prompts, blocks=1)
        text = costs.CHUNK * settings.chunks if settings.text else 0
        text += costs.task_tokens(settings.task_files)
        size = self._size(wildcards)
        _, cost = sweep.cost(
            planned, settings.minutes, size, _MACHINE, share(self.model(wildcards))
        )
        one = self._run(wildcards, size, planned.one.tokens)
        seconds = min(cost.seconds, 60 * settings.minutes + one.seconds)
        return _needs(
            replace(cost, seconds=seconds) + self._run(wildcards, size, Tokens(text=text))
        )

    def measure_other(self, wildcards: Wildcards) -> Needs:
        """Running somebody else's file over the measured text."""
        model = self.model(wildcards)
        sizes = {layout.given_name(each): _given(each) for each in model.compare}
        text = costs.CHUNK * (model.measure.chunks if model.measure else 0)
        size = sizes.get(wildcards.place, UNKNOWN)
        return _needs(self._run(wildcards, size, Tokens(text=text)))

    def uploading_processors(self, wildcards: Wildcards) -> int:
        """Processors of an upload: all if its file is deleted then, or none.

        So no other file is made before; else it runs beside other jobs, as downloads do.
        """
        return ALL if self.model(wildcards).passing else 0

    def publish(self, _: Wildcards) -> Needs:
        """Uploading, for as long as it takes."""
        return Needs(_PYTHON, seconds=7 * 86400)

    # ── sizes ──

    def _prompts(self, wildcards: Wildcards) -> int:
        return _count_prompts(self.model(wildcards).prompts)

    def _verify(self, wildcards: Wildcards, size: float) -> Cost:
        prompts = self._prompts(wildcards)
        equal, drafted = costs.equal_tokens(prompts), costs.verified_tokens(prompts)
        run = self._run(wildcards, size, Tokens(equal, drafted), servers=2)
        weights = self._weights(wildcards)
        return run + costs.compare(weights, _MACHINE, read=size + weights)

    def _logits(self, wildcards: Wildcards, chunks: int) -> Needs:
        tokens = costs.CHUNK * chunks
        kept = Cost(kept=costs.logits_size(tokens, _VOCABULARY))
        return _needs(self._run(wildcards, self._weights(wildcards), Tokens(text=tokens)) + kept)

    def _run(self, wildcards: Wildcards, size: float, tokens: Tokens, servers: int = 1) -> Cost:
        """Running a file of the model in llama.cpp."""
        return costs.run(size, _MACHINE, tokens, servers, share(self.model(wildcards)))

    def _weights(self, wildcards: Wildcards) -> float:
        """Bytes of a model's checkpoint at BF16."""
        return weights(self.model(wildcards))

    def _size(self, wildcards: Wildcards) -> float:
        """About the bytes of a variant, rather more."""
        model, variant = self.model(wildcards), self.variant(wildcards)
        if variant.foreign:
            assert variant.base is not None and not isinstance(variant.base, OwnBase)
            return _given(variant.base) + _HEAD * weights(model)
        return weights(model) / 16 * max(map(_bits, _types(variant)))


def _machine(threads: int) -> Machine:
    return replace(_MACHINE, threads=threads)


def _quantize(source: float, types: list[str], threads: int) -> Cost:
    """Quantizing so many bytes at BF16 to a mixture of these types."""
    size = source / 16 * max(map(_bits, types))
    seconds = max(quant_types.SECONDS[quant_types.main_type(each)] for each in types)
    cost = costs.quantize(
        source,
        size,
        _machine(threads),
        cpu_seconds=source / 2e9 * seconds,
        largest=_largest(source),
        scratch=max(size, min(source, _LARGEST_TENSOR)),  # pieces, and a copied tensor
    )
    return cost + costs.join(size, _MACHINE)


def _needs(cost: Cost) -> Needs:
    return Needs(_PYTHON + cost.memory, cost.kept + cost.scratch, cost.seconds)


def weights(model: Model) -> float:
    """Bytes of a model's checkpoint at BF16; of the head's, if it has no other."""
    source = _source(model)
    return _of_source(source) if source else UNKNOWN


def share(model: Model) -> float:
    """The share of them that is read for a token: all, unless a listing shows experts."""
    source = _source(model)
    found = listed(source) if isinstance(source, HubRepository) else None
    return found.active / found.weights if found and found.weights else 1


def _source(model: Model) -> Source | None:
    sources: list[Source | None] = [model.source if model.uses_source else None]
    sources += [model.donor(variant) for variant in model.variants.values()]
    for source in sources:
        if source:
            return source
    return None


def _of_source(source: Source) -> float:
    if isinstance(source, HubRepository):
        found = listed(source)
        return found.weights if found else UNKNOWN
    return _of_folder(source.path)


@lru_cache
def _of_folder(path: str) -> float:
    """Bytes at BF16 of a local checkpoint, of which quantized ones take a half or a quarter."""
    with suppress(OSError, ForgeError):  # which its first job will report
        config = read_json(Path(path, "config.json"))
        packed = json.dumps(config.get("quantization_config") or "").lower()
        growth = 1 if packed == '""' else 4 if _FOUR_BITS.search(packed) else 2
        sizes = [file.stat().st_size for file in Path(path).glob("*.safetensors")]
        return growth * sum(sizes) or UNKNOWN
    return UNKNOWN


_FOUR_BITS = re.compile(r'fp4|"(num_)?bits": 4\b')


def _given(file: layout.GivenFile) -> float:
    """Bytes of a base from elsewhere."""
    if isinstance(file, HubFile):
        found = listed(file)
        sizes = found.sizes if found else {}
        # Parts of a file that was cut up have its name and more.
        starts = tuple(gguf_files(file.file))
        return sum(size for name, size in sizes.items() if name.startswith(starts)) or UNKNOWN / 3
    with suppress(OSError):
        path = Path(file.path)
        return sum(path.with_name(name).stat().st_size for name in gguf_files(path.name))
    return UNKNOWN / 3


def _of_part(weights: float, part: str) -> float:
    """Bytes of a part of a checkpoint at BF16. A draft has embeddings and output too."""
    embeddings = 2 * min(weights / 4, _EMBEDDINGS)
    return {"head": _HEAD * weights, "draft": _HEAD * weights + embeddings}.get(part, weights)


def _largest(weights: float) -> float:
    """The largest tensor of a checkpoint: embeddings, or all experts of a matrix."""
    return min(weights / 4, _LARGEST_TENSOR)


def _types(variant: Variant) -> list[str]:
    """File and tensor types of a variant, or of its base."""
    base = variant.base
    main = base.type if isinstance(base, OwnBase) else variant.file_type
    return [main, *variant.recipe.values()]


def _bits(kind: str) -> float:
    usual = quant_types.bits(quant_types.main_type(kind))
    return usual if kind in quant_types.UNQUANTIZED else usual + _MIXTURE


def _text_size(imatrix: Imatrix | None) -> int:
    """Bytes of the text that an importance matrix is computed from."""
    with suppress(OSError):
        if not isinstance(imatrix, ImatrixText):
            return 0
        return sum(each.stat().st_size for each in text_files(Path(imatrix.text)))
    return _TEXT


@lru_cache
def _count_prompts(folder: str) -> int:
    return len(read_measured(Path(folder)))


@lru_cache
def _uses_cuda(folder: Path) -> bool:
    """Whether llama-server, or a library beside it, is linked with CUDA."""
    places = (folder, folder.parent / "lib")
    if any(path for place in places for path in place.glob("libggml-cuda*")):
        return True
    with (
        suppress(OSError, ValueError),
        (folder / "llama-server").open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
    ):
        return content.find(_CUDA) >= 0
    return False
