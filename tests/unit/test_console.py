"""The parts of a run's lines: logs that are being written, times, and how programs end."""

import io
import logging
import os
import pty
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from mtpforge import table
from mtpforge.io import storage
from mtpforge.rules import console
from mtpforge.rules.joblog import WIDTH, Job
from snakemake.logging import DefaultFilter
from snakemake.settings.enums import Quietness
from snakemake_interface_logger_plugins.common import LogEvent


def job(log: Path) -> Job:
    return Job("convert", "F.gguf", log, started=0, next_progress=30)


def test_the_last_line_is_what_a_terminal_would_show(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert job(log).last_line() == ""
    log.write_bytes(b"one\n\x1b[32mtwo\x1b[0m: 10%\r\x1b[Ktwo: 20%\n\n")
    assert job(log).last_line() == "two: 20%"
    log.write_bytes(b"x" * 100_000 + b"\n" + b"y" * 1000)
    assert job(log).last_line() == "y" * WIDTH
    log.write_text("[   1/  70] a.weight\n")
    assert job(log).last_line() == "[   1/  70] a.weight"
    log.write_text("llama-quantize: [   1/  70], 9 s left\n[   2/  70] b.weight\n[3]7.1,[4]\n")
    assert job(log).last_line() == "llama-quantize: [   1/  70], 9 s left"


def test_an_error_is_what_the_program_says_it_is(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("12% done\nerror: first\nagain\nerror: F.gguf: is damaged\n  error: see 3\n")
    assert job(log).error().splitlines() == ["F.gguf: is damaged", "           error: see 3"]
    log.write_text("".join(f"line {number}\n" for number in range(100)))
    assert job(log).error().endswith("line 99") and len(job(log).error().splitlines()) == 12
    log.write_text("")
    assert job(log).error() == ""


def test_warnings_are_those_of_the_whole_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("warning: one\n" + "10%\n" * 10_000 + "no warning: at all\nwarning: two\ndone\n")
    assert job(log).warnings() == ["warning: one", "warning: two"]


def test_news_of_a_log_come_once(tmp_path: Path) -> None:
    running = job(tmp_path / "log")
    assert running.news() == ""
    running.log.write_text("10%\n")
    assert running.news() == "10%\n"
    with running.log.open("a") as file:
        file.write("20%\n")
    assert (running.news(), running.news()) == ("20%\n", "")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.4, "9.4 s"), (61, "61 s"), (192, "3 min 12 s"), (86_399, "23 h 59 min")],
)
def test_times_are_short(seconds: float, text: str) -> None:
    assert table.duration(seconds) == text


def test_a_program_without_a_message_ended_somehow() -> None:
    assert console.ending(137) == "killed (signal 9): out of memory?"
    assert console.ending(135).startswith("ended by SIGBUS: a file could not be read")
    assert console.ending(143) == "ended by signal 15"
    assert console.ending(3) == "no message (exit status 3)"


def test_an_empty_log_on_a_full_disk_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "x.log"
    assert console.full_disk(log) == ""
    monkeypatch.setattr(storage, "room", lambda path: 0)
    assert console.full_disk(log) == f"no message: the disk of {log} is full"


def shown_on(stream: io.TextIOBase, *quiet: Quietness) -> console.Console:
    """A console without a workflow, with Snakemake's own filter."""
    settings = SimpleNamespace(verbose=False, dryrun=False, quiet=set(quiet))
    workflow = SimpleNamespace(logger_manager=SimpleNamespace(settings=settings))
    stock = logging.StreamHandler(stream)
    stock.addFilter(DefaultFilter(set(quiet), False, False, False, False))
    return console.Console(workflow, stock)


def message(event: LogEvent | None, text: str = "", **values: object) -> logging.LogRecord:
    record = logging.makeLogRecord({"msg": text, "levelno": logging.INFO, **values})
    record.event = event
    return record


def started(log: Path, number: int = 1, rule: str = "convert") -> logging.LogRecord:
    return message(
        LogEvent.JOB_INFO,
        jobid=number,
        rule_name=rule,
        rule_msg="m: convert",
        shellcmd="python",
        output=["F.gguf"],
        log=[str(log)],
    )


def test_a_long_job_has_a_line_now_and_then(tmp_path: Path) -> None:
    stream, log = io.StringIO(), tmp_path / "log"
    shown = shown_on(stream)
    shown.handle(started(log))
    log.write_text("3.00 of 10.00 GB (30%)\n")
    shown.look()
    assert "30%" not in stream.getvalue()
    shown.running[1].started -= 1000
    shown.running[1].next_progress -= 1000
    shown.look()
    shown.look()
    assert stream.getvalue().count("m: convert (16 min 40 s): 3.00 of 10.00 GB (30%)\n") == 1
    assert shown.running[1].next_progress - time.time() == pytest.approx(100, abs=5)


