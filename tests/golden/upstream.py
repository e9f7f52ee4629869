"""Run the convert_hf_to_gguf.py of a llama.cpp source tree, telling it the pre-tokenizer and nothing else.

A process of its own, because upstream must find its own gguf-py and not the environment's.

example: upstream.py SOURCE CHECKPOINT --outtype bf16 --outfile F.gguf
"""

import runpy
import sys
from pathlib import Path


def main() -> None:
    """Run upstream's program in this process."""
    source = Path(sys.argv[1])
    sys.path[:0] = [str(source), str(source / "gguf-py")]
    from conversion.base import TextModel

    TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen35"  # no checksum knows an embedded vocabulary
    sys.argv = ["convert_hf_to_gguf.py", *sys.argv[2:]]
    runpy.run_path(str(source / "convert_hf_to_gguf.py"), run_name="__main__")


if __name__ == "__main__":
    main()
