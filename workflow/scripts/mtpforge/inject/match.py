"""The one rule of injection and verification for a base.

A base must be the head's model: architecture, sizes, rotation, blocks, every tensor, vocabulary. It
may differ wherever llama.cpp takes either form: matrices fused or apart, scales and biases beside a
matrix, an output matrix of its own, more or fewer tokens, renamed tokens, and one value for all
blocks or one for each.
"""

import re
from collections.abc import Iterable, Mapping, Set
from typing import Any, NamedTuple, TypeAlias

from gguf.constants import GGUFValueType, Keys

from mtpforge.errors import GgufError
from mtpforge.gguf.metadata import Value
from mtpforge.gguf.reader import Gguf, TensorInfo, drop_leading_ones

EMBEDDINGS, OUTPUT = "token_embd.weight", "output.weight"
"""The tensors with a row for each token."""

BLOCKS = ("block_count", "nextn_predict_layers")
"""Keys of the architecture that injection sets."""
FREE = ("context_length", "vocab_size")
"""Keys of the architecture that may differ between a base and a head of the same model."""
# Keys that the base must have if the head's file has them.
_NEEDED = (
    "embedding_length",
    "attention.head_count",
    "rope.freq_base",
    "rope.dimension_count",
    "rope.dimension_sections",
)
# Ending of a fused tensor -> endings of the tensors whose rows it has. `create_tensor_qkv` and
# `create_tensor_gate_up_exps` in llama.cpp's llama-model.cpp take both; `ssm_in` is how the first
# converters wrote Qwen3-Next.
_FUSED = {
    "ffn_gate_up_exps.weight": ("ffn_gate_exps.weight", "ffn_up_exps.weight"),
    "attn_qkv.weight": ("attn_q.weight", "attn_k.weight", "attn_v.weight"),
    "attn_qkv.bias": ("attn_q.bias", "attn_k.bias", "attn_v.bias"),
    "ssm_in.weight": ("attn_qkv.weight", "attn_gate.weight"),
}
# Vectors that llama.cpp reads beside a matrix if they are there: a value for each matrix (`.scale`
# in `load_tensors` of llama-model.cpp), or for each row (`create_tensor_qkv`).
_SCALES = (".scale", ".input_scale")
_SCALED = re.compile(
    r"(blk\.[0-9]+\.(attn_(q|k|v|qkv|gate|output)|ffn_(gate|up|down)(_exps|_shexp)?"
    r"|ssm_(in|out|alpha|beta)|nextn\.eh_proj)|output)\.(scale|input_scale)"
)
_PROJECTION = "cls.output.weight"  # of embeddings for retrieval, with a bias; drafts ignore it
_BIASES = re.compile(r"(blk\.[0-9]+\.attn_)(q|k|v|qkv)\.bias")
_OWN_EMBEDDINGS = ("nextn.embed_tokens.weight", "nextn.shared_head_head.weight")
# Tensors that only Ollama's converter writes: a vision tower in the same file, and its own names.
_OLLAMA = re.compile(r"(v|mm|mtp)\..+|blk\.[0-9]+\.ssm_dt")
_ITEMS = 12  # where the items of an encoded list begin

Shape: TypeAlias = tuple[int, ...]


class Difference(NamedTuple):
    """The first difference between two models: its name, and the value on both sides."""

    name: str
    found: Any
    expected: Any


def check_match(base: Gguf, head: Gguf, trunk: Mapping[str, TensorInfo] | None = None) -> None:
    """Raise GgufError if the head belongs to another model, or if the base is incomplete.

    `trunk`: the tensors of the head's own trunk, if they are known.
    """
    if head.architecture != base.architecture:
        raise GgufError(
            f"{base.path} is {base.architecture}, {head.path} is {head.architecture}: "
            "the head belongs to another model"
        )
    _check_converter(base, head)
    _check_blocks(base, head)
    for difference in (
        *key_differences(base, head),
        *filter(None, [vocabulary_difference(base.metadata, head.metadata)]),
    ):
        found = str(difference.found)[:200]
        expected = str(difference.expected)[:200]
        raise GgufError(
            f"{difference.name} is {found} in {base.path} and {expected} in {head.path}: "
            "the head belongs to another model"
        )
    if problems := tensor_problems(base if trunk is None else base.trunk, trunk):
        raise GgufError(
            f"{base.path}: {problems[0]}: the base is incomplete or damaged, or the head belongs "
            "to another model"
        )
    _check_own_embeddings(base, head)


