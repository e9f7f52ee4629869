"""Print a config.yaml entry for a Hub repository, pinned to its current commit.

The entry names the converter that the checkpoint needs. A checkpoint that cannot be converted is
refused, before any weights are downloaded.

example: add.py Qwen/Qwen3.5-4B
"""

import sys

sys.path.insert(0, __file__.rpartition("/")[0])  # PYTHONSAFEPATH leaves it out

import math
import re

from mtpforge import cli, errors
from mtpforge.checkpoint import nvfp4
from mtpforge.checkpoint.checkpoint import Outline
from mtpforge.checkpoint.model_files import head_names
from mtpforge.checkpoint.safetensors import CheckpointTensor
from mtpforge.convert import convertible
from mtpforge.hub import download
from mtpforge.hub.listing import REPOSITORY, Listing
from mtpforge.hub.resolve import current_name, list_commit, model_info

VARIANTS = {"BF16": 16, "Q4_K_M": 5}
"""The proposed variants, and about how many bits a weight takes in each."""

PACKED = {"NVFP4": 16}
"""The same for a packed checkpoint, which keeps its types: quantized again it would be worse."""

_HEAD = re.compile(r"(?i)mtp|nextn")

SPLIT = "48G"
"""The Hub refuses files above 50 GB."""


def main() -> None:
    """Parse the command line and print."""
    parser = cli.parser(__doc__)
    parser.add_argument("repo", help="repository, as OWNER/NAME")
    args = parser.parse_args()
    print(entry(args.repo))


def entry(repo: str) -> str:
    """Return the entry, with the converter and head of the checkpoint.

    Raises DownloadError, CheckpointError.
    """
    listing = _list(repo)
    outline = download.outline(listing)
    converter, part = _choose(outline, listing.label)
    packed = converter == "llama.cpp" and nvfp4.is_nvfp4(outline.config)
    variants = (PACKED if packed else VARIANTS).items()
    return "\n".join(
        [
            f"  # {_about(listing, outline, converter)}. Add its name to `build` to build it.",
            f"  {listing.repo.partition('/')[2].lower()}:",
            f"    source: {{repo: {listing.repo}, revision: {listing.revision}}}",
            *([] if converter == "mtpforge" else [f"    converter: {converter}"]),
            "    variants:",
            *(f"      {name}: {_settings(outline, part, bits)}" for name, bits in variants),
        ]
    )


def _list(repo: str) -> Listing:
    """List the current commit of a repository, by its current name."""
    if not REPOSITORY.fullmatch(repo):
        raise errors.DownloadError(
            f"{repo!r}: write the repository as OWNER/NAME "
            "(snakemake --cores 1 add --config repo=OWNER/NAME)"
        )
    info = model_info(repo)
    listing = list_commit(current_name(info, repo), str(info.sha))
    if not listing.tensors:
        raise errors.DownloadError(
            f"{repo}: has no model*.safetensors: only safetensors checkpoints can be converted"
        )
    return listing


def _choose(outline: Outline, label: str) -> tuple[str, str]:
    """Return a converter, and the part to make: the trunk if there is no head, else all."""
    try:
        return convertible.choose(outline, "all"), "all"
    except errors.CheckpointError as error:
        refused = convertible.explain(error, outline, label)
    try:
        converter = convertible.choose(outline, "trunk")
    except errors.CheckpointError:
        raise refused from None
    if convertible.head_tensors(outline, converter):
        raise refused
    return converter, "trunk"


def _about(listing: Listing, outline: Outline, converter: str) -> str:
    """Return how much there is to download, and how much of that is the head."""
    size = sum(listing.files[name].bytes for name in listing.checkpoint_files())
    head = sum(tensor.size for tensor in convertible.head_tensors(outline, converter))
    about = f"{head / 1e9:.2f} GB of it the head{convertible.undrafted(outline)}"
    if not head:
        about = _headless(listing, outline, converter)
    return f"{size / 1e9:.1f} GB to download, {about}"


def _headless(listing: Listing, outline: Outline, converter: str) -> str:
    """Return that there is no head, and where one may be."""
    about = "without a head"
    if head_names(listing.lost):
        about += ", which its stale index lists"
    if converter == "mtpforge":
        about += " (`head_from` takes the original's)"
    elif convertible.has_drafter(outline):
        about += " (its drafter is another checkpoint: `head_from` with `sidecar`)"
    used = {tensor.shard for tensor in listing.tensors.values()}
    for name in listing.files:
        if name.endswith(".safetensors") and _HEAD.search(name) and name not in used:
            use = "has no tensor named as a head's"
            if "/" in name:
                use = (
                    "may be it: in a local folder (`source: {path: FOLDER}`), copy it beside the "
                    "other shards as mtp.safetensors"
                )
            return f"{about}; {name} {use}"
    return about


def _settings(outline: Outline, part: str, bits: int) -> str:
    """Return the settings of a variant: no head if it is lost, shards if the file is too large."""
    size = sum(_bf16_size(tensor) for tensor in outline.tensors.values()) * bits / 16
    limit = int(SPLIT.removesuffix("G")) * 1e9
    settings = ["head: none"] * (part == "trunk") + [f"split: {SPLIT}"] * (size > limit)
    return f"{{{', '.join(settings)}}}"


def _bf16_size(tensor: CheckpointTensor) -> int:
    """Return the bytes of a tensor in a BF16 file; quantized weights stay packed."""
    packed = tensor.dtype not in convertible.UNPACKED
    return tensor.size if packed else 2 * math.prod(tensor.shape)


if __name__ == "__main__":
    cli.run(main)
