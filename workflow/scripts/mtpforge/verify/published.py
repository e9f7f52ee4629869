"""Checks published files against the sha256 in the reports of their verification."""

from collections.abc import Iterable
from pathlib import Path

from mtpforge import processors
from mtpforge.io import integrity
from mtpforge.publish import receipts
from mtpforge.verify.report import Report


def check(published: Iterable[tuple[Path, Report]]) -> None:
    """Hash files, or all files in the folders of split ones; not those that only stand in.

    Raises DamagedError, OSError.
    """
    parts = []
    for file, report in published:
        if receipts.is_stand_in(file):
            receipts.check_stand_in(file, report)
            continue
        parts += [
            integrity.whole(file.parent / name, digest) for name, _, digest in report.published
        ]
    integrity.check(parts, processors.allotted())
