"""Reuse: tensors that finished files already hold, found through their manifests.

Reused tensors are hashed, and requantized on mismatch.
"""

import glob
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from mtpforge import progress
from mtpforge.errors import GgufError
from mtpforge.gguf import quant_types, reader
from mtpforge.gguf.reader import Gguf, TensorInfo, drop_leading_ones
from mtpforge.io.ranges import FileRange, sha256
from mtpforge.quantize.job import QuantizeJob
from mtpforge.quantize.manifest import MANIFESTS, Manifest, ManifestEntry

MIN_SHARE = 0.1
COPY_FACTOR = 3.0
"""A file is assembled from reused tensors if they save at least this share of the work, by cost,
and this many times the cost of copying the other tensors' source and result once more."""


@dataclass(frozen=True)
class ReusableTensor:
    """A finished tensor: its byte range, its sha256 in the manifest, and the file's name."""

    data: FileRange
    digest: str
    path: Path

    @property
    def in_piece(self) -> bool:
        """Whether the file is a piece, which the workflow deletes once the whole is finished."""
        return "/manifests/pieces/" in f"/{self.path.as_posix()}"

    def is_intact(self) -> bool:
        """Whether the bytes can be read and match the manifest."""
        try:
            return sha256(self.data) == self.digest
        except OSError:
            return False


Reusable = dict[str, ReusableTensor]
"""Reusable tensors by the name that they have in the planned file."""


def find_reusable(job: QuantizeJob, folder: Path, scratch: Path) -> Reusable:
    """Find the planned tensors that files under `folder` hold, by the manifests of these files.

    The files are hard-linked into `scratch`, so they stay readable even if they are deleted or
    replaced meanwhile.
    """
    keys = job.plan.keys()
    found: Reusable = {}
    held: list[tuple[dict[str, ManifestEntry], list[Path]]] = []
    for path in _manifests(folder):
        manifest = Manifest.read(path)
        entries = manifest.by_key()
        wanted = {name: entries[key] for name, key in keys.items() if key in entries}
        if wanted:
            held.append((wanted, manifest.files))
    # First those with all tensors: such a file may be linked as a whole.
    for wanted, files in sorted(held, key=lambda each: each[0].keys() != keys.keys()):
        for file in _existing(files):
            if wanted.keys() <= found.keys():
                break
            found = _tensors_of(job, file, wanted=wanted, scratch=scratch) | found
    return {name: found[name] for name in keys if name in found}


def worth_reusing(job: QuantizeJob, reusable: Reusable) -> bool:
    """Whether to assemble the file from reused tensors, rather than quantize it in one run."""
    rest = [name for name in job.plan.tensors if name not in reusable]
    weights = sum(job.source.tensors[name].elements for name in rest)
    copying = weights * quant_types.SECONDS["BF16"] / 1e9
    return job.cost(reusable) >= max(MIN_SHARE * job.plan.cost, COPY_FACTOR * copying)


def reusable_for_piece(
    job: QuantizeJob, reusable: Reusable, names: Iterable[str], folder: Path
) -> Reusable:
    """The reusable ones of a piece's tensors `names`; `folder` holds the files of pieces.

    Tensors in these files are hashed, and a damaged one is removed from its manifest.
    """
    inside = {name: each for name, each in reusable.items() if _parent(each) == folder.resolve()}
    own = {name: reusable[name] for name in names if name in reusable}
    checked = [name for name in own if name in inside]
    with ThreadPoolExecutor(job.llama.processors) as pool:
        intact = list(pool.map(lambda name: own[name].is_intact(), checked))
    damaged = {name: own.pop(name) for name, good in zip(checked, intact, strict=True) if not good}
    if damaged:
        warn_damaged(damaged)
    for path in {each.path.resolve() for each in damaged.values()}:
        same_file = {name: each for name, each in inside.items() if each.path.resolve() == path}
        left = {name: each.digest for name, each in same_file.items() if name not in damaged}
        Manifest.of(job.plan, left, [path]).write(path.with_suffix(".json"))
    return own


def warn_damaged(damaged: Reusable) -> None:
    """Say which tensors are damaged and will be requantized."""
    others = f" and {len(damaged) - 1} more tensors" if len(damaged) > 1 else ""
    progress.say(
        f"warning: {_files(damaged.values())}: {next(iter(damaged))}{others} cannot be read, or "
        "do not match the manifest: requantizing"
    )


def report(reused: Reusable, names: Collection[str]) -> None:
    """Say how many of the tensors `names` were reused, and from which files."""
    outputs = [each for each in reused.values() if not each.in_piece]
    size = sum(each.data.size for each in outputs)
    source = f" of the same type from {_files(outputs)}" if outputs else ""
    parts = [f"reused {len(outputs)} of {len(names)} tensors ({size:,} bytes){source}"]
    if in_pieces := len(reused) - len(outputs):
        parts.append(f"{in_pieces} from pieces")
    progress.say("; ".join([*parts, f"quantized {len(names) - len(reused)}"]))


def _manifests(folder: Path) -> list[Path]:
    # Path.glob fails if a folder disappears meanwhile.
    names = glob.glob(MANIFESTS, root_dir=folder, recursive=True)  # noqa: PTH207
    return [folder / name for name in sorted(names)]


def _existing(files: Iterable[Path]) -> Iterator[Path]:
    """The files that exist, or all GGUFs in one that is a folder."""
    for file in files:
        try:
            inside = sorted(file.glob("*.gguf")) if file.is_dir() else [file]
            yield from [path for path in inside if path.is_file()]
        except (OSError, ValueError):  # an impossible name, an unreadable folder
            continue


def _tensors_of(
    job: QuantizeJob, file: Path, wanted: Mapping[str, ManifestEntry], scratch: Path
) -> Reusable:
    """The wanted tensors that a file really has; none if the file is gone or was replaced."""
    try:
        opened = reader.read(_hard_link(file, scratch))
    except (GgufError, OSError):
        return {}
    return {
        name: ReusableTensor(opened.ranges[entry.name], entry.sha256, file)
        for name, entry in wanted.items()
        if _holds(opened, entry.name, job.target_info(name))
    }


def _holds(opened: Gguf, name: str, target: TensorInfo) -> bool:
    info = opened.tensors.get(name)
    return info is not None and (info.type, drop_leading_ones(info.shape)) == (
        target.type,
        target.shape,
    )


def _hard_link(path: Path, scratch: Path) -> Path:
    """Hard-link a file into `scratch`; its own path if the file system has no links.

    Raises OSError if the file is gone.
    """
    path = path.resolve()
    about = path.stat()
    link = scratch / f"{about.st_dev}-{about.st_ino}.gguf"
    if not link.exists():
        try:
            os.link(path, link)
        except FileNotFoundError:
            raise
        except OSError:
            return path
    return link


def _parent(tensor: ReusableTensor) -> Path:
    return tensor.path.resolve().parent


def _files(tensors: Iterable[ReusableTensor]) -> str:
    return ", ".join(sorted({str(tensor.path) for tensor in tensors}))
