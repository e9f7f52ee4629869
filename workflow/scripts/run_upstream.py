"""Run convert_hf_to_gguf.py of a llama.cpp source tree, without running code of the checkpoint.

Needs a Python with torch and transformers (envs/converter.txt). A separate program, because
upstream must import its own gguf-py; `-I` keeps this folder and PYTHON* variables out.

example: python -I run_upstream.py SOURCE CHECKPOINT --outtype bf16 --outfile F.gguf
"""

import argparse
import runpy
import sys
from pathlib import Path
from typing import Any, NoReturn


def main() -> None:
    """Parse the command line, and run upstream's program with everything after SOURCE."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tokenizer-pre",
        metavar="NAME",
        help="llama.cpp's name of the pre-tokenizer, if its checksum is unknown (qwen35, ...)",
    )
    parser.add_argument("source", type=Path, help="llama.cpp's source tree")
    parser.add_argument(
        "arguments", nargs=argparse.REMAINDER, help="arguments of convert_hf_to_gguf.py"
    )
    args = parser.parse_args()
    sys.path[:0] = [str(args.source), str(args.source / "gguf-py")]
    forbid_remote_code()
    check_writes()
    if args.tokenizer_pre:
        name_pre_tokenizer(args.tokenizer_pre)
    program = args.source / "convert_hf_to_gguf.py"
    sys.argv = [program.name, *args.arguments]
    runpy.run_path(str(program), run_name="__main__")


def forbid_remote_code() -> None:
    """Make transformers refuse to load code of the checkpoint: upstream sets trust_remote_code."""
    from transformers import dynamic_module_utils  # type: ignore[import-not-found,unused-ignore]

    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise RuntimeError("the checkpoint needs to run its own code: refused")

    for name in ("get_class_from_dynamic_module", "get_class_in_module", "get_cached_module_file"):
        assert hasattr(dynamic_module_utils, name), (
            f"transformers has no {name}: find and close its new way to run code"
        )
        setattr(dynamic_module_utils, name, refuse)


def check_writes() -> None:
    """Make a tensor whose bytes cannot be written an error.

    NumPy writes arrays through a buffer of C, and ignores the error of emptying it: a small tensor
    is lost on a failing disk, the next is written behind it, and the program ends well.
    """
    import gguf
    import numpy as np
    from gguf import quants
    from gguf.lazy import LazyNumpyTensor

    class Checked(np.ndarray[Any, Any]):
        def tofile(self, file: Any, *_: Any) -> None:
            whole = np.ascontiguousarray(self).view(np.ndarray).reshape(-1)
            file.write(whole.view(np.uint8).data)

    add_tensor, quantize = gguf.GGUFWriter.add_tensor, quants.quantize

    def add(self: Any, name: str, tensor: Any, *args: Any, **kwargs: Any) -> None:
        checked = tensor.view(Checked) if isinstance(tensor, np.ndarray) else tensor
        add_tensor(self, name, checked, *args, **kwargs)

    def write(self: Any, file: Any) -> None:
        LazyNumpyTensor.to_eager(self).view(Checked).tofile(file)

    gguf.GGUFWriter.add_tensor = add  # type: ignore[method-assign]
    LazyNumpyTensor.tofile = write  # type: ignore[method-assign]
    quants.quantize = lambda *args: quantize(*args).view(Checked)


def name_pre_tokenizer(name: str) -> None:
    """Set the pre-tokenizer, because upstream's checksum does not know a changed vocabulary."""
    from conversion.base import TextModel  # type: ignore[import-not-found,unused-ignore]

    TextModel.get_vocab_base_pre = lambda self, tokenizer: name


if __name__ == "__main__":
    main()
