"""Terminal output of a run: each job's start and end, then the summary or the failures.

Replaces Snakemake's log handler; all of its messages are still in .snakemake/log/. A program's
output goes to the job's log, whose last line is the job's progress and, at the end, its figure.
With `--verbose` Snakemake's handler stays, and the programs' output is shown too.
"""

import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from snakemake.logging import logger
from snakemake.settings.enums import Quietness
from snakemake_interface_logger_plugins.common import LogEvent

from mtpforge import run_owner, table
from mtpforge.errors import ForgeError
from mtpforge.io import storage
from mtpforge.rules.build import Build
from mtpforge.rules.joblog import ESCAPES, Job

NOTHING_TO_DO = "Nothing to be done"
INTERRUPTED = "Terminating processes on user request"
# During a run, only these messages without an event are shown, plus warnings and errors ...
SHOWN = (
    NOTHING_TO_DO,
    INTERRUPTED,
    "Will exit after",
    "Trying to restart",
    "Reasons:",
    "This was a dry-run",
)
# ... and never these: a user cannot use them, or `failure` says more.
HIDDEN = (
    "Adding ",  # to report.html
    "Building DAG of jobs",
    "Config file ",  # is extended by options
    "Updating checkpoint dependencies",
    "Assuming unrestricted shared filesystem",
    "Exiting because a job execution failed",
    "WorkflowError:\nAt least one job did not complete",
)
# Jobs of these rules only write a setting, in no time, and there is one for each variant.
UNSEEN = ("recipe",)
# Most jobs of these rules take moments: their start has a line if they take longer than this.
BRIEF = ("fetch",)
BRIEF_SECONDS = 5.0
# Programs of these rules write to the terminal too.
ECHOED = ("publish",)
# With these events, jobs are counted and errors kept, even if --quiet hides their lines.
ALWAYS_HANDLED = (
    LogEvent.JOB_INFO,
    LogEvent.JOB_FINISHED,
    LogEvent.PROGRESS,
    LogEvent.JOB_ERROR,
    LogEvent.ERROR,
)
QUIET = {Quietness.ALL, Quietness.PROGRESS, Quietness.RULES}
EXIT_STATUS = re.compile(
    r"CalledProcessError in .*(?:exit status (\d+)|died with <Signals\.\w+: (\d+)>)", re.DOTALL
)
OURS = "|".join(each.__name__ for each in ForgeError.__subclasses__())
INSIDE = re.compile(rf"^ *(?:{OURS}): (.*)$", re.MULTILINE)
IN_SNAKEFILE = re.compile(
    r"WorkflowError(?: in file [^\n]*Snakefile\", line \d+)?:\n(.*?)(?:\n  File .*)?", re.DOTALL
)
PLAN = Path(__file__).resolve().parents[2] / "plan.py"
PAGE = 4096  # bytes that a file takes at least on most disks
PROGRESS_INTERVAL = 30.0  # seconds; for long jobs, a tenth of their time so far


def attach(workflow: Any) -> "Console | None":
    """Replace Snakemake's handler; None in a cluster's jobs, or if `--logger` has replaced it."""
    handlers = (each for each in logger.handlers if each.name == "DefaultStreamHandler")
    stock = next(handlers, None)
    if not workflow.is_main_process or not isinstance(stock, logging.StreamHandler):
        return None
    console = Console(workflow, stock)
    if not console.verbose:
        logger.removeHandler(stock)
    logger.addHandler(console)
    return console


