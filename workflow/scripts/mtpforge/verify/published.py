"""Holding published files against the sha256 in the reports of their verification."""

import os
from collections.abc import Iterable
from pathlib import Path

from mtpforge.io import held
from mtpforge.verify.report import Report


def check(published: Iterable[tuple[Path, Report]]) -> None:
    """Hash files, or all files in the folders of split ones. Raises DamagedError, OSError."""
    parts = [
        held.whole(file.parent / name, digest)
        for file, report in published
        for name, _, digest in report.published
    ]
    held.check(parts, os.cpu_count() or 1)
