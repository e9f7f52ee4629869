"""Print a config.yaml entry for a Hub repository, pinned to its current commit.

example: add.py Qwen/Qwen3.5-4B
"""

from mtpforge import cli, errors
from mtpforge.checkpoint.families.registry import family_of
from mtpforge.hub import head
from mtpforge.hub.listing import REPOSITORY, Listing
from mtpforge.hub.resolve import current_name, list_commit, model_info
from mtpforge.llama_cpp import architectures


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
            f"{repo}: has no *.safetensors: only safetensors checkpoints can be converted"
        )
    size = sum(listing.files[name].bytes for name in listing.checkpoint_files())
    native = head.architecture_in(listing) not in architectures.ARCHITECTURES
    about, variant = _head(listing) if native else ("", "{}")
    return "\n".join(
        [
            f"  # {size / 1e9:.1f} GB to download{about}. Add its name to `build` to build it.",
            f"  {repo.partition('/')[2].lower()}:",
            f"    source: {{repo: {repo}, revision: {listing.revision}}}",
            *([] if native else ["    converter: llama.cpp"]),
            "    variants:",
            f"      BF16: {variant}",
            f"      Q4_K_M: {variant}",
        ]
    )


def _head(listing: Listing) -> tuple[str, str]:
    """Return a note on the head, and the settings of the variants."""
    tensors = head.head_tensors(listing, family_of(head.architecture_in(listing)))
    if not tensors:
        return ", which has lost its head", "{head: none}"
    return f", {sum(tensor.size for tensor in tensors) / 1e9:.2f} GB of it the head", "{}"


if __name__ == "__main__":
    cli.run(main)
