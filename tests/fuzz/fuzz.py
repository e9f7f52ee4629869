"""Fuzz a parser with inputs that are mutated towards new code paths (atheris, on libFuzzer).

Anything but a typed error ends the run with exit code 77, and so does an input that takes more than
ten seconds, or 512 MB; the input is kept in the scratch folder.

example: python tests/fuzz/fuzz.py gguf --seconds 60
"""

import argparse
import random
import re
import sys
import tempfile
from pathlib import Path

import atheris

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "workflow" / "scripts"))

INSTRUMENTED = [
    "mtpforge.gguf",
    "mtpforge.checkpoint.safetensors",
    "mtpforge.quantize.imatrix",
    "mtpforge.io.text",
]
with atheris.instrument_imports(include=INSTRUMENTED):
    from targets import TARGETS

LIMITS = ("-timeout=10", "-rss_limit_mb=512", "-max_len=2048")
# One mutation at a time, of all known inputs alike: most files with several are refused at once.
SEARCH = ("-mutate_depth=1", "-entropic=0")


def main() -> None:
    """Parse the command line, and fuzz until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=60, metavar="N")
    parser.add_argument("--seed", type=int, default=1, metavar="N")
    parser.add_argument("--scratch", type=Path, metavar="DIR", help="where new inputs are kept")
    args = parser.parse_args()
    scratch = args.scratch or Path(tempfile.mkdtemp(prefix=f"fuzz-{args.target}-"))
    found = scratch / "inputs"
    found.mkdir(parents=True, exist_ok=True)
    print(f"new inputs go to {found}", flush=True)
    file = scratch / "input.gguf"
    target = TARGETS[args.target]

    def run(data: bytes) -> None:
        file.write_bytes(data)
        target(file)

    options = [*LIMITS, *SEARCH, f"-max_total_time={args.seconds}", f"-seed={args.seed}"]
    options += [f"-artifact_prefix={scratch}/", str(found), str(HERE / "corpus" / args.target)]
    atheris.Setup([sys.argv[0], *options], run, custom_mutator=mutate)
    atheris.Fuzz()


def mutate(data: bytes, limit: int, seed: int) -> bytes:
    """Change a byte or two in place, or a word of JSON, or else as libFuzzer does.

    Insertions and deletions shift all that follows, and few of such files get past the counts.
    """
    chosen = random.Random(seed)
    if not data or chosen.random() < 0.3:
        return bytes(atheris.Mutate(data, limit))
    if data[8:9] == b"{" and chosen.random() < 0.7:
        return _other_word(data, chosen)
    changed = bytearray(data)
    for _ in range(chosen.randint(1, 2)):
        old = changed[place := chosen.randrange(len(changed))]
        changed[place] = chosen.choice((0, 255, old ^ 128, old + 1 & 255, chosen.randrange(256)))
    return bytes(changed)


def _other_word(data: bytes, chosen: random.Random) -> bytes:
    """Replace one word or list of a header by another, and correct the header's length."""
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length]
    words = [*re.finditer(rb'"[^"]*"|[0-9]+|\[[^]]*\]|\{\}', header)]
    if not words:
        return data
    word = chosen.choice(words)
    others = (b"null", b"true", b"0", b"-1", b"8", b"1e9", b"9" * 20, b'""', b"[]", b"[0]", b"{}")
    other = chosen.choice((*others, chosen.choice(words)[0]))
    header = header[: word.start()] + other + header[word.end() :]
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


if __name__ == "__main__":
    main()
