"""The quantization types of llama.cpp: those of a whole file, and those of a single tensor.

A new type needs a row in each table: its number or position, its error and its cost.
"""

import re
from collections.abc import Collection
from functools import cache

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from mtpforge import suggest
from mtpforge.errors import ConfigError

# File type -> general.file_type, as listed by `llama-quantize --help` of llama.cpp b11434.
FILE_TYPES = {
    "F32": 0, "F16": 1, "BF16": 32, "Q8_0": 7, "Q6_K": 18,
    "Q5_K_M": 17, "Q5_K_S": 16, "Q5_0": 8, "Q5_1": 9,
    "Q4_K_M": 15, "Q4_K_S": 14, "Q4_0": 2, "Q4_1": 3, "IQ4_NL": 25, "IQ4_XS": 30, "MXFP4_MOE": 38,
    "Q3_K_L": 13, "Q3_K_M": 12, "Q3_K_S": 11, "IQ3_M": 27, "IQ3_S": 26, "IQ3_XS": 22, "IQ3_XXS": 23,
    "Q2_K": 10, "Q2_K_S": 21, "IQ2_M": 29, "IQ2_S": 28, "IQ2_XS": 20, "IQ2_XXS": 19,
    "IQ1_M": 31, "IQ1_S": 24, "TQ1_0": 36, "TQ2_0": 37,
}  # fmt: skip

# Types that gguf-py lacks: 42 is in llama.cpp b11434, 133 to 158 are in ik_llama.cpp (ggml.h).
_OTHER_NAMES = {
    42: "Q2_0", 133: "Q6_0", 134: "IQ1_BN", 135: "IQ2_BN", 137: "IQ2_K", 138: "IQ3_K", 139: "IQ4_K",
    140: "IQ5_K", 141: "IQ6_K", 144: "IQ4_KS", 145: "IQ2_KS", 146: "IQ4_KSS", 152: "IQ5_KS",
    153: "IQ2_KT", 154: "IQ3_KT", 155: "IQ4_KT", 156: "IQ3_KS", 157: "IQ2_KL", 158: "IQ1_KT",
}  # fmt: skip

ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}
"""Other names that llama-quantize has for file types."""

UNQUANTIZED = ("F32", "F16", "BF16")

PACKED = {"NVFP4": 39, "MXFP4": 38}
"""File types of packed checkpoints, which are only converted: llama-quantize cannot make them."""

PUBLISHED = FILE_TYPES | PACKED
"""File types that a variant can have."""

# The types of a tensor, finest first. Below 4 bits, the acceptance of a head drops sharply
# (llama.cpp PR #28351).
TENSOR_TYPES = (
    "F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_1", "Q5_K", "Q5_0",
    "Q4_1", "Q4_K", "Q4_0", "IQ4_NL", "NVFP4", "IQ4_XS", "MXFP4",
    "Q3_K", "IQ3_S", "IQ3_XXS", "Q2_K", "IQ2_S", "IQ2_XS", "IQ2_XXS",
    "IQ1_M", "IQ1_S", "TQ2_0", "TQ1_0",
)  # fmt: skip

TABLE = "I32"
"""Type of a table of experts by token, which has no weights; its numbers are small."""

# Types of a file or a tensor that llama-quantize refuses without an importance matrix
# (`tensor_requires_imatrix` and `llama_tensor_get_type_impl` in src/llama-quant.cpp). A file type
# is listed if its mixture has such tensors; a Q2_K tensor needs a matrix in a Q2_K_S file only.
NEED_IMATRIX = (
    "Q2_K_S", "IQ3_XS", "IQ3_XXS", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S",
)  # fmt: skip

# llama-imatrix does not cover embeddings and output, so llama-quantize does not check them, but
# fails an assertion for these types.
EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight", "output.weight")
_NEED_IMATRIX_EVEN_THERE = ("IQ2_XS", "IQ2_XXS", "IQ1_S")

# Relative error of quantized heavy-tailed weights, measured: RMS of the difference over RMS of the
# weights. Types that need an importance matrix had an uneven one.
RELATIVE_ERROR = {
    "F32": 0.0,
    "F16": 2.0**-11,
    "BF16": 2.0**-8,
    "Q8_0": 0.007,
    "Q6_K": 0.023,
    "Q5_K": 0.043,
    "Q5_0": 0.058,
    "Q5_1": 0.058,
    "Q4_K": 0.087,
    "IQ4_NL": 0.093,
    "IQ4_XS": 0.094,
    "NVFP4": 0.103,
    "Q4_0": 0.116,
    "Q4_1": 0.116,
    "MXFP4": 0.133,
    "Q3_K": 0.184,
    "IQ3_S": 0.198,
    "Q2_K": 0.343,
    "IQ3_XXS": 0.217,
    "IQ2_S": 0.316,
    "IQ2_XS": 0.355,
    "IQ2_XXS": 0.419,
    "IQ1_M": 0.524,
    "IQ1_S": 0.596,
    "TQ1_0": 0.851,
    "TQ2_0": 0.851,
}

