"""The disk that a conversion shard by shard takes (`lean: shards`)."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mtpforge.checkpoint.checkpoint import Outline
from mtpforge.checkpoint.families.registry import family_of
from mtpforge.checkpoint.safetensors import CheckpointTensor
from mtpforge.convert.freeing import STEPS
from mtpforge.convert.plan import ConvertedTensor, plan_conversion, settled_hparams
from mtpforge.forecast import costs
from mtpforge.gguf.reader import Gguf
from mtpforge.hub.freed import SMALL
from mtpforge.io.journal import STEP
from mtpforge.quantize.job import RUN_BYTES
from mtpforge.quantize.plan import SAMPLE


def left_of(made: Gguf) -> int:
    """Bytes of a BF16 file once its tensors are quantized: header and first bytes of each."""
    header = min(place.offset for place in made.ranges.values())
    return header + sum(min(SAMPLE, info.size) for info in made.tensors.values())


def peak(outline: Outline, part: str, made: Gguf, quants: Sequence[Gguf]) -> int:
    """The most bytes on the disk while a checkpoint becomes the BF16 file `made`, and its quants.

    Those are shards, the part of `made` that is not quantized yet, and the quants so far. Tensors
    of `made` that are not the checkpoint's come last.
    """
    family = family_of(outline.architecture)
    items = plan_conversion(outline, family, settled_hparams(outline, family), part)
    sizes = {name: info.size for name, info in made.tensors.items()}
    disk = _Disk(outline, items, sizes, quants, min(STEP, sum(sizes.values()) // STEPS))
    for item in items:
        disk.convert(item)
    names = {item.row.name for item in items}
    disk.quantize([*disk.waiting, *(name for name in sizes if name not in names)])
    return disk.peak


@dataclass
class _Disk:
    """What is on the disk, as far as the conversion has come."""

    outline: Outline
    items: Sequence[ConvertedTensor]
    sizes: Mapping[str, int]
    quants: Sequence[Gguf]
    step: int
    peak: int = 0
    shards: int = 0
    made: int = 0
    fetched: set[str] = field(default_factory=set)
    waiting: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.head = family_of(self.outline.architecture).head_prefix
        self.needed = Counter(tensor for item in self.items for tensor in item.tensors)
        self.sources = {item.row.name: item.tensors for item in self.items}
        self.of_shard: Counter[str] = Counter()
        for tensor in self.outline.tensors.values():
            self.of_shard[tensor.shard] += tensor.size

    def convert(self, item: ConvertedTensor) -> None:
        """Fetch the shards of a tensor, convert it, and quantize a step that is complete."""
        for tensor in item.tensors:
            if tensor.shard not in self.fetched:
                self.fetched.add(tensor.shard)
                self.shards += self.of_shard[tensor.shard]
        self.waiting.append(item.row.name)
        self._note(0)
        if self._written >= self.step:
            self.quantize(self.waiting)
            self.waiting = []

    def quantize(self, names: Sequence[str]) -> None:
        """Quantize tensors, and then free them, and the shards' that nothing else needs."""
        made = sum(each.tensors[name].size for each in self.quants for name in names)
        largest = max((self.sizes[name] for name in names), default=0)
        copied = min(sum(self.sizes[name] for name in names), max(RUN_BYTES, largest))
        self.made += made
        self._note(copied + min(made, copied))  # a copy, and what llama-quantize makes of it
        self.made += sum(min(SAMPLE, self.sizes[name]) for name in names)
        for name in names:
            for tensor in self.sources.get(name, ()):
                self.needed[tensor] -= 1
                if not self.needed[tensor]:
                    self.shards -= self._freed(tensor)

    @property
    def _written(self) -> int:
        return sum(self.sizes[name] for name in self.waiting)

    def _note(self, scratch: int) -> None:
        self.peak = max(self.peak, self.shards + self._written + self.made + scratch)

    def _freed(self, tensor: CheckpointTensor) -> int:
        stays = tensor.size <= SMALL or tensor.name.startswith(self.head)
        return 0 if stays else int(costs.FREED * tensor.size)
