"""One planned quantization, and its runs of llama-quantize for some of the tensors at a time.

llama-quantize gives a tensor the same bytes whether it quantizes the whole model or only part of
it, as long as each type is given explicitly. So the work can be done in pieces.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from gguf.constants import GGMLQuantizationType

from mtpforge import progress
from mtpforge.gguf import quant_types, reader, writer
from mtpforge.gguf.reader import ALIGNMENT, Gguf, TensorInfo, drop_leading_ones
from mtpforge.io import integrity, storage
from mtpforge.llama_cpp.programs import LlamaCpp
from mtpforge.quantize.llama_quantize import run, without_vocabulary
from mtpforge.quantize.plan import QuantizePlan

RUN_BYTES = 1 << 27
"""Source bytes copied for one run of llama-quantize. A matrix of experts may have more. Larger runs
need more disk and memory, smaller ones more runs."""

_DAMAGED = (
    "delete it and run again (a build with `lean: shards` frees the weights that it has quantized)"
)

TABLE_FACTOR = 8
"""A type whose tables take long to compute gets runs that take this many times as long."""


@dataclass(frozen=True)
class QuantizeJob:
    """A planned quantization of `source`.

    Raises GgufError or ConfigError if the plan was made for another source, importance matrix or
    toolchain.
    """

    plan: QuantizePlan
    source: Gguf
    llama: LlamaCpp
    imatrix: Path | None = None

    def __post_init__(self) -> None:
        self.plan.check(self.source, self.imatrix, self.llama)

    def quantize_tensors(self, names: Iterable[str], out: Path, scratch: Path) -> Gguf:
        """Quantize these tensors to `out`, in place, from a copy of their part of the source.

        A matrix above the size limit of a run is quantized some rows at a time. Raises
        DamagedError if the source is not as it was when its digests were recorded.
        """
        wanted = set(names)
        in_order = [name for name in self.source.tensors if name in wanted]
        with integrity.reading(self._recorded(in_order)):
            if len(in_order) == len(self.source.tensors):
                return self.quantize(self.source, out)
            if len(in_order) == 1 and self._too_large(in_order[0]):
                return self._quantize_by_rows(in_order[0], out, scratch)
            part = reader.select_tensors(self.source, in_order)
            return self.quantize(self._copy_part(part, scratch), out)

    def batches(self, names: Iterable[str]) -> Iterator[list[str]]:
        """Group tensors into runs: neighbours up to the size limit of a run, or one larger tensor.

        All tensors of the source make one run, which needs no copy. Shows the time left after runs.
        """
        batches = list(self._batches(set(names)))
        total = self.cost(name for batch in batches for name in batch)
        left = progress.Left()
        done = 0.0
        for number, batch in enumerate(batches, 1):
            yield batch
            done += self.cost(batch)
            if number < len(batches) and left.due():
                more = left.of(done, total)
                progress.say(f"quantized {number} of {len(batches)} groups of tensors{more}")

    def _batches(self, wanted: set[str]) -> Iterator[list[str]]:
        if wanted == self.source.tensors.keys():
            yield list(self.source.tensors)
            return
        batch: list[str] = []
        for name in (name for name in self.source.tensors if name in wanted):
            larger = [*batch, name]
            size = sum(self.source.tensors[each].size for each in larger)
            if batch and size > max(map(self._run_limit, larger)):
                yield batch
                larger = [name]
            batch = larger
        if batch:
            yield batch

    def target_info(self, name: str) -> TensorInfo:
        """A tensor's entry in the quantized file, where leading dimensions of one are dropped."""
        info = self.source.tensors[name]
        kind = GGMLQuantizationType[self.plan.tensors[name].type]
        return replace(info, shape=drop_leading_ones(info.shape), type=kind)

    @cached_property
    def size(self) -> int:
        """Bytes of the whole quantized file, within a few of its header."""
        return writer.size(self.source.metadata, list(map(self.target_info, self.source.tensors)))

    def cost(self, names: Iterable[str]) -> float:
        """Approximate CPU seconds to quantize these tensors."""
        return sum(self.plan.tensors[name].cost for name in names)

    def quantize(self, source: Gguf, out: Path) -> Gguf:
        """Quantize the whole source or a part of it to `out`, in place."""
        plan = self.plan
        return run(
            source,
            out,
            types=plan.types(),
            file_type=plan.file_type,
            matrix=self.imatrix,
            llama=self.llama,
        )

    def _recorded(self, names: Iterable[str]) -> list[integrity.Part]:
        """Tensors of the source, with the digests that the plan has of them."""
        tensors = self.plan.tensors
        places = self.source.ranges
        return [
            integrity.Part(name, places[name], tensors[name].source, _DAMAGED) for name in names
        ]

    def _run_limit(self, name: str) -> int:
        """How many bytes of the source a run with this tensor may have."""
        info = self.source.tensors[name]
        kind = self.plan.tensors[name].type
        table_seconds = quant_types.TABLES.get(kind, 0)
        weights = TABLE_FACTOR * table_seconds / quant_types.SECONDS[kind] * 1e9
        return max(RUN_BYTES, int(weights * info.size / info.elements))

    def _too_large(self, name: str) -> bool:
        """Whether a tensor is a matrix of several rows above the size limit of a run."""
        info = self.source.tensors[name]
        return len(info.shape) == 2 and info.shape[0] > 1 and info.size > self._run_limit(name)

    def _quantize_by_rows(self, name: str, out: Path, scratch: Path) -> Gguf:
        whole: Gguf | None = None
        info = self.target_info(name)
        for start, count in self._row_ranges(name):
            part = self._copy_part(
                reader.rows(self.source, name, start=start, count=count), scratch
            )
            made = self.quantize(part, scratch / "rows.gguf")
            if whole is None:
                whole = writer.lay_out(out, made.metadata, [info])
            with storage.naming(out, writer.size(whole.metadata, [info])):
                part = reader.rows(whole, name, start=start, count=count)
                writer.put(part, name, [made.ranges[name]])
        assert whole is not None
        return whole

    def _row_ranges(self, name: str) -> Iterator[tuple[int, int]]:
        """First row and number of rows of each run.

        No run is a single row, because llama-quantize would take it for a vector.
        """
        info = self.source.tensors[name]
        rows = info.shape[0]
        step = self._run_limit(name) * rows // info.size // ALIGNMENT * ALIGNMENT or ALIGNMENT
        for start in range(0, rows - 1, step):
            yield start, step if start + step < rows - 1 else rows - start

    def _copy_part(self, part: Gguf, scratch: Path) -> Gguf:
        """Copy the tensors of `part` into a file, sharing blocks with the source if possible."""
        tensors = reader.contents(part)
        metadata = writer.padded(without_vocabulary(self.source), tensors, part)
        return writer.write_scratch(scratch / "part.gguf", metadata, tensors)
