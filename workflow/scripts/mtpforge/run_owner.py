"""The run of Snakemake that works in a folder: who it is, and whether it still lives.

A run tells its jobs about itself. A job ends with its run, even if that was killed, and holds a
lock while it runs, so that the next run can wait for it. A job on another machine cannot see that
its run was killed; it ends when the next one has written its own name into the run's lock file.
"""

import fcntl
import hashlib
import json
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

VARIABLE = "MTPFORGE_RUN"
"""Set by a run for its jobs: the folder of its lock files, and itself as JSON."""
TOLD = "MTPFORGE_FORECAST"
"""Set for a run that need not begin with its forecast, such as one that `make quant` starts."""
RUN_LOCK = "mtpforge-run.lock"
JOBS_LOCK = "mtpforge-jobs.lock"
_INTERVAL = 1.0
"""Seconds between two looks at the run."""
_FAR_INTERVAL = 5.0
"""The same if it runs on another machine, by a file on a network."""
GRACE = 15.0
"""Seconds in which a job's Snakemake can end by itself after its program, and remove outputs."""
TAG = r"[0-9a-f]{8}-[0-9]+-[0-9]*-[0-9a-f]{6}"
"""A pattern of what `tag` returns."""
_BOOT = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Owner:
    """A process: its host, the host's boot, its number, and when it was started after that.

    Numbers are those of a namespace, such as a container's.
    """

    host: str
    boot: str
    namespace: str
    pid: int
    started: str
    since: str
    command: str
    scratch: str = ""

    @classmethod
    def this_process(cls, command: str, scratch: str = "") -> "Owner":
        """The process that calls this."""
        return cls(
            host=socket.gethostname(),
            boot=_boot(),
            namespace=_namespace(),
            pid=os.getpid(),
            started=_started(os.getpid()) or "",
            since=time.strftime("%Y-%m-%d %H:%M:%S"),
            command=command,
            scratch=scratch,
        )

    @classmethod
    def parse(cls, text: str) -> "Owner | None":
        """The owner in the first line; None if there is none, or none that can be read."""
        try:
            value = json.loads(text.partition("\n")[0])
            return cls(**{**value, "pid": int(value["pid"])})
        except (ValueError, TypeError, KeyError):
            return None

    def as_text(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self))

    def is_here(self) -> bool:
        """Whether the process runs, or ran, on this machine, perhaps before it was restarted."""
        return self.host == socket.gethostname() or (self.boot != "" and self.boot == _boot())

    def lives(self) -> bool:
        """Whether the process runs on this machine: a later one can have got its number.

        One in another container cannot be seen, and counts as living.
        """
        if not self.is_here() or self.boot != _boot():
            return False
        return self.namespace != _namespace() or _started(self.pid) == self.started

    def __str__(self) -> str:
        """The process for messages."""
        return f"process {self.pid} on {self.host}, since {self.since}: {self.command}"


def tag() -> str:
    """A word for a file name that is this process's own: its host, number and start, and chance."""
    pid = os.getpid()
    return f"{_host()}-{pid}-{_started(pid) or ''}-{secrets.token_hex(3)}"


def lives_here(tag: str) -> bool | None:
    """Whether the process with this tag still runs; None if it is one of another machine."""
    host, pid, started, _ = tag.split("-")
    return _started(int(pid)) == started if host == _host() else None


def announce(owner: Owner, folder: Path) -> None:
    """Tell the jobs of this run, by the environment, who it is and where its lock files are."""
    os.environ[VARIABLE] = f"{folder.absolute()}\n{owner.as_text()}"


def withdraw() -> None:
    """Take back what `announce` told, at the end of the run."""
    os.environ.pop(VARIABLE, None)


def follow(is_snakemake: bool = False) -> None:
    """If a run started this program, show that it runs, and end it as SIGTERM does with the run.

    The Snakemake of a job is ended later, after its program, and without a signal: its handler can
    wait for a lock that the same thread holds. Raises SystemExit if the run has ended already, as
    that of a job that waited in a queue.
    """
    folder, _, text = os.environ.get(VARIABLE, "").partition("\n")
    owner = Owner.parse(text)
    if owner is None:
        return
    with suppress(OSError):  # no such folder, or no locks
        descriptor = os.open(Path(folder, JOBS_LOCK), os.O_RDWR | os.O_CREAT, 0o666)
        fcntl.flock(descriptor, fcntl.LOCK_SH)  # until the program ends, however it does
    if _is_over(owner, Path(folder)):
        print(f"error: the run that this job belongs to has ended: {owner}", file=sys.stderr)
        raise SystemExit(128 + signal.SIGTERM)
    end = _exit_later if is_snakemake else _terminate
    threading.Thread(target=_end_with, args=(owner, Path(folder), end), daemon=True).start()


def _end_with(owner: Owner, folder: Path, end: Callable[[], None]) -> None:
    interval = _INTERVAL if _is_visible(owner) else _FAR_INTERVAL
    while not _is_over(owner, folder):
        time.sleep(interval)
    end()


def _terminate() -> None:
    main = threading.main_thread().ident
    if main is not None:
        signal.pthread_kill(main, signal.SIGTERM)


def _exit_later() -> None:
    time.sleep(GRACE)
    os._exit(128 + signal.SIGTERM)


def _is_visible(owner: Owner) -> bool:
    """Whether this process can see if that one lives."""
    here = owner.boot == _boot() and owner.namespace == _namespace()
    return here and bool(_started(os.getpid()))


def _is_over(owner: Owner, folder: Path) -> bool:
    """Whether a run has ended, if that can be seen: here, or because another has its folder."""
    if _is_visible(owner):
        return not owner.lives()
    try:
        now = Owner.parse((folder / RUN_LOCK).read_text(encoding="utf-8", errors="replace"))
    except OSError:  # a file system that cannot be reached, or another folder
        return False
    return now is not None and now != owner


def _host() -> str:
    """This machine, or container, in a few characters; the same after it was restarted."""
    name = f"{socket.gethostname()} {_namespace()}"
    return hashlib.sha256(name.encode()).hexdigest()[:8]


def _boot() -> str:
    """A new text after each start of this machine; empty if it has none."""
    return _BOOT.read_text(encoding="ascii").strip() if _BOOT.exists() else ""


def _namespace() -> str:
    """The namespace of process numbers; empty if the machine has none."""
    link = Path("/proc/self/ns/pid")
    return str(link.readlink()) if link.is_symlink() else ""


def _started(pid: int) -> str | None:
    """When a process was started, in ticks since boot; None if it has ended.

    Empty without /proc, if there is a process of this number.
    """
    try:
        if Path("/proc/self/stat").exists():
            fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
            return None if fields[0] in (b"Z", b"X") else fields[19].decode("ascii")
        os.kill(pid, 0)
    except PermissionError:
        return ""
    except (OSError, IndexError):
        return None
    return ""
