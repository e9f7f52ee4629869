"""Checks published files against the sha256 in the reports of their verification."""

import os
from collections.abc import Iterable
from pathlib import Path

from mtpforge.io import integrity
from mtpforge.verify.report import Report


def check(published: Iterable[tuple[Path, Report]]) -> None:
    """Hash files, or all files in the folders of split ones. Raises DamagedError, OSError."""
    parts = [
        integrity.whole(file.parent / name, digest)
        for file, report in published
        for name, _, digest in report.published
    ]
    integrity.check(parts, os.cpu_count() or 1)
