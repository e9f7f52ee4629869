"""Run the convert_hf_to_gguf.py of a llama.cpp source tree in this process, and never a line of code of the checkpoint.

For a Python that has torch and transformers (envs/converter.txt), in a process of its own because upstream must find its own
gguf-py. `-I` keeps this folder and PYTHON* variables out of its imports.

example: python -I run_upstream.py --tokenizer-pre qwen35 SOURCE CHECKPOINT --outtype bf16 --outfile F.gguf
"""

import argparse
import runpy
import sys
from pathlib import Path
from typing import Any, NoReturn


def main() -> None:
    """Parse the command line and become upstream's program; all that follows SOURCE is its own."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tokenizer-pre",
        metavar="NAME",
        help="pre-tokenizer, where its checksum is unknown (qwen35, ...)",
    )
    parser.add_argument("source", type=Path, help="llama.cpp's source tree")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of convert_hf_to_gguf.py")
    args = parser.parse_args()
    sys.path[:0] = [str(args.source), str(args.source / "gguf-py")]
    forbid_remote_code()
    if args.tokenizer_pre:
        name_pre_tokenizer(args.tokenizer_pre)
    program = args.source / "convert_hf_to_gguf.py"
    sys.argv = [program.name, *args.arguments]
    runpy.run_path(str(program), run_name="__main__")


def forbid_remote_code() -> None:
    """Upstream passes `trust_remote_code=True`: make what transformers would then do an error, before anything imports it."""
    from transformers import dynamic_module_utils  # type: ignore[import-not-found,unused-ignore]

    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise RuntimeError("the checkpoint wants to run code of its own: refused")

    for name in ("get_class_from_dynamic_module", "get_class_in_module", "get_cached_module_file"):
        assert hasattr(dynamic_module_utils, name), (
            f"transformers has no {name}: another way to run code must be closed"
        )
        setattr(dynamic_module_utils, name, refuse)


def name_pre_tokenizer(name: str) -> None:
    """Upstream tells pre-tokenizers apart by a checksum, which does not know a changed vocabulary."""
    from conversion.base import TextModel  # type: ignore[import-not-found,unused-ignore]

    TextModel.get_vocab_base_pre = lambda self, tokenizer: name


if __name__ == "__main__":
    main()