def test_a_job_that_only_writes_a_setting_has_no_lines_unless_it_fails(tmp_path: Path) -> None:
    """There is one for each variant."""
    stream = io.StringIO()
    shown = shown_on(stream)
    shown.handle(started(tmp_path / "log", 1, "recipe"))
    shown.handle(message(LogEvent.JOB_FINISHED, job_id=1))
    shown.handle(message(LogEvent.PROGRESS, done=1, total=2))
    assert stream.getvalue() == ""
    shown.handle(started(tmp_path / "log", 2, "recipe"))
    shown.handle(message(LogEvent.JOB_ERROR, jobid=2, rule_msg=None, log=[], thread=7))
    assert "FAILED" in stream.getvalue()


def test_a_small_file_has_one_line(tmp_path: Path) -> None:
    stream = io.StringIO()
    shown = shown_on(stream)
    shown.handle(started(tmp_path / "log", 1, "fetch"))
    shown.look()
    shown.handle(message(LogEvent.JOB_FINISHED, job_id=1))
    shown.handle(message(LogEvent.PROGRESS, done=1, total=2))
    assert stream.getvalue().count("\n") == 1 and " done   m: convert" in stream.getvalue()
    shown.handle(started(tmp_path / "log", 2, "fetch"))
    shown.running[2].started -= 10
    shown.look()
    shown.look()
    assert stream.getvalue().count(" start  m: convert") == 1


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0.0 kB"), (1234, "1.2 kB"), (123_456, "0.12 MB"), (2_060_000_000, "2.06 GB")],
)
def test_sizes_are_not_zero(count: int, text: str) -> None:
    assert table.size(count) == text


def test_snakemake_does_not_say_that_there_are_options(tmp_path: Path) -> None:
    stream = io.StringIO()
    said = (
        "Config file config.yaml is extended by additional config specified via the command line."
    )
    shown_on(stream).handle(message(None, said))
    assert stream.getvalue() == ""


