"""Compute an importance matrix of a model from a text, with llama-imatrix.

The texts of a folder are joined in the order of their names.

example: imatrix.py Qwen3.5-4B-BF16.gguf --text calibration.txt --out imatrix.gguf
"""

import sys

sys.path.insert(0, __file__.rpartition("/")[0])  # PYTHONSAFEPATH leaves it out

from pathlib import Path

from mtpforge import cli, recorded_digests, table
from mtpforge.gguf.file_names import first_file
from mtpforge.io import atomic
from mtpforge.io.text import text_files
from mtpforge.llama_cpp import programs
from mtpforge.quantize import imatrix


def main() -> None:
    """Parse the command line and compute."""
    parser = cli.parser(__doc__)
    parser.add_argument(
        "model", type=Path, metavar="IN.gguf", help="a BF16 GGUF, with or without a head"
    )
    parser.add_argument(
        "--text", type=_text, required=True,
        help="plain text similar to what the model will see, a folder of *.txt, or `default`: an "
        "embedded text",
    )  # fmt: skip
    parser.add_argument(
        "--special", action="store_true",
        help="the text has the model's special tokens, as conversations.py writes it",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, required=True, help="the importance matrix to write, a GGUF"
    )
    recorded_digests.add_option(parser, "--recorded", "the GGUF")
    recorded_digests.add_option(parser, "--text-recorded", "--text")
    recorded_digests.add_digest_option(parser)
    programs.add_options(parser, log=True)
    args = parser.parse_args()
    args.model = first_file(args.model)
    files = text_files(args.text)
    atomic.refuse_overwriting(args.out, args.model, *files)
    for path in files:
        recorded_digests.check_whole(path, args.text_recorded)
    imatrix.compute(
        args.model,
        args.text,
        args.out,
        llama=programs.from_options(args),
        recorded_at=args.recorded,
        special=args.special,
    )
    recorded_digests.write_digest(args.digest, args.out)
    print(table.size_of(args.out))


def _text(given: str) -> Path:
    """As in config.yaml, whose modules are not imported: a change to them would run this again."""
    return cli.installed("workflow/texts/calibration.txt") if given == "default" else Path(given)


if __name__ == "__main__":
    cli.run(main)
