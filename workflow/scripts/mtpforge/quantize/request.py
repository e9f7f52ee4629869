"""The request for a quantization: the type of the file, and exceptions by recipe."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from mtpforge.quantize.recipe import Recipe, head_recipe, read_recipe

TYPE_HELP = "type of the file: Q4_K_M, IQ4_XS, ... (see llama-quantize --help)"


@dataclass(frozen=True)
class QuantizeRequest:
    """The file's type, the recipes of its head and of other tensors, and the importance matrix.

    An empty `head` stands for Q8_0, or for the type of an unquantized file.
    """

    file_type: str
    head: Recipe = ()
    recipe: Recipe = ()
    imatrix: Path | None = None


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a request, except --type."""
    parser.add_argument(
        "--head",
        metavar="T",
        help="tensor type of the head (default: Q8_0, or the type of an unquantized file)",
    )
    parser.add_argument(
        "--head-tensors",
        type=Path,
        metavar="FILE",
        help="exceptions to --head, as YAML of pattern: type; the first match decides",
    )
    parser.add_argument(
        "--tensors",
        type=Path,
        metavar="FILE",
        help="recipe of the other tensors, as YAML of pattern: type; the first match decides",
    )
    parser.add_argument(
        "--imatrix",
        type=Path,
        metavar="FILE",
        help="importance matrix, for example from imatrix.py; its name is stored in the output",
    )


def from_options(args: argparse.Namespace) -> QuantizeRequest:
    """The request in --type and the options of `add_options`. Raises ConfigError."""
    exceptions = read_recipe(args.head_tensors)
    return QuantizeRequest(
        file_type=args.type,
        head=head_recipe(args.head, exceptions) if args.head else (),
        recipe=read_recipe(args.tensors),
        imatrix=args.imatrix,
    )
