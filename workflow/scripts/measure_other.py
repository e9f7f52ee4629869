"""Measure a quantization that somebody else made of a model: KL divergence from the BF16 file.

A file of another model, or one that llama.cpp cannot load, gets no figures, and the result says
why.

example: measure_other.py downloads/Qwen3.5-4B-Q4_K_M.gguf --like Qwen3.5-4B-BF16.gguf
         --reference-logits reference.logits --out other.json
"""

import sys

sys.path.insert(0, __file__.rpartition("/")[0])  # PYTHONSAFEPATH leaves it out

from dataclasses import replace
from pathlib import Path

from mtpforge import cli, recorded_digests
from mtpforge.gguf.file_names import first_file
from mtpforge.io import atomic
from mtpforge.llama_cpp import programs
from mtpforge.measure import others
from mtpforge.measure.measurement import Other


def main() -> None:
    """Parse the command line, measure, and write the result."""
    parser = cli.parser(__doc__)
    add = parser.add_argument
    add("file", type=Path, metavar="F.gguf", help="the GGUF; if split, its first file")
    add("--like", type=Path, required=True, metavar="BF16.gguf", help="the unquantized GGUF")
    add(
        "--reference-logits", type=Path, required=True, metavar="FILE",
        help="its logits, of reference_logits.py",
    )  # fmt: skip
    recorded_digests.add_option(parser, "--recorded", "the GGUF")
    recorded_digests.add_option(parser, "--logits-recorded", "--reference-logits")
    add("--repo", metavar="OWNER/NAME", help="the repository of the Hub that it is from")
    add("--revision", metavar="COMMIT", help="the commit there")
    add(
        "--free", type=Path, nargs="*", default=[], metavar="FILE",
        help="delete these files once the result is written: the download and its records",
    )  # fmt: skip
    programs.add_options(parser)
    add("--out", type=Path, required=True, help="the result, a JSON file")
    args = parser.parse_args()
    like = first_file(args.like)
    atomic.refuse_overwriting(args.out, args.file, like, args.reference_logits)
    recorded_digests.check_whole(args.reference_logits, args.logits_recorded)
    llama = programs.from_options(args)
    found = others.measure(
        args.file, like, args.reference_logits, llama=llama, recorded=args.recorded
    )
    if args.repo:
        found = replace(found, name=f"{args.repo}/{found.name}", revision=args.revision)
    found.write(args.out)
    for path in args.free:
        path.unlink(missing_ok=True)
    print(said(found))


def said(found: Other) -> str:
    """The result in a line."""
    if found.kl_divergence is None:
        return f"warning: {found.name}: not compared: {found.problem}"
    return f"{found.name}: KL divergence {found.kl_divergence.mean:.5f}"


if __name__ == "__main__":
    cli.run(main)