def tensor_problems(base: Gguf, expected: Mapping[str, TensorInfo] | None) -> list[str]:
    """Tensors that a base lacks, that do not belong there, or that have another shape.

    Without `expected`, only the vocabulary's tensors are checked.
    """
    if EMBEDDINGS not in base.tensors:
        return [f"{EMBEDDINGS} is missing"]
    problems = _vocabulary_problems(base)
    if expected is None:
        return problems
    found = joined_shapes(base.tensors, expected)
    right = joined_shapes(expected, base.tensors)
    for name in {EMBEDDINGS, OUTPUT} & right.keys():
        right[name] = (base.tensors[EMBEDDINGS].shape[0], *right[name][1:])
    for name in found.keys() - right.keys():
        if shape := _optional_shape(name, base.tensors, expected):
            right[name] = shape
    for name in right.keys() - found.keys():
        if name.endswith(_SCALES):
            del right[name]
    return sorted(problems) + sorted(_shape_problems(found, right))


def fusions(names: Set[str], others: Set[str]) -> dict[str, tuple[str, ...]]:
    """The tensors that `names` have fused and `others` have apart, with the names of the parts."""
    pairs = {}
    for name in names - others:
        for ending, endings in _FUSED.items():
            block = name.removesuffix(ending)
            parts = tuple(f"{block}{part}" for part in endings)
            if name.endswith(f".{ending}") and all(part in others for part in parts):
                pairs[name] = parts
    return pairs


def is_bias_of_any(name: str, matrices: Set[str]) -> bool:
    """Whether a tensor is a bias of attention beside one of the matrices, fused or apart."""
    bias = _BIASES.fullmatch(name)
    endings = ("q.weight", "qkv.weight")
    return bias is not None and any(f"{bias[1]}{ending}" in matrices for ending in endings)


def joined_shapes(
    tensors: Mapping[str, TensorInfo], like: Mapping[str, TensorInfo]
) -> dict[str, Shape]:
    """The shapes of tensors, joined where `like` has them fused."""
    shapes = {name: drop_leading_ones(info.shape) for name, info in tensors.items()}
    for whole, parts in fusions(like.keys(), tensors.keys()).items():
        joined = _joined([shapes[part] for part in parts])
        if joined:
            shapes = {name: shape for name, shape in shapes.items() if name not in parts}
            shapes[whole] = joined
    return shapes


def key_differences(base: Gguf, head: Gguf) -> list[Difference]:
    """Keys of the architecture that differ, and are in both files or needed."""
    prefix = f"{base.architecture}."
    differences = []
    for key in head.metadata:
        name = key.removeprefix(prefix)
        if name == key or name in BLOCKS + FREE or same_value(base, key, head):
            continue
        if key in base.metadata or name in _NEEDED:
            differences.append(Difference(key, base.get(key), head.get(key)))
    return differences


def vocabulary_difference(
    found: Mapping[str, Value], expected: Mapping[str, Value]
) -> Difference | None:
    """How two vocabularies differ; None if a head fits both, or if one has no vocabulary.

    Fine-tunes pad, cut and extend vocabularies, and the head uses the base's. Of the tokens that
    both have, up to 1% may differ in text, because publishers rename reserved tokens. Merges must
    be equal as far as both go.
    """
    return (
        _form_difference(found, expected)
        or _token_difference(found, expected)
        or _merge_difference(found, expected)
    )


