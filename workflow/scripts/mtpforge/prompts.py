"""The prompts on which drafting is verified and measured: `*.txt` files, named after their kind (code, prose, structured)."""

from pathlib import Path

from mtpforge.errors import ConfigError

PROMPTS = Path(__file__).resolve().parents[2] / "prompts"


def read_prompts(folder: Path) -> dict[str, str]:
    """The texts by kind. Raises ConfigError."""
    try:
        prompts = {
            path.stem: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.txt"))
        }
    except UnicodeDecodeError as error:
        raise ConfigError(f"{folder}: a prompt is not UTF-8 ({error})") from None
    if not prompts:
        raise ConfigError(f"{folder}: no *.txt prompts there")
    return prompts
