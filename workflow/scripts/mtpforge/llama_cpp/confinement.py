"""Become another program: with limits, without network, and ended by the kernel with the caller.

`process` starts this file with Python, by its path. Between fork and exec in the caller itself none
of this would be safe, because the caller has threads. It runs often, so it imports little: pathlib,
signal and contextlib take as long to load as Python itself.
"""

import ctypes
import os
import resource
import sys
import time

OPEN_FILES = 1024
CANNOT_RUN = 126
"""The exit code if the program cannot be started, as a shell's."""
_NEW_USER = 0x10000000  # of Linux' unshare()
_NEW_NETWORK = 0x40000000
_DEATH_SIGNAL = 1  # of Linux' prctl()
_NO_NEW_PRIVILEGES = 38
_SIGKILL = 9


def main() -> None:
    """Arguments: the caller's process, limits of memory and of a written file, network, program.

    The limits are in bytes, 0 for none; network is 0 or 1.
    """
    caller, memory, written, network, *command = sys.argv[1:]
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_NOFILE, OPEN_FILES)
    if int(memory):
        # Not the address space: a mapped model takes none of this, nor does what a GPU reserves.
        _limit(resource.RLIMIT_DATA, int(memory))
    if int(written):
        _limit(resource.RLIMIT_FSIZE, int(written))
    if not int(network):
        leave_network()
    end_with(int(caller))
    try:
        os.execvp(command[0], command)  # noqa: S606 - a list, never a shell string
    except OSError as error:
        print(f"error: cannot run {command[0]}: {error.strerror}", file=sys.stderr)
        sys.exit(CANNOT_RUN)


def leave_network() -> None:
    """Move to a network namespace of one's own, without any interface, if the kernel lets us.

    Root keeps its user namespace: in another it could not write to the folders of others.
    """
    unshare = getattr(ctypes.CDLL(None, use_errno=True), "unshare", None)
    if unshare is None or unshare(_NEW_NETWORK) == 0 or os.geteuid() == 0:
        return
    user, group = os.geteuid(), os.getegid()
    if unshare(_NEW_USER | _NEW_NETWORK) == 0:
        _map(uid_map=f"{user} {user} 1", setgroups="deny", gid_map=f"{group} {group} 1")


def end_with(caller: int) -> None:
    """Let the kernel kill this process when the caller ends, or else a child that watches it."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is None:
        watch(caller)
        return
    prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    prctl(_DEATH_SIGNAL, _SIGKILL)
    if os.getppid() != caller:  # it has ended before we asked
        os.kill(os.getpid(), _SIGKILL)


def watch(caller: int) -> None:
    """Start a child that kills this process when the caller has ended, and ends with it."""
    watched = os.getpid()
    if os.fork():
        return
    os.closerange(0, OPEN_FILES)  # the caller reads our output to its end
    while os.getppid() == watched:
        try:
            os.kill(caller, 0)
        except ProcessLookupError:
            os.kill(watched, _SIGKILL)
        except PermissionError:
            pass
        time.sleep(0.2)
    os._exit(0)


def _map(**files: str) -> None:
    """Write the files of this process's user namespace."""
    try:
        for name, text in files.items():
            with open(f"/proc/self/{name}", "w", encoding="ascii") as file:  # noqa: PTH123
                file.write(text)
    except OSError:
        return  # without a map our files only seem to be those of nobody


def _limit(kind: int, most: int) -> None:
    hard = resource.getrlimit(kind)[1]
    least = most if hard == resource.RLIM_INFINITY else min(most, hard)
    try:
        resource.setrlimit(kind, (least, least))
    except (OSError, ValueError):
        return


if __name__ == "__main__":
    main()
