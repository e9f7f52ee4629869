"""Find the mixture of types with the least expected loss for a size.

Writes a recipe with the exact name of each tensor, for `tensors:` or quantize.py --tensors. The
size counts the whole file: head, header and tensors that stay as they are.

example: allocate.py BF16.gguf --type Q4_K_M --size Q4_K_M --errors Q4_K.json Q6_K.json Q3_K.json
         --sensitivities class.json --out found.yaml
"""

import sys

sys.path.insert(0, __file__.rpartition("/")[0])  # PYTHONSAFEPATH leaves it out

import argparse
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from mtpforge import cli, recorded_digests, table
from mtpforge.errors import ConfigError
from mtpforge.gguf import quant_types, split
from mtpforge.gguf.file_names import first_file
from mtpforge.io import atomic
from mtpforge.llama_cpp import programs
from mtpforge.llama_cpp.programs import LlamaCpp
from mtpforge.quantize import request
from mtpforge.quantize.llama_quantize import checked_rows
from mtpforge.quantize.recipe import as_text
from mtpforge.search import found, groups, probes, sensitivity
from mtpforge.search.errors import Errors, check_rows
from mtpforge.search.settings import PROBE


def main() -> None:
    """Parse the command line and allocate."""
    parser = cli.parser(__doc__)
    add_options(parser)
    args = parser.parse_args()
    args.source = first_file(args.source)
    atomic.refuse_overwriting(args.out, args.source, args.imatrix, *args.errors)
    recorded_digests.check_whole(args.imatrix, args.imatrix_recorded)
    llama = programs.from_options(args)
    asked = request.from_options(args)
    source = split.joined(recorded_digests.shards(args.source, args.digests))
    rows = checked_rows(source, asked.imatrix)
    sizes = found.Sizes.measure(source, asked, llama)
    most = bytes_wanted(args, sizes, asked, llama)
    errors = list(map(Errors.read, args.errors))
    sensitive = sensitivities(args, groups.units(source))
    start = found.stock_types(source, asked, llama)
    types = found.choose(sizes, start, errors, sensitivities=sensitive, most=most)
    check_rows(source, types, asked.imatrix, rows)
    size = sizes.of(types)
    if args.about:
        found.Found(
            asked=most,
            bytes=size,
            sensitivity=method(args),
            mixture=found.mixture(source, types),
            stock=compared_with(args, sizes, asked, llama),
            head=found.head_cost(sizes, types, errors, sensitivities=sensitive, most=most),
        ).write(args.about)
    atomic.write_text(args.out, f"{as_text(found.recipe(source, types))}\n")
    print(f"{table.size(size)}, {size / most:.2%} of the bytes asked for")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add all options."""
    parser.add_argument("source", type=Path, metavar="BF16.gguf", help="the unquantized GGUF")
    parser.add_argument("--type", required=True, metavar="T", help=request.TYPE_HELP)
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument(
        "--size", metavar="S", help="the file's: 11G, 900M, or a type of the same size"
    )
    size.add_argument(
        "--bits", type=bits_per_weight, metavar="B", help="the same in bits per weight"
    )
    parser.add_argument(
        "--errors", type=Path, nargs="+", required=True, metavar="FILE",
        help="of each candidate, from quantization_errors.py",
    )  # fmt: skip
    parser.add_argument(
        "--sensitivities", type=Path, metavar="FILE",
        help="from sensitivity.py (default: the usual ones of each class of tensors)",
    )  # fmt: skip
    parser.add_argument(
        "--probe-errors", type=Path, metavar="FILE",
        help=f"errors of {PROBE}, which --sensitivities needs",
    )  # fmt: skip
    request.add_options(parser)
    recorded_digests.add_option(parser, "--digests", "the GGUF")
    recorded_digests.add_option(parser, "--imatrix-recorded", "--imatrix")
    programs.add_options(parser)
    parser.add_argument("--out", type=Path, required=True, help="the recipe to write, as YAML")
    parser.add_argument(
        "--about",
        type=Path,
        metavar="FILE",
        help="write size and mixture, and what to compare with",
    )


def bits_per_weight(text: str) -> float:
    """Parse --bits."""
    with suppress(ValueError):
        if 1 <= (bits := float(text)) <= 16:
            return bits
    raise argparse.ArgumentTypeError("must be a number from 1 to 16, such as 3.5")


def bytes_wanted(
    args: argparse.Namespace, sizes: found.Sizes, asked: request.QuantizeRequest, llama: LlamaCpp
) -> int:
    """The bytes that the file may have. Raises ConfigError."""
    if args.bits:
        weights = sum(info.elements for info in sizes.source.tensors.values())
        return int(args.bits * weights / 8)
    if args.size in quant_types.FILE_TYPES:
        return sizes.of(found.stock_types(sizes.source, replace(asked, file_type=args.size), llama))
    return split.parse_size(args.size)


def compared_with(
    args: argparse.Namespace, sizes: found.Sizes, asked: request.QuantizeRequest, llama: LlamaCpp
) -> str | None:
    """The file type that the result is to be compared with: that of --size, or the largest."""
    if args.size in quant_types.FILE_TYPES:
        return str(args.size)
    most = bytes_wanted(args, sizes, asked, llama)
    return found.largest_stock(sizes, asked, most=most, llama=llama)


def method(args: argparse.Namespace) -> str:
    """How the sensitivities were found."""
    return probes.Sensitivities.read(args.sensitivities).by if args.sensitivities else "prior"


def sensitivities(args: argparse.Namespace, units: groups.Groups) -> dict[str, float]:
    """The sensitivity of each unit. Raises ConfigError."""
    if not args.sensitivities:
        return sensitivity.by_prior(units)
    if not args.probe_errors:
        raise ConfigError("--sensitivities needs --probe-errors")
    measured = probes.Sensitivities.read(args.sensitivities)
    errors = {name: each.error for name, each in Errors.read(args.probe_errors).tensors.items()}
    find = sensitivity.by_tensor if measured.by == "tensor" else sensitivity.by_class_and_layer
    return find(units, errors, measured.kl_divergence)


if __name__ == "__main__":
    cli.run(main)
