"""Is a finished GGUF what was asked for, and does its head draft? One verdict per check, and no result without all of them.

A file with a head that is there but wrong loads without a message. So its inventory, types, metadata and values are compared with
the checkpoint; a real llama-server must draft with it, have drafts accepted, and say the same without them.

Of the trunk's large tensors a sample is compared (`values`), which cannot see a changed bit. Digests can: of what conversion,
quantization or injection wrote, taken when it was made, so what changed on the disk since is seen. What was wrong before they were
taken, as by a failing memory while llama-quantize ran, is not, unless it is large enough for the errors; nor is a bad sector that
is still hidden by a copy of the file in memory.
"""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from mtpforge.errors import VerificationError
from mtpforge.gguf import reader, split
from mtpforge.gguf.head import trunk_digests, types_of
from mtpforge.gguf.reader import Gguf
from mtpforge.io.ranges import FileRange, sha256
from mtpforge.io.text import read_json
from mtpforge.llama_cpp import programs
from mtpforge.quantize.recipe import NO_HEAD
from mtpforge.verify.request import Check, Request, raise_failed, some
from mtpforge.verify.running import check_drafting, check_programs, check_running, check_seeing
from mtpforge.verify.source import check_against_source, check_digests, check_trunk, check_types


def verify(
    path: Path, request: Request, bin_dir: Path = programs.DEFAULT_BIN,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:  # fmt: skip
    """The report on `path`. Raises VerificationError, naming each failed check, where it must not be published."""
    opened = reader.read(path)
    checks = [check_digests(opened, request.digests)] if request.digests else []
    if opened.is_vision:
        checks.append(check_seeing(opened, request, bin_dir))
        raise_failed(path.name, checks)
        return {**summary(opened), "checks": [asdict(check) for check in checks]}
    blocks = opened.head_blocks
    if not blocks and not request.headless:
        raise VerificationError(f"{path}: has no head: nextn_predict_layers is missing")
    if blocks and request.headless:
        raise VerificationError(f"{path}: has a head (block {blocks[0]}), and none was asked for")
    checks.append(check_types(opened, request))
    against, proof = check_against_source(opened, request, progress)
    checks += against
    if request.base or request.trunk:
        before = (
            read_json(request.trunk)
            if request.trunk
            else trunk_digests(split.read(request.base or path))
        )
        check, digests = check_trunk(opened, before)
        checks.append(check)
        proof |= digests
    raise_failed(path.name, checks)  # what is known to be wrong need not be run
    running, measured = check_running(opened, request, bin_dir)
    checks += running
    checks += check_programs(opened, request, bin_dir)
    raise_failed(path.name, checks)
    return {**summary(opened), **proof, **measured, "checks": [asdict(check) for check in checks]}


def summary(opened: Gguf) -> dict[str, Any]:
    """Name, size in bytes, bits per weight, sha256, types of the head and of all tensors, counted."""
    infos = opened.tensors.values()
    types = [info.type.name for info in infos]
    size = opened.path.stat().st_size
    return {
        "file": opened.path.name,
        "bytes": size,
        "sha256": sha256(FileRange(opened.path, 0, size)),
        "bits_per_weight": round(
            8 * sum(info.size for info in infos) / sum(info.elements for info in infos), 3
        ),
        "head": "/".join(sorted(types_of(opened.head))) if opened.head_blocks else NO_HEAD,
        "types": {name: types.count(name) for name in sorted(set(types))},
    }


def publish_split(
    path: Path, folder: Path, limit: int, request: Request, bin_dir: Path = programs.DEFAULT_BIN
) -> dict[str, Any]:  # fmt: skip
    """Give a verified file its final place as `folder`, in files of at most `limit` bytes that are verified in their turn.

    The report's `files` (name, bytes, sha256) and `checks` on them. Raises VerificationError, and then `folder` is as it was.
    """
    opened = reader.read(path)
    with split.splitting(opened, folder, folder.name, limit) as files:
        problems = split.check(opened, files)
        checks = [
            Check(
                "files",
                not problems,
                some(problems) or f"all {len(opened.tensors)} tensors, in {len(files)}",
            )
        ]
        if len(files) > 1 and not problems:
            # The head was measured in the whole file, and these are its bytes: what is left to see is that llama.cpp finds them.
            shards = replace(opened, path=files[0])
            (found,), _ = check_drafting(
                shards, replace(request, prompts=request.prompts[:1], min_acceptance=0), bin_dir
            )
            checks += [
                replace(found, name="files load"),
                *check_programs(shards, replace(request, perplexity=False), bin_dir, "files open"),
            ]
        raise_failed(folder.name, checks)
        sizes = [(file, file.stat().st_size) for file in files]
        listed = [
            {"name": file.name, "bytes": size, "sha256": sha256(FileRange(file, 0, size))}
            for file, size in sizes
        ]
    return {"files": listed, "checks": [asdict(check) for check in checks]}
