"""On XFS and Btrfs, mounted here, base and output share the trunk's blocks on disk."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import CHECKPOINTS
from gguf.constants import GGMLQuantizationType
from mtpforge.convert import native
from mtpforge.gguf import reader, writer
from mtpforge.gguf.head import trunk_digests
from mtpforge.gguf.reader import TensorInfo
from mtpforge.inject.inject import inject

MB = 1 << 20


@pytest.fixture(params=["xfs", "btrfs"])
def mounted(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """An empty file system of 512 MB."""
    make = f"mkfs.{request.param}"
    if os.geteuid() or not shutil.which(make) or not shutil.which("mount"):
        pytest.skip(f"needs root, mount and {make} (xfsprogs, btrfs-progs)")
    image, point = tmp_path / "image", tmp_path / "mounted"
    point.mkdir()
    with image.open("wb") as file:
        file.truncate(512 * MB)
    subprocess.run([make, "-q", str(image)], check=True)
    done = subprocess.run(
        ["mount", "-o", "loop", str(image), str(point)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"this machine cannot mount {request.param}: {done.stderr.strip()}")
    yield point
    subprocess.run(["umount", str(point)], check=True)


def used(point: Path) -> int:
    subprocess.run(["sync", "-f", str(point)], check=True)
    told = os.statvfs(point)
    return (told.f_blocks - told.f_bfree) * told.f_frsize


def test_the_trunk_takes_no_space_a_second_time(mounted: Path, tmp_path: Path) -> None:
    for part in ("trunk", "head"):
        native.convert(CHECKPOINTS / "tiny-qwen3.5", tmp_path / f"{part}.gguf", part, "qwen35")
    small = reader.read(tmp_path / "trunk.gguf")
    big = TensorInfo("output.weight", (8192, 4096), GGMLQuantizationType.BF16)
    noise = memoryview(np.random.default_rng(0).bytes(big.size))
    pieces = [(info, [small.ranges[name]]) for name, info in small.tensors.items()]
    base = mounted / "base.gguf"
    writer.write(base, small.metadata, [*pieces, (big, [noise])])
    before, trunk = used(mounted), trunk_digests(reader.read(base))
    out = mounted / "out.gguf"
    inject(base, tmp_path / "head.gguf", out)
    assert used(mounted) - before < 8 * MB < big.size / 4
    assert trunk_digests(reader.read(out)) == trunk == trunk_digests(reader.read(base))
    assert len(reader.read(out).tensors) == len(trunk) + 15
