"""All text from users and others is read by `io/text.py`, with its limits; the rest is listed."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from conftest import ROOT

SCRIPTS = ROOT / "workflow" / "scripts"

OF_THIS_PACKAGE = "its own code, lock, cache or result: nobody else writes it"
OF_SNAKEMAKE = "Snakemake's record of a job"
OF_A_PROGRAM = "the log of a program that it runs, which `process` limits"
OF_THE_SYSTEM = "the kernel's"
CHECKED = "the text has passed the limits before it is parsed"
BINARY = "bytes in pieces, or of a length that the parser has checked"

ALLOWED = {
    "add.py: json.loads": OF_THIS_PACKAGE,
    "mtpforge/checkpoint/safetensors.py: json.loads": CHECKED,
    "mtpforge/convert/tokenizer.py: json.loads": CHECKED,
    "mtpforge/convert/tokenizer.py: state.read_text": OF_THE_SYSTEM,
    "mtpforge/convert/tokenizer.py: usage.read_text": OF_THE_SYSTEM,
    "mtpforge/forecast/calibration.py: cache.read_text": OF_THIS_PACKAGE,
    "mtpforge/forecast/calibration.py: json.loads": OF_THIS_PACKAGE,
    "mtpforge/forecast/program_speed.py: log.read_text": OF_A_PROGRAM,
    "mtpforge/forecast/steps.py: Path(...).read_text": OF_SNAKEMAKE,
    "mtpforge/forecast/steps.py: json.loads": OF_SNAKEMAKE,
    "mtpforge/gguf/norm_form.py: np.fromfile": BINARY,
    "mtpforge/gguf/writer.py: path.open": BINARY,
    "mtpforge/hub/download.py: partial.open": BINARY,
    "mtpforge/hub/download.py: path.open": BINARY,
    "mtpforge/hub/head.py: path.open": BINARY,
    "mtpforge/hub/head.py: sums.read_text": OF_THIS_PACKAGE,
    "mtpforge/hub/listing.py: json.loads": CHECKED,
    "mtpforge/io/holes.py: os.open": BINARY,
    "mtpforge/io/atomic.py: os.open": BINARY,
    "mtpforge/io/journal.py: json.loads": OF_THIS_PACKAGE,
    "mtpforge/io/journal.py: path.read_text": OF_THIS_PACKAGE,
    "mtpforge/io/leftovers.py: os.open": BINARY,
    "mtpforge/io/mapped.py: np.memmap": BINARY,
    "mtpforge/io/ranges.py: os.open": BINARY,
    "mtpforge/io/ranges.py: path.open": BINARY,
    "mtpforge/io/ranges.py: piece.path.open": BINARY,
    "mtpforge/io/storage.py: _MOUNTS.read_text": OF_THE_SYSTEM,
    "mtpforge/io/temporary.py: os.open": BINARY,
    "mtpforge/llama_cpp/compilation.py: log.read_text": OF_A_PROGRAM,
    "mtpforge/llama_cpp/compilation.py: tarfile.open": "an archive whose sha256 is pinned",
    "mtpforge/llama_cpp/memory.py: place.read_text": OF_THE_SYSTEM,
    "mtpforge/llama_cpp/programs.py: log.read_text": OF_A_PROGRAM,
    "mtpforge/llama_cpp/server.py: json.loads": "an answer, which `server` limits",
    "mtpforge/llama_cpp/server.py: (task / 'schedstat').read_text": OF_THE_SYSTEM,
    "mtpforge/llama_cpp/server.py: log.open": OF_A_PROGRAM,
    "mtpforge/llama_cpp/server.py: status.read_text": OF_THE_SYSTEM,
    "mtpforge/llama_cpp/environment.py: stamp.read_text": OF_THIS_PACKAGE,
    "mtpforge/measure/speed.py: info.read_text": OF_THE_SYSTEM,
    "mtpforge/measure/speed.py: log.read_text": OF_A_PROGRAM,
    "mtpforge/processors.py: OWN_CGROUP.read_text": OF_THE_SYSTEM,
    "mtpforge/processors.py: path.read_text": OF_THE_SYSTEM,
    "mtpforge/processors.py: path.with_name('cpu.cfs_period_us').read_text": OF_THE_SYSTEM,
    "mtpforge/publish/bucket.py: path.open": BINARY,
    "mtpforge/publish/card.py: yaml.safe_load": OF_THIS_PACKAGE,
    "mtpforge/publish/upload.py: path.read_bytes": OF_THIS_PACKAGE,
    "mtpforge/report/ending.py: summary.read_text": OF_THIS_PACKAGE,
    "mtpforge/report/page.py: path.read_bytes": OF_THIS_PACKAGE,
    "mtpforge/s3/download.py: partial.open": BINARY,
    "mtpforge/quantize/imatrix.py: np.fromfile": BINARY,
    "mtpforge/hub/sparse.py: path.open": BINARY,
    "mtpforge/quantize/whole_piece.py: path.open": BINARY,
    "mtpforge/rules/code.py: (SCRIPTS.parents[1] / path).read_bytes": OF_THIS_PACKAGE,
    "mtpforge/rules/code.py: (SCRIPTS.parents[1] / path).read_text": OF_THIS_PACKAGE,
    "mtpforge/rules/code.py: path.read_text": OF_THIS_PACKAGE,
    "mtpforge/rules/folder_lock.py: (folder / RUN_LOCK).open": OF_THIS_PACKAGE,
    "mtpforge/rules/folder_lock.py: path.read_text": OF_THIS_PACKAGE,
    "mtpforge/rules/joblog.py: self.log.open": OF_A_PROGRAM,
    "mtpforge/rules/resources.py: (folder / 'llama-server').open": BINARY,
    "mtpforge/run_owner.py: (folder / RUN_LOCK).read_text": OF_THIS_PACKAGE,
    "mtpforge/run_owner.py: Path(...).read_bytes": OF_THE_SYSTEM,
    "mtpforge/run_owner.py: _BOOT.read_text": OF_THE_SYSTEM,
    "mtpforge/run_owner.py: json.loads": OF_THIS_PACKAGE,
    "mtpforge/verify/tensors.py: os.open": BINARY,
}
"""Module and function -> why it need not go through `io/text.py`."""


def test_files_are_read_with_limits() -> None:
    found = {f"{path.relative_to(SCRIPTS)}: {call}" for path in sources() for call in calls(path)}
    assert found == ALLOWED.keys()


def sources() -> list[Path]:
    return [path for path in SCRIPTS.rglob("*.py") if path != SCRIPTS / "mtpforge/io/text.py"]


def calls(path: Path) -> Iterator[str]:
    """The functions that read or parse a file, as they are written."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and reads(node):
            yield re.sub(r"Path\(f?['\"].*?\)\.", "Path(...).", ast.unparse(node.func))