def same_value(base: Gguf, key: str, head: Gguf) -> bool:
    """Whether both have the same value; for an array with an entry per block, in the trunk.

    One value is the same as an array that has it for each block.
    """
    ours = base.get(key)
    theirs = head.get(key)
    if ours == theirs or ours is None or theirs is None:
        return bool(ours == theirs)
    if not isinstance(ours, list):
        return _is_everywhere(ours, theirs, head)
    if not isinstance(theirs, list):
        return _is_everywhere(theirs, ours, base)
    trunk = base.head_blocks.start
    per_block = (len(ours), len(theirs)) == (base.head_blocks.stop, head.head_blocks.stop)
    return per_block and bool(ours[:trunk] == theirs[:trunk])


def _is_everywhere(value: Any, array: Any, opened: Gguf) -> bool:
    """Whether an array has this value for each block."""
    is_list = isinstance(array, list) and len(array) == opened.head_blocks.stop
    return is_list and all(item == value for item in array)


def _check_converter(base: Gguf, head: Gguf) -> None:
    """Refuse a base of Ollama's converter, which llama.cpp cannot load."""
    signs = [name for name in base.tensors if _OLLAMA.fullmatch(name)][:1]
    for name, is_ollamas in (
        ("rope.dimension_sections", _lacks_a_section),
        ("attention.head_count_kv", _skips_recurrent_blocks),
    ):
        key = f"{head.architecture}.{name}"
        if is_ollamas(base.get(key), head.get(key)):
            signs.append(f"{key} is {str(base.get(key))[:60]}")
    if signs:
        raise GgufError(
            f"{base.path}: has the layout of Ollama's converter ({', '.join(signs)}), which "
            "llama.cpp cannot load: take a GGUF of llama.cpp's converter, or quantize the "
            "checkpoint here"
        )


def _lacks_a_section(found: Any, right: Any) -> bool:
    return isinstance(found, list) and [*found, 0] == right


def _skips_recurrent_blocks(found: Any, right: Any) -> bool:
    return isinstance(found, list) and type(right) is int and set(found) == {0, right}


def _check_blocks(base: Gguf, head: Gguf) -> None:
    blocks = base.head_blocks.start
    matches = (re.match(r"blk\.([0-9]+)\.", name) for name in base.tensors)
    numbers = {match.string: int(match[1]) for match in matches if match}
    undeclared = [name for name in numbers if ".nextn." in name and numbers[name] < blocks]
    if undeclared:
        raise GgufError(
            f"{base.path}: has {undeclared[0]}, but {base.architecture}.nextn_predict_layers does "
            "not declare its head: take a quant whose converter knew the head"
        )
    present = set(numbers.values())
    missing = next((number for number in range(blocks) if number not in present), None)
    if missing is not None:
        raise GgufError(
            f"{base.path}: is incomplete: it declares {blocks} blocks, "
            f"but has no tensor of block {missing}"
        )
    if blocks != head.head_blocks.start:
        raise GgufError(
            f"{base.path} has {blocks} blocks, the head in {head.path} is block "
            f"{head.head_blocks.start}: it belongs to another model"
        )
    if surplus := [name for name, number in numbers.items() if number >= base.head_blocks.stop]:
        raise GgufError(f"{base.path}: has {surplus[0]}, but its metadata declares no such block")


def _check_own_embeddings(base: Gguf, head: Gguf) -> None:
    """Some heads (GLM's) have embeddings of their own, and llama.cpp loads only the base's size."""
    rows = base.tensors[EMBEDDINGS].shape[0]
    for name, info in head.tensors.items():
        if name.endswith(_OWN_EMBEDDINGS) and info.shape[0] != rows:
            raise GgufError(
                f"{head.path}: {name} is for {info.shape[0]} tokens, {base.path} has {rows}: "
                "a head with embeddings of its own needs a base with as many tokens"
            )


# ── tensors ──


def _joined(shapes: list[Shape]) -> Shape | None:
    """The shape of tensors whose rows follow each other; None if they do not fit together."""
    axis = max(len(shapes[0]) - 2, 0)
    others = {shape[:axis] + shape[axis + 1 :] for shape in shapes}
    if len(others) > 1:
        return None
    return (*shapes[0][:axis], sum(shape[axis] for shape in shapes), *shapes[0][axis + 1 :])


