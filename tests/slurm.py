"""A SLURM of two nodes on this machine, for tests; nothing of it outlives them.

Its daemons, and all jobs, are in namespaces of their own: they have another /etc/slurm, a network
that is only a loopback, and process numbers whose first process takes all others along when it
ends. Needs root, and Debian's slurmctld, slurmd, slurm-client and munge. The second node has
another host name and another boot, so that its jobs cannot see Snakemake's process.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from conftest import ROOT

PYTHON = ROOT / ".venv-cluster/bin/python"
"""The Python of `make test-slurm`, which has the plugin: it slows every start of Snakemake."""
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "munged", "unshare", "nsenter")
NODES = ("n1", "n2")
PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
BOOT = "/proc/sys/kernel/random/boot_id"

# The first process of the namespaces: it waits for the test to close its input, or to end.
FIRST = """
set -e
ip link set lo up
ip address add 10.0.0.1/32 dev lo
mount --bind $1/etc /etc/slurm
echo ready
cat > /dev/null
"""
CONFIGURATION = """
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory,CR_LLN
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=1
MpiDefault=none
ReturnToService=2
MinJobAge=3600
KillWait=5
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port=17101 CPUs=2 RealMemory=4000
NodeName=n2 NodeHostname=n2 NodeAddr=127.0.0.1 Port=17102 CPUs=2 RealMemory=4000
PartitionName=ci Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """Why there can be no SLURM here; empty if there can."""
    absent = [name for name in PROGRAMS if not shutil.which(name, path=PATH)]
    if absent:
        return f"no {', '.join(absent)}: apt install slurmctld slurmd slurm-client munge"
    if os.geteuid():
        return "needs root, for namespaces of its own"
    if not PYTHON.exists():
        return f"no {PYTHON.relative_to(ROOT)}: make test-slurm"
    if subprocess.run(["unshare", "--mount", "--net", "--pid", "--fork", "true"]).returncode:
        return "no namespaces here"
    return ""


class Slurm:
    """The cluster, from when it is made until it is closed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("etc", "state", "key", *(f"spool-{node}" for node in NODES)):
            (folder / name).mkdir(mode=0o700)
        text = CONFIGURATION.format(folder=folder, host=os.uname().nodename.partition(".")[0])
        (folder / "etc/slurm.conf").write_text(text)
        (folder / "boot").write_text("00000000-0000-0000-0000-000000000000\n")
        (folder / "key/key").write_bytes(os.urandom(128))
        (folder / "key/key").chmod(0o400)
        namespaces = ["--mount", "--net", "--pid", "--fork", "--mount-proc", "--kill-child"]
        self._first = subprocess.Popen(
            ["unshare", *namespaces, "sh", "-c", FIRST, "sh", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._first.stdout
        assert self._first.stdout.readline() == "ready\n"
        children = Path(f"/proc/{self._first.pid}/task/{self._first.pid}/children").read_text()
        self._pid = children.split()[0]
        self._daemons: list[subprocess.Popen[str]] = []
        self._start_daemons()

    def _start_daemons(self) -> None:
        munge = [f"--{name}={self.folder}/munge.{name}" for name in ("socket", "pid-file")]
        munge += [f"--{name}-file={self.folder}/munge.{name}" for name in ("log", "seed")]
        self._daemon(
            "munged", "--foreground", "--force", f"--key-file={self.folder}/key/key", *munge
        )
        self._until((self.folder / "munge.socket").exists)
        self._daemon("slurmctld", "-D")
        self._daemon("slurmd", "-D", "-N", "n1")
        elsewhere = f"hostname n2 && mount --bind {self.folder}/boot {BOOT} && exec slurmd -D -N n2"
        self._daemon("unshare", "--mount", "--uts", "sh", "-c", elsewhere)
        self._until(lambda: self.states() == {"idle"})

    def _daemon(self, *command: str) -> None:
        self._daemons.append(self.start(command, self.folder / f"{command[0]}.out"))

    def _until(self, is_so: Any, seconds: float = 30) -> None:
        deadline = time.monotonic() + seconds
        while not is_so():
            assert time.monotonic() < deadline, self.logs()
            assert all(each.poll() is None for each in self._daemons), self.logs()
            time.sleep(0.1)

    def logs(self) -> str:
        """The last lines of all logs."""
        files = [*self.folder.glob("*.log"), *self.folder.glob("*.out")]
        return "\n".join(f"{file}: {file.read_text('utf-8', 'replace')[-1500:]}" for file in files)

    def states(self) -> set[str]:
        """The states of the nodes."""
        done = self.run("sinfo", "--noheader", "--Node", "--format=%T", check=False)
        return set(done.split())

    def command(self, command: Iterable[str]) -> list[str]:
        """A command in the namespaces."""
        return ["nsenter", f"--target={self._pid}", "--mount", "--net", "--pid", "--wd=.", *command]

    def start(
        self, command: Iterable[str], log: Path, folder: Path | None = None
    ) -> "subprocess.Popen[str]":
        """Start a command in the namespaces."""
        path = f"{PYTHON.parent}:{PATH}"
        with log.open("w") as out:
            return subprocess.Popen(
                self.command(command),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                cwd=folder or self.folder,
                env={**os.environ, "PATH": path},
                text=True,
            )

    def run(self, *command: str, check: bool = True) -> str:
        """Run a command in the namespaces, and return what it prints."""
        done = subprocess.run(self.command(command), capture_output=True, text=True, timeout=60)
        assert not check or done.returncode == 0, done.stderr
        return done.stdout

    def close(self) -> None:
        """End everything."""
        assert self._first.stdin
        self._first.stdin.close()
        self._first.wait(timeout=30)
        for daemon in self._daemons:
            daemon.wait(timeout=30)


if __name__ == "__main__":
    sys.exit(missing())
