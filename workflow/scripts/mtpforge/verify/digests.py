"""Checks of bytes against digests that were recorded when the file was made."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from mtpforge.gguf import reader, split
from mtpforge.gguf.head import trunk_digests
from mtpforge.gguf.reader import Gguf
from mtpforge.hub.fetch_records import HeadRecord
from mtpforge.io.integrity import HEADER
from mtpforge.io.ranges import sha256
from mtpforge.io.text import read_json
from mtpforge.verify.report import Check, Trunk, some


def check_digests(opened: Gguf, recorded: Path) -> Check:
    """The headers and every tensor have the bytes that were recorded when the file was made.

    If it was split since then, its headers are other ones than were recorded.
    """
    expected = read_json(recorded)
    found = split.digests_of(opened)
    others = [name for name in found if split.is_other_header(name)]
    if others and not any(map(split.is_other_header, expected)):
        found = {name: digest for name, digest in found.items() if name not in others}
        expected, found = (each | {HEADER: ""} for each in (expected, found))
    names = expected.keys() | found.keys()
    wrong = sorted(f"{name} differs" for name in names if found.get(name) != expected.get(name))
    detail = f"header and {len(opened.tensors)} tensors unchanged since the file was written"
    return Check("bytes", not wrong, some(wrong) or detail)


def check_trunk(opened: Gguf, before: Mapping[str, str]) -> tuple[Check, Trunk]:
    """The trunk is the base's, byte for byte; its digests before and after, for the report.

    If `before` has digests of head and header too, as injection records them, these are compared as
    well.
    """
    trunk = trunk_digests(opened)
    others = {HEADER: reader.header_range(opened), **opened.head.ranges}
    after = {name: sha256(piece) for name, piece in others.items() if name in before} | trunk
    base = {name: digest for name, digest in before.items() if name not in others}
    origins = {HEADER: "what was written", **dict.fromkeys(opened.head.tensors, "the head")}
    wrong = [
        f"{name} differs from {origins.get(name, 'the base')}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]
    check = Check("trunk", not wrong, some(wrong) or f"{len(base)} tensors equal the base's")
    return check, Trunk(len(base), _digest_of(base), _digest_of(trunk))


def head_source(record: Path) -> dict[str, int]:
    """Number of tensors of a fetched head that are verified, and that are trusted on first use.

    `record` is what fetch_head.py wrote. Tensors become verified once their whole shard is fetched,
    which leaves a record of the shard beside this one.
    """
    return HeadRecord.read(record).count_standings(record.parent / "records")


def _digest_of(digests: Mapping[str, str]) -> str:
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))
    return hashlib.sha256(lines.encode()).hexdigest()