def _optional_shape(
    name: str, found: Mapping[str, TensorInfo], expected: Mapping[str, TensorInfo]
) -> Shape | None:
    """The shape of a tensor that llama.cpp reads if a file has it; None if it is not optional."""
    if name == OUTPUT:
        return found[EMBEDDINGS].shape
    if name == _PROJECTION:
        return (found[name].shape[0], found[EMBEDDINGS].shape[-1])
    matrix_name = f"{name.rpartition('.')[0]}.weight"
    matrix = found.get(matrix_name)
    if matrix and _SCALED.fullmatch(name):
        return drop_leading_ones(matrix.shape[:-2] or (1,))
    matrix = matrix or expected.get(matrix_name)  # biases may be apart where matrices are fused
    if matrix and (_BIASES.fullmatch(name) or matrix_name == _PROJECTION):
        return matrix.shape[-2:-1]
    return None


def _shape_problems(found: Mapping[str, Shape], right: Mapping[str, Shape]) -> Iterable[str]:
    for name in found.keys() | right.keys():
        if name not in found:
            yield f"{name} is missing"
        elif name not in right:
            yield f"{name} does not belong there"
        elif found[name] != right[name]:
            yield f"{name} has shape {list(found[name])}, not {list(right[name])}"


# ── vocabulary ──


def _vocabulary_problems(base: Gguf) -> list[str]:
    rows = base.tensors[EMBEDDINGS].shape[0]
    tokens = _texts(base.metadata, Keys.Tokenizer.LIST)
    if tokens is None or len(tokens) == rows:
        return []
    return [f"{EMBEDDINGS} has {rows} rows for {len(tokens)} tokens, which llama.cpp cannot load"]


def _texts(metadata: Mapping[str, Value], key: str) -> Value | None:
    """A list of texts, if a file has it."""
    texts = metadata.get(key)
    is_list = texts is not None and texts.item_type is GGUFValueType.STRING
    return texts if is_list else None


def _form_difference(
    found: Mapping[str, Value], expected: Mapping[str, Value]
) -> Difference | None:
    """A key of the vocabulary that one of them has as anything else than a list of texts."""
    for key in (Keys.Tokenizer.LIST, Keys.Tokenizer.MERGES):
        for side in (found, expected):
            if key in side and _texts(side, key) is None:
                return Difference(key, _form(found.get(key)), _form(expected.get(key)))
    return None


def _form(value: Value | None) -> str:
    if value is None:
        return "missing"
    item = value.item_type
    return f"a list of {item.name.lower()}" if item is not None else value.type.name.lower()


def _token_difference(
    found: Mapping[str, Value], expected: Mapping[str, Value]
) -> Difference | None:
    ours = _texts(found, Keys.Tokenizer.LIST)
    theirs = _texts(expected, Keys.Tokenizer.LIST)
    if ours is None or theirs is None or _agree(ours, theirs):
        return None
    pairs = enumerate(zip(ours.decode(), theirs.decode(), strict=False))
    differing = [(i, our, their) for i, (our, their) in pairs if our != their]
    if 100 * len(differing) <= min(len(ours), len(theirs)):
        return None
    number, our, their = differing[0]
    return Difference(f"token {number}", our, their)


def _agree(ours: Value, theirs: Value) -> bool:
    """Whether two lists of texts are equal as far as both go: half a million are not decoded."""
    short, long = sorted((ours.raw[_ITEMS:], theirs.raw[_ITEMS:]), key=len)
    return long.startswith(short)


def _merge_difference(
    found: Mapping[str, Value], expected: Mapping[str, Value]
) -> Difference | None:
    key = Keys.Tokenizer.MERGES
    ours = _texts(found, key)
    theirs = _texts(expected, key)
    if ours is None or theirs is None or _agree(ours, theirs):
        return None
    return Difference(key, f"a list of {len(ours)}", f"another list of {len(theirs)}")