def test_a_terminal_has_one_line_for_what_runs(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    log = tmp_path / "log"
    log.write_text("30%\n")
    with os.fdopen(theirs, "w") as stream:
        shown = shown_on(stream)
        shown.handle(started(log))
        shown.look()
        log.write_text("40%\n")
        shown.look()
        shown.handle(message(LogEvent.JOB_FINISHED, job_id=1))
        shown.handle(message(LogEvent.PROGRESS, done=1, total=2))
        text = ""
        while "1/2" not in text:
            text += os.read(ours, 10_000).decode()
    os.close(ours)
    first, last = text.split("\r\n", 1)
    assert first.endswith(" start  m: convert")
    *status, done = last.split("\r\x1b[K")
    assert [line.rpartition(": ")[2] for line in status if line] == ["30%", "40%"]
    assert done.rstrip().endswith("m: convert (0.0 s, 1/2): 40%")


def test_the_report_on_failures_leaves_out_what_a_second_attempt_has_mended(tmp_path: Path) -> None:
    log = tmp_path / "log"
    shown = shown_on(io.StringIO())
    for number in (1, 2):
        shown.handle(started(log, number))
        log.write_text(f"error: no. {number}\n")
        values = {"rule_msg": None, "log": [str(log)], "thread": 7}
        shown.handle(message(LogEvent.JOB_ERROR, jobid=number, **values))
    shown.handle(started(log, 1))
    shown.handle(message(LogEvent.JOB_FINISHED, job_id=1))
    shown.handle(message(LogEvent.PROGRESS, done=1, total=2))
    (report,) = shown.failed.values()
    assert report == f"m: convert\n  error  no. 2\n  file   F.gguf\n  log    {log}\n"


def test_a_killed_program_is_told_from_one_that_fails(tmp_path: Path) -> None:
    (tmp_path / "log").touch()
    shown = shown_on(io.StringIO())
    shown.handle(started(tmp_path / "log"))
    why = "RuleException:\nCalledProcessError in file X:\n'...' returned non-zero exit status 137."
    shown.handle(message(LogEvent.ERROR, why, thread=7))
    values = {"rule_msg": None, "log": [], "thread": 7}
    shown.handle(message(LogEvent.JOB_ERROR, jobid=1, **values))
    assert "killed (signal 9): out of memory?" in shown.failed[1]


@pytest.mark.parametrize("quietness", [Quietness.ALL, Quietness.RULES, Quietness.PROGRESS])
def test_quiet_hides_jobs_but_no_failure(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, quietness: Quietness
) -> None:
    stream, log = io.StringIO(), tmp_path / "log"
    shown = shown_on(stream, quietness)
    for number in (1, 2):
        shown.handle(started(log, number))
    log.write_text("error: bad file\n")
    shown.handle(message(LogEvent.JOB_FINISHED, job_id=1))
    shown.handle(message(LogEvent.PROGRESS, done=1, total=2))
    values = {"rule_msg": None, "log": [str(log)], "thread": 7, "levelno": logging.ERROR}
    shown.handle(message(LogEvent.JOB_ERROR, jobid=2, **values))
    (line,) = stream.getvalue().splitlines()
    assert line.endswith("FAILED m: convert (0.0 s)")
    shown.failure()
    assert "error  bad file" in caplog.messages[-1] and "1 failed" in caplog.messages[-1]
    assert not hasattr(caplog.records[-1], "quietness")


def test_failures_are_reported_even_if_snakemake_calls_no_handler(tmp_path: Path) -> None:
    """With --no-hooks, or if an input function raises after a checkpoint."""
    stream, log = io.StringIO(), tmp_path / "log"
    shown = shown_on(stream)
    shown.handle(started(log))
    log.write_text("error: bad file\n")
    values = {"rule_msg": None, "log": [str(log)], "thread": 7}
    shown.handle(message(LogEvent.JOB_ERROR, jobid=1, **values))
    shown.close()
    assert stream.getvalue().count("error  bad file") == 1


@pytest.mark.parametrize(
    "said",
    [
        'WorkflowError in file "/a b/Snakefile", line 49:\nconfig.yaml: bad\n'
        '  File "/a b/Snakefile", line 49, in <module>',
        "InputFunctionException in rule convert in file X, line 11:\nError:\n"
        "  DownloadError: config.yaml: bad\nWildcards:\n  model=a\nTraceback:\n  File x (rule y)",
        'WorkflowError:\nconfig.yaml: bad\n  File "/x.py", line 9, in f\n  File "/y", line 2, in g',
        'WorkflowError in file "/a/Snakefile", line 49:\n\x1b[31mconfig.yaml: bad\x1b[0m\n',
    ],
)
def test_an_error_of_ours_is_shown_alone(said: str) -> None:
    stream = io.StringIO()
    shown = shown_on(stream)
    shown.handle(message(LogEvent.ERROR, said, levelno=logging.ERROR))
    shown.close()
    assert stream.getvalue() == "error: config.yaml: bad\n"
    assert console.brief("KeyError: 'x'\n  File y") == "KeyError: 'x'\n  File y"


def test_an_error_after_some_jobs_says_what_has_passed() -> None:
    stream = io.StringIO()
    shown = shown_on(stream)
    shown.handle(message(LogEvent.PROGRESS, done=2, total=5))
    shown.handle(message(LogEvent.ERROR, "Error:\n  GgufError: F.gguf: bad", levelno=logging.ERROR))
    shown.close()
    shown.close()
    first, *rest = stream.getvalue().splitlines()
    assert first == "error: F.gguf: bad"
    assert rest[1].startswith("2 of 5 jobs done, 0 failed. Run the same command again")
    assert len(rest) == 2


def test_a_program_that_a_signal_ended_is_described(tmp_path: Path) -> None:
    (tmp_path / "log").touch()
    shown = shown_on(io.StringIO())
    shown.handle(started(tmp_path / "log"))
    why = "CalledProcessError in file X:\n'...' died with <Signals.SIGKILL: 9>."
    shown.handle(message(LogEvent.ERROR, why, thread=7))
    shown.handle(message(LogEvent.JOB_ERROR, jobid=1, rule_msg=None, log=[], thread=7))
    assert "killed (signal 9): out of memory?" in shown.failed[1]


def test_warnings_of_a_job_are_shown_below_its_end(tmp_path: Path) -> None:
    stream, log = io.StringIO(), tmp_path / "log"
    shown = shown_on(stream)
    shown.handle(started(log))
    log.write_text("warning: X.gguf: delete it\n7 files\n")
    shown.handle(message(LogEvent.JOB_FINISHED, job_id=1))
    shown.handle(message(LogEvent.PROGRESS, done=1, total=2))
    end, warning = stream.getvalue().splitlines()[1:]
    assert end.endswith("m: convert (0.0 s, 1/2): 7 files")
    assert warning == "         warning: X.gguf: delete it"


def test_what_an_upload_has_printed_itself_is_not_said_again(tmp_path: Path) -> None:
    stream, log = io.StringIO(), tmp_path / "log"
    shown = shown_on(stream)
    shown.handle(started(log, rule="publish"))
    log.write_text("warning: X.gguf: delete it\nOwner/Name: uploaded 7 files\n")
    shown.handle(message(LogEvent.JOB_FINISHED, job_id=1))
    shown.handle(message(LogEvent.PROGRESS, done=1, total=2))
    (end,) = stream.getvalue().splitlines()[1:]
    assert end.endswith("m: convert (0.0 s, 1/2)")


def test_a_job_that_never_ended_is_reported_unless_the_user_stopped_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shown = shown_on(io.StringIO())
    shown.handle(started(tmp_path / "log"))
    shown.failure()
    assert "m: convert\n  error  see above\n  file   F.gguf\n" in caplog.messages[-1]
    assert "1 failed" in caplog.messages[-1]
    shown.handle(message(None, "Terminating processes on user request, this might take some time."))
    shown.failure()
    assert "0 failed, interrupted" in caplog.messages[-1]
    assert "m: convert" not in caplog.messages[-1]