class Console(logging.Handler):
    """Shows Snakemake's messages briefly."""

    def __init__(self, workflow: Any, stock: "logging.StreamHandler[Any]") -> None:
        super().__init__()
        self.workflow = workflow
        settings = workflow.logger_manager.settings
        self.verbose: bool = settings.verbose
        self.dryrun: bool = settings.dryrun
        self.quiet = not QUIET.isdisjoint(settings.quiet or ())
        self.stream = stock.stream
        self.filters = stock.filters  # they know --quiet, --printshellcmds and --debug-dag
        self.formatter = stock.formatter
        self.status = ""  # the line below all others, on a terminal
        self.running: dict[int, Job] = {}
        self.finished: list[int] = []  # since the last count
        self.failed: dict[int, str] = {}
        self.exit_status: dict[int | None, int] = {}  # by thread
        self.done = 0
        self.total = 0
        self.began = 0.0
        self.build: Build | None = None  # which the Snakefile makes
        self.only: list[str] = []  # the models that the run is for, if they were chosen
        self.interrupted = False
        self.reported = False  # the failures, at the end
        self.broken = False  # by an error outside jobs
        self.closed = threading.Event()
        self.shows = {
            None: self._message,
            LogEvent.ERROR: self._error,
            LogEvent.WORKFLOW_STARTED: self._begin,
            LogEvent.RUN_INFO: self._count,
            LogEvent.JOB_INFO: self._start,
            LogEvent.JOB_FINISHED: lambda record: self.finished.append(record.job_id),
            LogEvent.PROGRESS: self._finish,
            LogEvent.JOB_ERROR: self._fail,
            LogEvent.SHELLCMD: self._unchanged,
            LogEvent.DEBUG_DAG: self._unchanged,
        }

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to handle a message: `--quiet` must not hide failures."""
        event = getattr(record, "event", None)
        if event in ALWAYS_HANDLED or record.levelno >= logging.ERROR:
            return True
        return bool(super().filter(record))

    def emit(self, record: logging.LogRecord) -> None:
        """Show a message, if a user needs it."""
        try:
            if show := self.shows.get(getattr(record, "event", None)):
                show(record)
        except BrokenPipeError:
            raise
        except Exception:
            self.handleError(record)

    def close(self) -> None:
        """End the thread that follows the jobs, and report failures that `onerror` has not."""
        self.closed.set()
        self._rewrite("")
        if (self.failed or (self.broken and self.done)) and not self.reported:
            self.reported = True
            self._line(self._failures())  # --no-hooks, or an exception in an input function
        super().close()

    # ── the beginning of a run ──

    def forecast(self, models: Sequence[str], options: str) -> None:
        """Say what a build of these models takes; nothing if that fails, as the build says why."""
        targets = {job.rule.name for job in self.workflow.dag.jobs}
        if os.environ.get(run_owner.TOLD) or targets.isdisjoint({"all", "publish"}):
            return
        chosen = [*models, *(() if "all" in targets else ("--published",))]
        command = [sys.executable, str(PLAN), "--totals", *shlex.split(options), *chosen]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if done.stdout:
            self._tell(done.stdout.rstrip())

    # ── the end of a run ──

    def success(self) -> None:
        """Report the built files."""
        elapsed = table.duration(time.time() - self.began)
        jobs = "1 job" if self.done == 1 else f"{self.done} jobs"
        self._tell(f"\n{jobs} done in {elapsed}.\n{self._made()}")

    def failure(self) -> None:
        """Report what is wrong with each failed job, where its log is, and what to do."""
        self.reported = True
        self._tell(self._failures(), logging.ERROR)

    def _failures(self) -> str:
        failed = list(self.failed.values())
        if not self.interrupted:  # such as one whose output is missing, which has no JOB_ERROR
            failed += [describe(job, "see above", [job.log]) for job in self.running.values()]
        counts = f"{self.done} of {self.total} jobs done, {len(failed)} failed"
        counts += ", interrupted. " if self.interrupted else ". "
        advice = "Run the same command again to continue: finished jobs are kept."
        if failed:
            advice = f"docs/troubleshooting.md explains errors. {advice}"
        return "\n".join(["", *failed, counts + advice])

    def _made(self) -> str:
        """The files, where they are, and what to do next; empty after other targets."""
        targets = {job.rule.name: job for job in self.workflow.dag.jobs}
        if not self.build or not targets.keys() & {"all", "publish"}:
            return ""
        from mtpforge.report import ending  # and what it imports: a second, in each run

        publish = self.build.publish
        if "publish" in targets and publish.uploaded:
            made = ending.after_upload(publish.uploaded, publish.is_dry, self.began)
            return f"\n{made}"
        if "all" not in targets:
            return ""
        files = targets["all"].input
        named = (Path(file) for file in files if file.endswith("/summary.md"))
        summary = next(named, Path(os.devnull))
        if not summary.is_file():  # --touch or --batch
            return ""
        reports = [Path(file) for file in files if Path(file).parent.name == "reports"]
        publishes = bool(publish.uploaded)
        return "\n" + ending.after_build(
            summary, reports, self.began, publishes, publish.addable, self.only
        )

    def _tell(self, text: str, level: int = logging.INFO) -> None:
        """Log it, so that it is in .snakemake/log/ too."""
        quietness = {"quietness": Quietness.PROGRESS} if level == logging.INFO else {}
        logger.log(level, text, extra=quietness)

    # ── messages ──

    def _message(self, record: logging.LogRecord) -> None:
        text = str(record.msg)
        self.interrupted |= text.startswith(INTERRUPTED)
        important = record.levelno > logging.INFO or hasattr(record, "quietness")
        if important or not self.began or text.startswith(SHOWN):
            self._unless_hidden(record)
        if text.startswith(NOTHING_TO_DO) and not self.dryrun:
            self._tell(self._made())

    def _error(self, record: logging.LogRecord) -> None:
        if failed := EXIT_STATUS.search(str(record.msg)):
            status = int(failed[1]) if failed[1] else 128 + int(failed[2])
            self.exit_status[record.thread] = status
        elif not str(record.msg).startswith(HIDDEN):
            self.broken = True
            self._line(brief(self.format(record)))

    def _begin(self, record: logging.LogRecord) -> None:
        self.began = record.created
        if not self.dryrun and not self.quiet:
            threading.Thread(target=self._follow, daemon=True).start()

    def _count(self, record: Any) -> None:
        if self.dryrun and self.total:  # a dry run counts twice; here after the jobs
            self._unchanged(record)
        self.total = record.stats["total"]

    def _start(self, record: Any) -> None:
        if record.shellcmd is None:  # such as `all`
            return
        label = record.rule_msg or " ".join([record.rule_name, *record.wildcards.values()])
        if self.dryrun and self.quiet:
            return
        if self.dryrun:
            reason, _, _ = record.reason.partition(":")
            self._line(f"{label} [{reason.lower()}]")
            return
        output = record.output[0] if record.output else ""
        log = Path(record.log[0] if record.log else os.devnull)
        progress = record.created + PROGRESS_INTERVAL
        seen = not self.quiet and record.rule_name not in UNSEEN
        self.running[record.jobid] = Job(
            label, output, log=log, started=record.created, next_progress=progress, seen=seen,
            echoed=record.rule_name in ECHOED,
        )  # fmt: skip
        if record.rule_name not in BRIEF:
            self._say_start(self.running[record.jobid])

    def _say_start(self, job: Job) -> None:
        if job.seen and not job.announced:
            self._say("start", job.label)
        job.announced = True

    def _finish(self, record: Any) -> None:
        self.done = record.done
        self.total = record.total
        for number in self.finished:
            self.failed.pop(number, None)  # in an earlier attempt
            if job := self.running.pop(number, None):
                self._copy(job)
                if job.seen:
                    self._show_end(job, record.created)
        self.finished.clear()

    def _show_end(self, job: Job, now: float) -> None:
        figure = "" if job.echoed else job.last_line()
        counts = f"({table.duration(now - job.started)}, {self.done}/{self.total})"
        self._say("done", f"{job.label} {counts}" + (figure and f": {figure}"))
        for line in job.warnings() if not job.echoed else ():
            self._line(f"         {line}")

    def _fail(self, record: Any) -> None:
        status = self.exit_status.pop(record.thread, 0)
        job = self.running.pop(record.jobid, None)
        if job is None:
            return
        self._copy(job)
        took = table.duration(record.created - job.started)
        if self.interrupted:
            self._say("stopped", f"{job.label} ({took})")
            return
        self._say("FAILED", f"{job.label} ({took})")
        error = record.rule_msg or job.error() or full_disk(job.log) or ending(status)
        self.failed[record.jobid] = describe(job, error, record.log)

    # ── jobs that run ──

    def _follow(self) -> None:
        while not self.closed.wait(1.0):
            self.acquire()
            try:
                self.look()
            except OSError:  # the log has gone, or the terminal
                continue
            finally:
                self.release()

    def look(self) -> None:
        """Show the progress of running jobs."""
        for job in self.running.values():
            self._copy(job)
            if time.time() - job.started > BRIEF_SECONDS:
                self._say_start(job)
        if self.stream.isatty() and not self.verbose:
            self._rewrite("  ".join(map(progress, self.running.values())))
        else:
            self._report_long()

    def _copy(self, job: Job) -> None:
        if self.verbose and not job.echoed:
            self.stream.write(job.news())
            self.stream.flush()

    def _report_long(self) -> None:
        now = time.time()
        for job in self.running.values():
            if now > job.next_progress:
                job.next_progress = now + max(PROGRESS_INTERVAL, (now - job.started) / 10)
                self._say("...", progress(job))

    # ── lines ──

    def _unless_hidden(self, record: logging.LogRecord) -> None:
        if not str(record.msg).startswith(HIDDEN):
            self._unchanged(record)

    def _unchanged(self, record: logging.LogRecord) -> None:
        self._line(self.format(record))

    def _say(self, what: str, text: str) -> None:
        self._line(f"{time.strftime('%H:%M:%S')} {what:6} {text}")

    def _line(self, text: str) -> None:
        if not self.verbose:
            self._rewrite("")
            print(text, file=self.stream, flush=True)

    def _rewrite(self, status: str) -> None:
        if status != self.status:
            width = terminal_width(self.stream.fileno())
            self.stream.write(f"\r\x1b[K{status[: width - 1]}")
            self.stream.flush()
            self.status = status


def terminal_width(descriptor: int) -> int:
    """Columns of a terminal; 80 if it does not say."""
    try:
        return os.get_terminal_size(descriptor).columns or 80
    except OSError:
        return 80


def progress(job: Job) -> str:
    """How long a job has run, and its last line."""
    line = job.last_line()
    return f"{job.label} ({table.duration(time.time() - job.started)})" + (line and f": {line}")


def describe(job: Job, error: str, logs: Sequence[object]) -> str:
    """A failed job's part of the report at the end."""
    named = ", ".join(map(str, logs))
    file = f"  file   {job.output}\n" if job.output else ""
    return f"{job.label}\n  error  {error}\n{file}  log    {named}\n"


def brief(text: str) -> str:
    """Snakemake's message about an error of ours: the error alone, without places in our files."""
    plain = ESCAPES.sub("", text).strip()
    # of a function that Snakemake has called, or of the Snakefile
    found = INSIDE.search(plain) or IN_SNAKEFILE.fullmatch(plain)
    return f"error: {found[1]}" if found else text


def full_disk(log: Path) -> str:
    """Say that a log is empty because its disk is full; empty if it is not."""
    free = storage.room(log)
    return f"no message: the disk of {log} is full" if free is not None and free < PAGE else ""


def ending(status: int) -> str:
    """Describe the end of a program that left no message."""
    if status == 128 + signal.SIGKILL:
        return "killed (signal 9): out of memory?"
    if status == 128 + signal.SIGBUS:
        return "ended by SIGBUS: a file could not be read, or was cut: does a disk fail (dmesg)?"
    if status > 128:
        return f"ended by signal {status - 128}"
    return f"no message (exit status {status})" if status else "no message"
