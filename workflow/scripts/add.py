"""Print an entry for config.yaml that builds a Hub repository, pinned to the commit that it has now.

example: add.py Qwen/Qwen3.5-4B
"""

import argparse

from mtpforge import errors, head, hub
from mtpforge.listing import REPOSITORY


def main() -> None:
    """Parse the command line and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repo", help="repository, as OWNER/NAME")
    args = parser.parse_args()
    print(entry(args.repo))


def entry(repo: str) -> str:
    """The entry, for the family and the head that the checkpoint has. Raises DownloadError, CheckpointError."""
    if not REPOSITORY.fullmatch(repo):
        raise errors.DownloadError(f"{repo!r}: name a repository as OWNER/NAME (snakemake --cores 1 add --config repo=OWNER/NAME)")
    listing = hub.resolve(repo, str(hub.model_info(repo).sha))
    if not listing.tensors:
        raise errors.DownloadError(f"{repo}: has no *.safetensors: only such checkpoints can be converted")
    size = sum(listing.files[name].bytes for name in listing.checkpoint_files())
    tensors = head.head_tensors(listing, head.family_in(listing))
    has_head = f"{sum(tensor.size for tensor in tensors) / 1e9:.2f} GB of it the head" if tensors else "which has lost its head"
    return "\n".join(
        [
            f"  # {size / 1e9:.1f} GB to fetch, {has_head}. Name it under `build` to make it.",
            f"  {repo.partition('/')[2].lower()}:",
            f"    source: {{repo: {repo}, revision: {listing.revision}}}",
            "    variants:",
            *(f"      {variant}: {'{}' if tensors else '{head: none}'}" for variant in ("BF16", "Q4_K_M")),
        ]
    )


if __name__ == "__main__":
    errors.run(main)
