"""The processors that programs may use here: those of the machine, or less by a container's quota.

make runs this file before anything is installed, so it needs Python alone.
"""

import math
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

VARIABLE = "OMP_NUM_THREADS"
"""Set by Snakemake for each job: its threads. Numerical libraries obey it too."""
CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")


def available() -> int:
    """The number of processors for this process: by its affinity, and its control groups."""
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    return max(1, min([count, *map(math.ceil, _quotas())]))


def allotted() -> int:
    """The number of threads that this program may use: those of its job, or all processors."""
    given = os.environ.get(VARIABLE, "")
    most = available()
    return min(int(given), most) if re.fullmatch("[1-9][0-9]*", given) else most


def limit(threads: int | None) -> None:
    """Let this program use so many threads, if given."""
    if threads:
        os.environ[VARIABLE] = str(threads)


def group_files(controller: str, name: str, old: str) -> Iterator[Path]:
    """Where limits of this process's control groups, and of those around them, may be.

    The file of a limit is called `name`, and `old` in version 1 of control groups.
    """
    yield CGROUPS / name
    yield CGROUPS / controller / old
    with suppress(OSError, UnicodeError):
        for line in OWN_CGROUP.read_text(encoding="utf-8").splitlines():
            number, _, rest = line.partition(":")
            controllers, _, path = rest.partition(":")
            is_new = number == "0" and not controllers
            if not is_new and controller not in controllers.split(","):
                continue
            root = CGROUPS if is_new else CGROUPS / controller
            group = Path(path.lstrip("/"))
            for each in (group, *group.parents):
                yield root / each / (name if is_new else old)


def _quotas() -> Iterator[float]:
    """Processors of each limit: time in a period, over its length."""
    for path in group_files("cpu", "cpu.max", "cpu.cfs_quota_us"):
        with suppress(OSError, ValueError):
            words = path.read_text(encoding="ascii").split()
            if path.name == "cpu.cfs_quota_us":
                words += path.with_name("cpu.cfs_period_us").read_text(encoding="ascii").split()
            quota, period = map(int, words)  # "max", and -1 in version 1: no limit
            if quota > 0 < period:
                yield quota / period


if __name__ == "__main__":
    print(available())
