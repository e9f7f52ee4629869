"""Put texts through a model's chat template, for an importance matrix from what a chat model sees.

Paragraphs become by turns what the user says and what the model answers; each line of a *.jsonl is
a conversation with `messages`. llama-server applies the template.

example: conversations.py Qwen3.5-4B-BF16.gguf --text calibration.txt --out chats.txt
"""

import sys

sys.path.insert(0, __file__.rpartition("/")[0])  # PYTHONSAFEPATH leaves it out

from pathlib import Path

from mtpforge import cli, recorded_digests, table
from mtpforge.errors import ConfigError
from mtpforge.gguf import split
from mtpforge.gguf.file_names import first_file
from mtpforge.io import atomic
from mtpforge.io.text import text_files
from mtpforge.llama_cpp import memory, programs
from mtpforge.quantize import conversations


def main() -> None:
    """Parse the command line and write the text."""
    parser = cli.parser(__doc__)
    parser.add_argument("model", type=Path, metavar="IN.gguf", help="a GGUF with a chat template")
    parser.add_argument(
        "--text", type=Path, required=True, help="a text, or a folder of *.txt and *.jsonl"
    )
    parser.add_argument("--out", type=Path, required=True, help="the text to write")
    recorded_digests.add_option(parser, "--text-recorded", "--text")
    programs.add_options(parser)
    args = parser.parse_args()
    model = first_file(args.model)
    files = text_files(args.text)
    atomic.refuse_overwriting(args.out, model, *files)
    for path in files:
        recorded_digests.check_whole(path, args.text_recorded)
    opened, llama = split.read(model), programs.from_options(args)
    if reason := memory.too_large([model], llama):
        raise ConfigError(f"{model}: {reason}, so llama-server cannot apply its chat template")
    atomic.write_text(args.out, conversations.rendered(opened, files, llama))
    print(table.size_of(args.out))


if __name__ == "__main__":
    cli.run(main)