def reads(call: ast.Call) -> bool:
    match call.func:
        case ast.Attribute(value=ast.Name(id="text"), attr="read_text" | "read_bytes"):
            return False  # of io/text.py
        case ast.Attribute(value=ast.Name(id="json" | "yaml" | "tomllib"), attr=name):
            return "load" in name
        case ast.Attribute(attr="read_text" | "read_bytes" | "fromfile" | "memmap"):
            return True
        case ast.Attribute(attr="open") | ast.Name(id="open"):
            return not writes(call)
    return False


def writes(call: ast.Call) -> bool:
    """Whether a file is opened for writing alone."""
    arguments = " ".join(ast.unparse(argument) for argument in call.args)
    modes = ("'w'", "'wb'", "'a'", "'ab'", "'x'", "O_WRONLY", "O_CREAT")
    return any(mode in arguments for mode in modes)


def test_the_search_finds_each_way_to_read(tmp_path: Path) -> None:
    source = tmp_path / "module.py"
    source.write_text(
        "text.read_text(p), read_text(p), p.open('w'), os.open(p, os.O_WRONLY), json.dumps(x)\n"
        "p.read_text(), p.read_bytes(), open(p), p.open('r+b'), os.open(p, os.O_RDONLY),"
        "json.load(f), json.loads(s), yaml.safe_load(s), np.fromfile(p), path.parent.open()\n"
    )
    assert [*calls(source)] == [
        "p.read_text", "p.read_bytes", "open", "p.open", "os.open", "json.load", "json.loads",
        "yaml.safe_load", "np.fromfile", "path.parent.open",
    ]  # fmt: skip
