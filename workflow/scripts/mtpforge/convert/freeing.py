"""Frees the shards of a fetched checkpoint as their tensors are converted, for small disks.

A tensor is freed once everything that is made from it is on the disk and in the journal. What
verification reads stays in its place: headers, small tensors, the head, and a sample of the rows of
each tensor, whose digests are recorded. So verification is the same with and without it.

Files that have another name, such as one in the Hub's cache, belong to the user and stay.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from stat import S_ISREG

import numpy as np

from mtpforge import progress
from mtpforge.checkpoint.checkpoint import Checkpoint
from mtpforge.checkpoint.families.registry import family_of
from mtpforge.checkpoint.safetensors import CheckpointTensor
from mtpforge.convert import norm_shift
from mtpforge.convert.plan import ConvertedTensor
from mtpforge.convert.tensor_names import EMBEDDINGS, OUTPUT
from mtpforge.convert.values import merged, places
from mtpforge.hub import freed
from mtpforge.hub.freed import FreedShard, Kept
from mtpforge.hub.refetch import Refetch
from mtpforge.io import holes
from mtpforge.io.journal import STEP, Journal
from mtpforge.io.ranges import sha256_of_parts
from mtpforge.verify.sample import sample_rows

_SMALL = freed.SMALL
STEPS = 32
"""How often a conversion frees something, at least."""
_WORTH = 0.5
"""Share of a tensor that can be freed, at least."""


class Freeing:
    """What can be freed of a checkpoint while a part of it is converted.

    `recorded` is the folder of its records, `others` are the parts that are converted on their own.
    """

    def __init__(
        self, checkpoint: Checkpoint, part: str, others: Iterable[str], recorded: Path
    ) -> None:
        self._checkpoint = checkpoint
        self._recorded = recorded
        planned = norm_shift.plan_by_values(checkpoint, part)
        self._items: dict[str, list[ConvertedTensor]] = defaultdict(list)
        for item in planned:
            for tensor in item.tensors:
                self._items[tensor.name].append(item)
        self._sources = {item.row.name: item.tensors for item in planned}
        self.size = sum(item.info.size for item in planned)
        """Bytes of the tensors that are written."""
        candidates = self._candidates(planned, others)
        self._left = {tensor.name: tensor for tensor in candidates}
        self._missing = {name: {i.row.name for i in self._items[name]} for name in self._left}
        self._said: set[str] = set()
        self._sampled: tuple[ConvertedTensor | None, dict[str, np.ndarray] | None] = None, None
        self._unused = [each for name, each in self._left.items() if not self._items[name]]
        if download := checkpoint.refetch:
            checkpoint.refetch = partial(self._refetched, download)

    def attach(self, journal: Journal) -> None:
        """Let a journal say what has been converted, and how often."""
        journal.step = min(STEP, self.size // STEPS)
        journal.listed = self.converted
        largest = max((tensor.size for tensor in self._left.values()), default=0)
        whole = [
            each
            for each in self._left.values()
            if not self._checkpoint.integrity.kept(each) and self._is_ours(each.shard)
        ]
        freed = int(_WORTH * sum(each.size for each in whole))
        journal.spare = max(0, freed - journal.step - 2 * largest)

    def converted(self, names: Collection[str]) -> None:
        """Free the tensors that nothing but these needs any more."""
        ready = self._unused
        self._unused = []
        for name in names:
            for tensor in self._sources.get(name, ()):
                missing = self._missing.get(tensor.name, set())
                if name in missing:
                    missing.remove(name)
                    ready += [] if missing else [tensor]
        self._free(ready)

    def finish(self) -> None:
        """Free the rest, once the converted file has its name."""
        kept = self._checkpoint.integrity.kept
        self._free([tensor for tensor in self._left.values() if not kept(tensor)])

    def _refetched(self, download: Refetch, shard: str) -> Mapping[str, str]:
        """Download a shard, and free what nothing needs of it with the next step."""
        digests = download(shard)
        self._unused += [
            tensor
            for name, tensor in self._left.items()
            if tensor.shard == shard and not self._missing[name]
        ]
        return digests

    def _candidates(
        self, planned: list[ConvertedTensor], others: Iterable[str]
    ) -> Iterable[CheckpointTensor]:
        checkpoint = self._checkpoint
        if not holes.are_supported(checkpoint.directory):
            progress.say("the shards stay, because this file system cannot free a part of a file")
            return
        items = [item for part in others for item in norm_shift.plan_by_values(checkpoint, part)]
        kept = {scale.name for item in planned for scale in item.scales if scale}
        kept |= {each.name for item in items for each in (*item.tensors, *item.scales) if each}
        tensors = checkpoint.tensors.values()
        kept |= _compared(checkpoint)
        for each in tensors:
            if each.size > _SMALL and each.name not in kept:
                yield each

    def _is_ours(self, shard: str) -> bool:
        """Whether a shard was fetched, and has no other name now."""
        about = (self._checkpoint.directory / shard).lstat()
        is_fetched = (self._recorded / f"{shard}.json").exists()
        if is_fetched and S_ISREG(about.st_mode) and about.st_nlink == 1:
            return True
        if shard not in self._said:
            progress.say(f"{shard}: stays: it has another name too, such as in the Hub's cache")
        self._said.add(shard)
        return False

    def _free(self, tensors: Iterable[CheckpointTensor]) -> None:
        by_shard: dict[str, list[CheckpointTensor]] = defaultdict(list)
        for tensor in tensors:
            by_shard[tensor.shard].append(tensor)
        for shard, ready in by_shard.items():
            if self._is_ours(shard):
                self._free_in(shard, ready)

    def _free_in(self, shard: str, tensors: list[CheckpointTensor]) -> None:
        """Record what stays of these tensors, and only then free the rest."""
        freed_before = self._checkpoint.integrity.freed.get(shard, FreedShard())
        found = dict(freed_before.tensors)
        path = self._checkpoint.directory / shard
        for tensor in tensors:
            ranges = [] if tensor.name in found else self._read_later(tensor)
            left = sum(size for _, size in ranges)
            if tensor.name not in found and left <= (1 - _WORTH) * tensor.size:
                found[tensor.name] = Kept(ranges, sha256_of_parts(path, ranges))
        after = replace(freed_before, tensors=found)
        if after != freed_before:
            after.write(freed.record(self._recorded, shard))
            self._checkpoint.integrity.freed[shard] = after
        for tensor in tensors:
            if tensor.name in found:
                holes.punch(path, _between(tensor, found[tensor.name]))

    def _read_later(self, tensor: CheckpointTensor) -> list[tuple[int, int]]:
        """What verification reads of a tensor, for all that is made from it: offset and size."""
        begin, end = tensor.offset, tensor.offset + tensor.size
        found = [np.empty((0, 2), np.int64)]
        for item in self._items[tensor.name]:
            rows = self._sample(item)
            whole = np.array([(begin, end)])
            found.append(whole if rows is None else rows.get(tensor.shard, found[0]))
        inside = merged(np.concatenate(found).clip(begin, end))
        return [(int(first), int(last - first)) for first, last in inside if first < last]

    def _sample(self, item: ConvertedTensor) -> dict[str, np.ndarray] | None:
        """The bytes of what is compared of a tensor; kept, because it can have 512 sources."""
        if item is not self._sampled[0]:
            head = family_of(self._checkpoint.architecture).head_prefix
            is_head = item.source.names[0].startswith(head)
            rows = sample_rows(item.info, is_head)
            self._sampled = item, places(self._checkpoint, item, rows)
        return self._sampled[1]


def _compared(checkpoint: Checkpoint) -> set[str]:
    """Embeddings and output matrix, if a plan asks whether they are the same."""
    levels = (checkpoint.config, checkpoint.config.get("text_config", {}))
    if not any(level.get("tie_word_embeddings") for level in levels):
        return set()
    canonical = family_of(checkpoint.architecture).canonical
    names = {each for each in checkpoint.tensors if canonical(each) in (EMBEDDINGS, OUTPUT)}
    return names if len(names) > 1 else set()


def _between(tensor: CheckpointTensor, kept: Kept) -> Iterable[tuple[int, int]]:
    """The ranges of a tensor that are not kept: offset and size."""
    at = tensor.offset
    for offset, size in kept.ranges:
        yield at, offset - at
        at = offset + size
    yield at, tensor.offset + tensor.size - at
