"""Compare injection with `cp` of the base, and with gguf-py's writer.

On the file system of --scratch and, for root, on XFS and Btrfs in mounted image files. The base is
a BF16 GGUF with the trunk of Qwen3.5-2B's shapes and random weights: only the sizes matter.

example: injection.py --out results/bench/injection.json
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from conversion import QWEN3_5_2B, ROOT, Cost, cost_of, typical, write_checkpoint

FILE_SYSTEMS = {"xfs": ("mkfs.xfs", "-q", "-f"), "btrfs": ("mkfs.btrfs", "-q", "-f")}

# As scripts with gguf-py inject a head.
GGUF_PY = """
import sys
from gguf import GGUFReader, GGUFWriter
base, head = GGUFReader(sys.argv[1]), GGUFReader(sys.argv[2])
writer = GGUFWriter(sys.argv[3], arch="qwen35")
for field in base.fields.values():
    if not field.name.startswith(("GGUF.", "general.architecture")):
        kind, *item = field.types
        item_type = item[-1] if item else None
        writer.add_key_value(field.name, field.contents(), kind, sub_type=item_type)
tensors = [*base.tensors, *head.tensors]
for tensor in tensors:
    data = tensor.data
    writer.add_tensor_info(
        tensor.name, data.shape, data.dtype, data.nbytes, tensor.tensor_type
    )
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_ti_data_to_file()
for tensor in tensors:
    writer.write_tensor_data(tensor.data)
writer.close()
"""


def make_parts(scratch: Path) -> tuple[Path, Path]:
    """Make the base and the head, once."""
    checkpoint = write_checkpoint(scratch / "dense-24-layers", QWEN3_5_2B)
    parts = [scratch / f"{part}.gguf" for part in ("trunk", "head")]
    for path in parts:
        if not path.exists():
            program = [sys.executable, ROOT / "workflow/scripts/convert.py", checkpoint]
            options = ["--tokenizer-pre", "qwen35", "--part", path.stem, "--out", path]
            command = list(map(str, [*program, *options]))
            subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    return parts[0], parts[1]


def measure(label: str, base: Path, head: Path, repeats: int, slow: bool) -> dict[str, Any]:
    """Measure in the folder of `base`, with base and head in the page cache if they fit."""
    out = base.with_name("out.gguf")
    program = [sys.executable, ROOT / "workflow/scripts/inject.py"]

    def fresh(*command: object) -> Cost:
        out.unlink(missing_ok=True)
        return cost_of(*command)

    subprocess.run(["cat", str(base), str(head)], stdout=subprocess.DEVNULL, check=True)
    costs = {
        "cp": typical(lambda: fresh("cp", "--reflink=never", base, out), repeats),
        "inject": typical(lambda: fresh(*program, base, "--head", head, "--out", out), repeats),
    }
    if slow:
        costs["gguf-py"] = fresh(sys.executable, "-c", GGUF_PY, base, head, out)
    out.unlink()
    sizes = {"base": base.stat().st_size, "head": head.stat().st_size}
    return {"on": label, **sizes, **{name: vars(cost) for name, cost in costs.items()}}


@contextmanager
def mounted(kind: str, scratch: Path, size: int) -> Iterator[Path | None]:
    """Mount a new file system of `size` bytes; if that is impossible, print why and yield None."""
    make, *options = FILE_SYSTEMS[kind]
    missing = [f"{name} is not installed" for name in (make, "mount") if not shutil.which(name)]
    reasons = ["only root can mount"] if os.geteuid() else missing
    if reasons:
        print(f"{kind} is not measured: {reasons[0]}", file=sys.stderr)
        yield None
        return
    image = scratch / f"{kind}.img"
    point = scratch / kind
    point.mkdir(exist_ok=True)
    with image.open("wb") as file:
        file.truncate(size)
    try:
        subprocess.run([make, *options, str(image)], check=True, stdout=subprocess.DEVNULL)
        subprocess.run(["mount", "-o", "loop", str(image), str(point)], check=True)
        try:
            yield point
        finally:
            subprocess.run(["umount", str(point)], check=True)
    finally:
        image.unlink()


def file_system(folder: Path) -> str:
    """The type of a folder's file system, such as ext4; `here` if df cannot tell."""
    command = ["df", "--output=fstype", str(folder)]
    words = subprocess.run(command, capture_output=True, text=True).stdout.split()
    return words[-1] if words else "here"


def table(results: list[dict[str, Any]]) -> str:
    """Times and ratios, as Markdown."""
    lines = [
        "| on | base GB | head GB | cp | inject | × cp | gguf-py | × faster |",
        "| --- |" + " ---: |" * 7,
    ]
    for entry in results:
        copy = entry["cp"]["wall"]
        inject = entry["inject"]["wall"]
        slow = entry["gguf-py"]["wall"] if "gguf-py" in entry else None
        cells = [
            entry["on"],
            f"{entry['base'] / 1e9:.2f}",
            f"{entry['head'] / 1e9:.2f}",
            f"{copy:.2f} s",
            f"{inject:.2f} s",
            f"{inject / copy:.2f}",
            *((f"{slow:.1f} s", f"{slow / inject:.1f}") if slow else ("", "")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Parse the command line, measure, and write and print the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "results/bench/injection.json")
    parser.add_argument(
        "--scratch",
        type=Path,
        default=ROOT / "resources/bench",
        help="folder that needs about 25 GB (default: %(default)s)",
    )
    parser.add_argument("--repeats", type=int, default=3, help="(default: %(default)s)")
    args = parser.parse_args()
    args.scratch.mkdir(parents=True, exist_ok=True)
    base, head = make_parts(args.scratch)
    results = [measure(file_system(args.scratch), base, head, args.repeats, slow=True)]
    for kind in FILE_SYSTEMS:
        with mounted(kind, args.scratch, 4 * base.stat().st_size) as point:
            if point:
                shutil.copy(base, point)
                shutil.copy(head, point)
                results.append(
                    measure(kind, point / base.name, point / head.name, args.repeats, slow=False)
                )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(
        json.dumps({"processors": os.cpu_count(), "results": results}, indent=1) + "\n"
    )
    print(table(results))


if __name__ == "__main__":
    main()
