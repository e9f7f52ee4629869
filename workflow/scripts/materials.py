"""List the files of a checkpoint with their sha256.

The digests of downloaded files come from their records, and so do those of local ones with
--recorded; without it, local files are hashed.

example: materials.py '{"path": "Qwen3.5-4B"}' --out materials.json \\
             Qwen3.5-4B/config.json Qwen3.5-4B/model.safetensors
"""

import sys

sys.path.insert(0, __file__.rpartition("/")[0])  # PYTHONSAFEPATH leaves it out

from pathlib import Path

from mtpforge import cli
from mtpforge.io import atomic
from mtpforge.publish import provenance


def main() -> None:
    """Parse the command line and write the list."""
    parser = cli.parser(__doc__)
    parser.add_argument(
        "source",
        type=cli.json_object,
        metavar="JSON",
        help="source of the files, as in config.yaml",
    )
    parser.add_argument(
        "files", type=Path, nargs="+", metavar="FILE", help="local files, or records of fetch.py"
    )
    parser.add_argument(
        "--recorded", type=Path, metavar="FILE",
        help="list of local_files.py on the local files: only those with other times are hashed",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="list, as JSON")
    args = parser.parse_args()
    materials = provenance.materials(args.source, args.files, args.recorded)
    atomic.write_json(args.out, {"materials": materials})
    print(f"{len(materials)} files")


if __name__ == "__main__":
    cli.run(main)
