"""Sign a list of files with model-signing, which must be installed: it is no part of the locked environment.

example: sign.py results/qwen3.5-4b/SHA256SUMS --key private.pem --out results/qwen3.5-4b/SHA256SUMS.sig
"""

from pathlib import Path

from mtpforge import cli, errors
from mtpforge.io.atomic import replacing


def main() -> None:
    """Parse the command line and sign."""
    parser = cli.parser(__doc__)
    parser.add_argument("file", type=Path, help="what is signed: a list of files with their sha256")
    parser.add_argument(
        "--key", type=Path, required=True, help="a private elliptic-curve key, as PEM"
    )
    parser.add_argument("--out", type=Path, required=True, help="the signature, a Sigstore bundle")
    args = parser.parse_args()
    try:
        from model_signing import signing
    except ImportError as error:
        raise errors.ConfigError(
            f"sign: {error}: signing needs the package model-signing: python -m pip install model-signing pyopenssl"
        ) from None
    with replacing(args.out) as temporary:
        try:
            config = signing.Config()  # type: ignore[no-untyped-call]
            config.use_elliptic_key_signer(private_key=args.key).sign(args.file, temporary)
        except ValueError as error:
            raise errors.ConfigError(
                f"{args.key}: no private elliptic-curve key as PEM, without a password ({error})"
            ) from None


if __name__ == "__main__":
    cli.run(main)
