"""One run of Snakemake at a time in a folder; the lock of one that was killed is taken over.

Snakemake's own lock says neither who made it nor whether that process lives. Here the kernel keeps
a second lock (flock) that ends with the process, whose name is in the locked file. A signal ends
the jobs too, and the run leaves nothing behind.
"""

import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from snakemake.exceptions import WorkflowError
from snakemake.logging import logger
from snakemake.shell import shell

from mtpforge import run_owner
from mtpforge.errors import ForgeError
from mtpforge.io import leftovers
from mtpforge.rules.code import digest
from mtpforge.rules.folder_lock import forget, holding, owner_of, wait_for_jobs

PATIENCE = 20.0
"""Seconds that jobs have after a signal before they are killed."""
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_ended: list[int] = []
"""The signals that have arrived."""


def guard(workflow: Any) -> None:
    """Replace Snakemake's lock, and rerun what a kill interrupted, whatever the profile says.

    In a job's own Snakemake, as on a cluster, follow the run: it deletes outputs, before and after
    the program. Raises SystemExit if the run has ended.
    """
    if not workflow.is_main_process:
        run_owner.follow(is_snakemake=True)
        return
    prepare = workflow._prepare_dag

    def prepared(**options: Any) -> None:
        workflow.dag_settings.force_incomplete = True
        prepare(**options)
        persistence = workflow.persistence
        folder = Path(persistence.path)
        persistence.cleanup_locks = partial(_unlock, persistence, folder)
        if options["lock_warn_only"]:
            persistence.lock = partial(_warned, folder)
        elif not options.get("nolock"):
            persistence.lock = partial(_locked, persistence, folder, persistence.lock)

    workflow._prepare_dag = prepared
    end_on_signals()


def end_on_signals() -> None:
    """End jobs and run at SIGINT, SIGTERM and SIGHUP, unless they are ignored (nohup).

    Snakemake lets jobs finish after SIGTERM, which can take hours.
    """
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _end)


def clear_pieces(workflow: Any, folders: Iterable[str]) -> None:
    """After a run that has finished all files of these models, remove pieces that no plan wants."""
    asked = workflow.dag_settings
    partial_run = asked.until or asked.omit_from or asked.batch
    if partial_run or not any(job.rule.name == "all" for job in workflow.dag.jobs):
        return
    for folder in folders:
        for path in leftovers.pieces(Path(folder)):
            leftovers.delete(path)


@contextmanager
def _locked(persistence: Any, folder: Path, stock: Any) -> Iterator[None]:
    """Snakemake's lock inside ours."""
    command = shlex.join(["snakemake", *sys.argv[1:]])
    with ExitStack() as stack:
        try:
            taken_over = stack.enter_context(holding(folder, command, logger.warning))
        except ForgeError as error:
            raise WorkflowError(str(error)) from None
        if taken_over:
            persistence.unlock()
            (folder / "locks").mkdir(exist_ok=True)
        remove_leftovers()
        try:
            with stock():
                yield
        finally:
            if _ended:
                wait_for_jobs(folder, logger.warning)
                remove_leftovers()


def remove_leftovers() -> list[Path]:
    """Remove what killed jobs left, except what the programs of today can go on with."""
    return leftovers.remove(codes=[digest("convert.py")])


@contextmanager
def _warned(folder: Path) -> Iterator[None]:
    """A dry run only says who is building."""
    owner = owner_of(folder)
    if owner and owner.lives():
        logger.warning(f"Another run is building here: {owner}")
    yield


def _unlock(persistence: Any, folder: Path) -> None:
    """For --unlock: forget the run too. A living one keeps the kernel's lock."""
    persistence.unlock()
    forget(folder)


# ── signals ──


def _end(number: int, _: Any) -> None:
    """Ask the jobs to end, and unwind; a second signal kills them."""
    _ended.append(number)
    if len(_ended) > 1:
        _signal_jobs(signal.SIGKILL, set())
        return
    threading.Thread(target=_end_jobs, daemon=True).start()
    sys.exit(128 + number)


def _end_jobs() -> None:
    """Ask the jobs to end, also those that are just starting; later kill them."""
    told: set[psutil.Process] = set()
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        _signal_jobs(signal.SIGTERM, told)
        time.sleep(0.2)
    while True:
        _signal_jobs(signal.SIGKILL, set())
        time.sleep(0.2)


def _signal_jobs(number: int, told: set[psutil.Process]) -> None:
    """Send a signal to all programs, not to their shells: these wait for them, and then end."""
    shells = {Path(shell.get_executable() or "sh").name}
    for job in list(shell._processes.values()):
        with suppress(psutil.Error):  # it has just ended
            first = psutil.Process(job.pid)
            for process in {first, *first.children(recursive=True)} - told:
                if process.name() not in shells:
                    told.add(process)
                    process.send_signal(number)
