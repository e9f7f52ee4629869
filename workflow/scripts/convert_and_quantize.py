"""Convert a checkpoint and quantize it on the way, with neither of them whole on the disk.

As convert.py with --free, which it runs: shards are downloaded when they are needed, and freed when
they are converted; so are the tensors of the BF16 file once they are quantized. quantize.py --plan
makes a file of each piece, without a copy.

example: convert_and_quantize.py Qwen3.5-4B --resume DIGEST --recorded records --free --out a.gguf
             --quantize '{"folder": "results/x/work/manifests/pieces/quantized/Q8", "type": "Q8_0"}'
"""

import sys

sys.path.insert(0, __file__.rpartition("/")[0])  # PYTHONSAFEPATH leaves it out

from pathlib import Path
from typing import Any

import convert
from mtpforge import cli, recorded_digests
from mtpforge.errors import ConfigError
from mtpforge.llama_cpp import programs
from mtpforge.quantize.as_converted import Quantizing, Wanted
from mtpforge.quantize.recipe import NO_HEAD, Recipe, head_recipe
from mtpforge.quantize.request import QuantizeRequest


def main() -> None:
    """Parse the command line, convert and quantize."""
    parser = convert.options(__doc__)
    parser.add_argument(
        "--quantize",
        type=cli.json_object,
        nargs="+",
        required=True,
        metavar="JSON",
        help="the files to make: folder of the piece, type, head, head_tensors, tensors, imatrix",
    )
    parser.add_argument(
        "--reuse",
        type=Path,
        metavar="FOLDER",
        help="leave out tensors of finished files whose manifests lie in FOLDER",
    )
    programs.add_folder_option(parser)
    args = parser.parse_args()
    if args.free is None:
        parser.error("--quantize needs --free")
    llama = programs.from_options(args)
    llama.find("llama-quantize")  # missing, it would be noticed after the first gigabyte
    wanted = [_wanted(entry, args.reuse) for entry in args.quantize]
    quantizing = Quantizing(wanted, llama)
    del args.quantize, args.bin, args.reuse  # they do not change what is converted
    convert.run(parser, args, quantizing.attach)
    if args.digests and quantizing.has_freed:
        recorded_digests.mark_freed(args.digests)


def _wanted(entry: dict[str, Any], reuse: Path | None) -> Wanted:
    """A file as the rules describe it. Raises ConfigError."""
    try:
        kind, head = str(entry["type"]), str(entry.get("head", ""))
        exceptions = _recipe(entry.get("head_tensors", {}))
        matrix = str(entry.get("imatrix", ""))
        request = QuantizeRequest(
            kind,
            head=head_recipe(head, exceptions) if head not in ("", NO_HEAD) else (),
            recipe=_recipe(entry.get("tensors", {})),
            imatrix=Path(matrix) if matrix else None,
        )
        return Wanted(Path(entry["folder"]), request, reuse)
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"--quantize: malformed ({error!r})") from None


def _recipe(types: dict[str, str]) -> Recipe:
    return tuple((str(pattern), str(kind)) for pattern, kind in types.items())


if __name__ == "__main__":
    cli.run(main)