# CPU seconds of llama-quantize for 10^9 weights: the mean of two runs of bench/costs.py, but
# at least 1. BF16 is a copy.
SECONDS = {
    "F32": 2, "F16": 3, "BF16": 1, "Q8_0": 4, "Q6_K": 29, "Q5_1": 2, "Q5_K": 55, "Q5_0": 2,
    "Q4_1": 1, "Q4_K": 64, "Q4_0": 1, "IQ4_NL": 180, "NVFP4": 25, "IQ4_XS": 180, "MXFP4": 5,
    "Q3_K": 12, "IQ3_S": 335, "IQ3_XXS": 471, "Q2_K": 56, "IQ2_S": 210, "IQ2_XS": 800,
    "IQ2_XXS": 395, "IQ1_M": 145, "IQ1_S": 152, "TQ2_0": 5, "TQ1_0": 4,
}  # fmt: skip

# CPU seconds for the tables that a run computes first, on all processors; only types that take a
# second or more.
TABLES = {"IQ2_S": 4.2, "IQ2_XS": 2.1, "IQ1_M": 9.4, "IQ1_S": 9.2}

# What llama-quantize uses instead if a row is not a multiple of the type's block
# (`tensor_type_fallback` in `llama-quant.cpp`).
_FALLBACK = {
    "Q6_K": "Q8_0", "Q5_K": "Q5_1", "Q4_K": "Q5_0",
    "Q3_K": "Q4_0", "Q2_K": "Q4_0", "TQ1_0": "Q4_0", "TQ2_0": "Q4_0",
    "IQ4_XS": "IQ4_NL", "IQ3_S": "IQ4_NL", "IQ3_XXS": "IQ4_NL", "IQ2_S": "IQ4_NL",
    "IQ2_XS": "IQ4_NL", "IQ2_XXS": "IQ4_NL", "IQ1_M": "IQ4_NL", "IQ1_S": "IQ4_NL",
}  # fmt: skip


class UnknownType(int):
    """The number of a tensor type that gguf-py does not know, in place of its own enum."""

    @property
    def name(self) -> str:
        """The type's name, or its number if it is none of ik_llama.cpp or a newer llama.cpp."""
        return _OTHER_NAMES.get(int(self), f"type {int(self)}")


@cache
def main_type(file_type: str) -> str:
    """The type that most tensors of a file type have: Q4_K of Q4_K_M."""
    return next(
        kind
        for end in range(len(file_type), 0, -1)
        for kind in TENSOR_TYPES
        if kind.startswith(file_type[:end])
    )


def bits(name: str) -> float:
    """Bits per weight of a tensor type."""
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[name]]
    return 8 * size / block


def effective_type(name: str, row: int) -> str:
    """The type that llama-quantize really uses for type `name` and rows of `row` values."""
    for kind in (name, _FALLBACK.get(name, name)):
        if row % GGML_QUANT_SIZES[GGMLQuantizationType[kind]][0] == 0:
            return kind
    return "F16"


def needs_imatrix(tensor: str, kind: str, file_type: str) -> bool:
    """Whether llama-quantize needs an importance matrix that covers the tensor to use this type."""
    if tensor in EMBEDDINGS:
        return kind in _NEED_IMATRIX_EVEN_THERE
    return kind in NEED_IMATRIX or (kind, file_type) == ("Q2_K", "Q2_K_S")


def check_file_type(name: str) -> str:
    """Return the name if llama-quantize has that file type. Raises ConfigError."""
    if name not in FILE_TYPES:
        raise ConfigError(f"unknown quantization type {name!r}{_hint(name, FILE_TYPES)}")
    return name


def check_published_type(name: str) -> str:
    """Return the name if a variant can have that file type. Raises ConfigError."""
    return name if name in PACKED else check_file_type(name)


def check_tensor_type(name: str) -> GGMLQuantizationType:
    """The type of that name. Raises ConfigError if llama.cpp has no such type for a tensor."""
    if name not in TENSOR_TYPES:
        raise ConfigError(f"unknown tensor type {name!r}{_hint(name, TENSOR_TYPES)}")
    return GGMLQuantizationType[name]


def _hint(name: str, known: Collection[str]) -> str:
    """The known type that was probably meant, also by its bits, or as Unsloth's UD-Q4_K_XL.

    All known types, if none is similar.
    """
    plain = re.sub(r"_K_X?L$", "_K_M", name.upper().removeprefix("UD-"))
    if plain not in known:
        plain = ALIASES.get(plain, plain)
    if number := re.fullmatch(r"(?:Q|INT)?([2-8])[-_ ]?(?:BITS?)?", plain):
        usual = (f"Q{number[1]}{end}" for end in ("_K_M", "_K", "_0"))
        plain = next((kind for kind in usual if kind in known), plain)
    meant = suggest.closest(plain, known)
    return f", did you mean {meant}?" if meant else f": llama.cpp has {', '.join(known)}"
