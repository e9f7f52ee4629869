"""List the files of a checkpoint with their sha256: local ones are hashed, of fetched ones the records know it.

example: materials.py '{"path": "Qwen3.5-4B"}' Qwen3.5-4B/config.json Qwen3.5-4B/model.safetensors --out materials.json
"""

import json
from pathlib import Path

from mtpforge import cli
from mtpforge.io import atomic
from mtpforge.publish import provenance


def main() -> None:
    """Parse the command line and write the list."""
    parser = cli.parser(__doc__)
    parser.add_argument(
        "source", type=json.loads, metavar="JSON", help="where they come from, as in config.yaml"
    )
    parser.add_argument(
        "files",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="the files, or the records of fetched ones",
    )
    parser.add_argument("--out", type=Path, required=True, help="the list, as JSON")
    args = parser.parse_args()
    atomic.write_json(args.out, {"materials": provenance.materials(args.source, args.files)})


if __name__ == "__main__":
    cli.run(main)
