"""Print an entry for config.yaml that builds a Hub repository, pinned to the commit that it has now.

example: add.py Qwen/Qwen3.5-4B
"""

from mtpforge import cli, errors
from mtpforge.checkpoint.families.registry import family_of
from mtpforge.hub import download, head
from mtpforge.hub.listing import REPOSITORY
from mtpforge.llama_cpp import architectures


def main() -> None:
    """Parse the command line and print."""
    parser = cli.parser(__doc__)
    parser.add_argument("repo", help="repository, as OWNER/NAME")
    args = parser.parse_args()
    print(entry(args.repo))


def entry(repo: str) -> str:
    """The entry, for the family and the head that the checkpoint has. Raises DownloadError, CheckpointError."""
    if not REPOSITORY.fullmatch(repo):
        raise errors.DownloadError(
            f"{repo!r}: name a repository as OWNER/NAME (snakemake --cores 1 add --config repo=OWNER/NAME)"
        )
    listing = download.resolve(repo, str(download.model_info(repo).sha))
    if not listing.tensors:
        raise errors.DownloadError(
            f"{repo}: has no *.safetensors: only such checkpoints can be converted"
        )
    size = sum(listing.files[name].bytes for name in listing.checkpoint_files())
    architecture, about, converter, variant = head.architecture_in(listing), "", [], "{}"
    if architecture in architectures.ARCHITECTURES:
        converter = ["    converter: llama.cpp"]
    elif tensors := head.head_tensors(listing, family_of(architecture)):
        about = f", {sum(tensor.size for tensor in tensors) / 1e9:.2f} GB of it the head"
    else:
        about, variant = ", which has lost its head", "{head: none}"
    return "\n".join(
        [
            f"  # {size / 1e9:.1f} GB to fetch{about}. Name it under `build` to make it.",
            f"  {repo.partition('/')[2].lower()}:",
            f"    source: {{repo: {repo}, revision: {listing.revision}}}",
            *converter,
            "    variants:",
            f"      BF16: {variant}",
            f"      Q4_K_M: {variant}",
        ]
    )


if __name__ == "__main__":
    cli.run(main)
