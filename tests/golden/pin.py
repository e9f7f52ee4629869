"""Pin another llama.cpp: the source archive of a version of the package in envs/llama.cpp.txt.

example: pin.py 11434.0.0
"""

import hashlib
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
REQUIREMENT = ROOT / "envs" / "llama.cpp.txt"
CONSTANT = ROOT / "workflow" / "scripts" / "mtpforge" / "llama_cpp" / "runtimes.py"


def main() -> None:
    """Download the archive with pip, and write its version and sha256, and llama.cpp's tag."""
    if len(sys.argv) != 2 or not re.fullmatch(r"\d+(\.\d+)+", sys.argv[1]):
        sys.exit("usage: make upgrade-toolchain VERSION=11434.0.0")
    text = REQUIREMENT.read_text()
    pinned = re.search(r"^([\w.-]+)==(\S+) --hash=sha256:(\w+)$", text, re.MULTILINE)
    assert pinned, f"{REQUIREMENT} has no pin"
    package, before, old = pinned.groups()
    tags = [f"b{version.partition('.')[0]}" for version in (before, sys.argv[1])]
    sha256 = digest(f"{package}=={sys.argv[1]}")
    text = text.replace(f"=={before}", f"=={sys.argv[1]}").replace(old, sha256)
    REQUIREMENT.write_text(re.sub(rf"\b{tags[0]}\b", tags[1], text))  # a sha256 may contain a tag
    CONSTANT.write_text(
        CONSTANT.read_text().replace(f'PINNED = "{tags[0]}"', f'PINNED = "{tags[1]}"')
    )
    print(f"llama.cpp {tags[0]} -> {tags[1]}: {package} {sys.argv[1]}, sha256 {sha256}")


def digest(requirement: str) -> str:
    """The sha256 of a package's source archive."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "download"]
        command += ["--no-deps", "--no-binary=:all:", "--no-build-isolation", "-d", folder]
        if subprocess.run([*command, requirement]).returncode:
            sys.exit(f"error: pip cannot download {requirement}")
        (archive,) = Path(folder).glob("*.tar.gz")
        return hashlib.sha256(archive.read_bytes()).hexdigest()


if __name__ == "__main__":
    main()
