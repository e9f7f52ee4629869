"""Print a config.yaml entry for a Hub repository, pinned to its current commit.

The entry names the converter that the checkpoint needs. A checkpoint that cannot be converted is
refused, before any weights are downloaded.

example: add.py Qwen/Qwen3.5-4B
"""

import math

from mtpforge import cli, errors
from mtpforge.checkpoint.safetensors import CheckpointTensor, Outline
from mtpforge.convert import converters
from mtpforge.hub import download
from mtpforge.hub.listing import REPOSITORY
from mtpforge.hub.resolve import current_name, list_commit, model_info

VARIANTS = {"BF16": 16, "Q4_K_M": 5}
"""The proposed variants, and about how many bits a weight takes in each."""

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
    if not REPOSITORY.fullmatch(repo):
        raise errors.DownloadError(
            f"{repo!r}: write the repository as OWNER/NAME "
            "(snakemake --cores 1 add --config repo=OWNER/NAME)"
        )
    info = model_info(repo)
    repo = current_name(info, repo)
    listing = list_commit(repo, str(info.sha))
    if not listing.tensors:
        raise errors.DownloadError(
            f"{repo}: has no model*.safetensors: only safetensors checkpoints can be converted"
        )
    outline = download.outline(listing)
    try:
        converter = converters.choose(outline, "all")
        lost = ""
    except errors.CheckpointError as error:
        converter = _without_head(outline, converters.explain(error, outline, listing.label))
        lost = ", without a head (`head_from` takes the original's)"
    size = sum(listing.files[name].bytes for name in listing.checkpoint_files())
    head = sum(tensor.size for tensor in converters.head_tensors(outline, converter))
    about = lost or f", {head / 1e9:.2f} GB of it the head"
    return "\n".join(
        [
            f"  # {size / 1e9:.1f} GB to download{about}. Add its name to `build` to build it.",
            f"  {repo.partition('/')[2].lower()}:",
            f"    source: {{repo: {repo}, revision: {listing.revision}}}",
            *([] if converter == "mtpforge" else [f"    converter: {converter}"]),
            "    variants:",
            *(f"      {name}: {_settings(outline, lost, bits)}" for name, bits in VARIANTS.items()),
        ]
    )


def _without_head(outline: Outline, error: errors.CheckpointError) -> str:
    """Return a converter for a checkpoint that has lost its head; raise the error for others."""
    try:
        converter = converters.choose(outline, "trunk")
        if converters.head_tensors(outline, converter):
            raise error
        return converter
    except errors.CheckpointError:
        raise error from None


def _settings(outline: Outline, lost: str, bits: int) -> str:
    """Return the settings of a variant: no head if it is lost, shards if the file is too large."""
    size = sum(_bf16_size(tensor) for tensor in outline.tensors.values()) * bits / 16
    limit = int(SPLIT.removesuffix("G")) * 1e9
    settings = ["head: none"] * bool(lost) + [f"split: {SPLIT}"] * (size > limit)
    return f"{{{', '.join(settings)}}}"


def _bf16_size(tensor: CheckpointTensor) -> int:
    """Return the bytes of a tensor in a BF16 file; quantized weights stay packed."""
    packed = tensor.dtype not in converters.UNPACKED
    return tensor.size if packed else 2 * math.prod(tensor.shape)


if __name__ == "__main__":
    cli.run(main)
