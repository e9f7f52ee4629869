"""Lists of variants to choose by a word, each with what it is quantized with."""

import re
from collections.abc import Collection
from typing import Any

from mtpforge.errors import ConfigError
from mtpforge.gguf import quant_types
from mtpforge.suggest import close

Variants = dict[str, dict[str, Any]]

CALIBRATION = "workflow/texts/calibration.txt"
"""The embedded text for importance matrices: prose, chats, code, mathematics, many languages."""

_PUBLISHED = (
    "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q4_1", "Q4_K_M", "Q4_K_S", "Q4_0", "IQ4_NL",
    "IQ4_XS", "Q3_K_L", "Q3_K_M", "IQ3_M", "Q3_K_S", "IQ3_XS", "IQ3_XXS", "Q2_K", "IQ2_M", "IQ2_S",
)  # fmt: skip
"""What large public repositories of quants usually have of a model."""

PRESETS: dict[str, tuple[str, ...]] = {
    "basic": ("BF16", "Q4_K_M"),
    "desk": ("Q4_K_M", "Q6_K"),
    "publisher": _PUBLISHED,
}

_LARGER = {"Q6_K_L": "Q6_K", "Q5_K_L": "Q5_K_M", "Q4_K_L": "Q4_K_M", "Q2_K_L": "Q2_K"}
"""bartowski's names of mixtures with embeddings and output at Q8_0."""

_NEED_NO_IMATRIX = ("Q8_0", *quant_types.UNQUANTIZED, *quant_types.PACKED)


def preset(name: str, text: str | None = None, only: Collection[str] | None = None) -> Variants:
    """The variants of a preset; a publisher's have an importance matrix, others if `text` is given.

    `text` is the matrix, or what it is computed from.
    `only` names the types to make instead of its own. Raises ConfigError for an unknown name.
    """
    if name not in PRESETS:
        meant = close(name, PRESETS)
        raise ConfigError(f"no preset {name!r}: there are {', '.join(PRESETS)}{meant}")
    is_publisher = name == "publisher"
    kinds = [*PRESETS[name], *(_LARGER if is_publisher else ())]
    wanted = [_named(kind) for kind in re.split("[, ]+", " ".join(only or kinds)) if kind]
    wanted.sort(key=lambda kind: kinds.index(kind) if kind in kinds else len(kinds))
    text = text or (CALIBRATION if is_publisher else None)
    return {kind: settings for each in wanted for kind, settings in single(each, text).items()}


def single(kind: str, text: str | None = None) -> Variants:
    """One variant; with an importance matrix if its type needs one, or `text` is given.

    Raises ConfigError if no variant can have the type.
    """
    if len(kinds := re.findall("[^, ]+", kind)) > 1:
        listed = " ".join(kinds)
        raise ConfigError(f'TYPE is one type: `make add REPO=... TYPES="{listed}"` adds several')
    kind = _named(kind)
    settings = _larger(kind)
    quant_types.check_published_type(settings.get("type", kind))
    if kind in quant_types.NEED_IMATRIX or (text and kind not in _NEED_NO_IMATRIX):
        settings["imatrix"] = _matrix(text or CALIBRATION)
    return {kind: settings}


def _named(kind: str) -> str:
    """The type as mtpforge writes it."""
    return quant_types.ALIASES.get(kind.upper(), kind.upper())


def without_matrix(variants: Variants) -> list[str]:
    """Those that an importance matrix would help much, and that have none."""
    return [
        name
        for name, each in variants.items()
        if not each.keys() & {"imatrix", "base"}
        and str(each.get("type", name)).startswith(("IQ", "Q2_K", "Q3_K", "Q4_K", "Q5_K"))
    ]


def _larger(kind: str) -> dict[str, Any]:
    """What sets one of the larger mixtures apart from its type; nothing for another name."""
    if kind not in _LARGER:
        return {}
    return {"type": _LARGER[kind], "tensors": {r"token_embd|^output\.": "Q8_0"}}


def _matrix(given: str) -> dict[str, str]:
    """A ready matrix, or the text that one is computed from."""
    text = CALIBRATION if given == "default" else given  # by one name, or entries would differ
    return {"path" if given.lower().endswith((".gguf", ".dat")) else "text": text}


def bits(settings: dict[str, Any], name: str) -> float:
    """About how many bits a weight takes in a variant."""
    kind = settings.get("type", name)
    if kind in quant_types.TENSOR_TYPES:
        return quant_types.bits(kind)
    plain = kind.rpartition("_")[0]  # Q4_K_M, MXFP4_MOE; IQ3_M is mostly IQ3_S
    plain = plain if plain in quant_types.TENSOR_TYPES else f"{plain}_S"
    return 1.1 * quant_types.bits(plain)
