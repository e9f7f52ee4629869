"""Checks of tensors' names, shapes and types."""

from mtpforge.gguf import quant_types
from mtpforge.gguf.head import quantizable
from mtpforge.gguf.reader import Gguf, drop_leading_ones
from mtpforge.inject import match
from mtpforge.quantize.recipe import by_recipe, head_recipe
from mtpforge.verify.report import Check, some
from mtpforge.verify.request import Request
from mtpforge.verify.source import Source


def check_types(opened: Gguf, request: Request) -> Check:
    """File type, head type and recipe are as requested."""
    wrong = _file_type_problems(opened, request)
    head = {} if request.headless else opened.head.tensors
    types = head_recipe(request.head, request.head_tensors) if request.head and head else ()
    trunk = [name for name in opened.tensors if name not in head]
    for name, asked in (by_recipe(trunk, request.recipe) | by_recipe(head, types)).items():
        info = opened.tensors[name]
        changes = quantizable(info, opened.architecture)
        if changes and info.type.name != quant_types.effective_type(asked, info.shape[-1]):
            wrong.append(f"{name} is {info.type.name}, not {asked}")
    detail = f"{len(opened.tensors)} tensors, head {request.head or 'at any type'}"
    return Check("types", not wrong, some(wrong) or detail)


def check_inventory(opened: Gguf, source: Source, request: Request) -> Check:
    """Architecture, names, shapes, and the types of unquantized tensors equal the source's.

    A base may have another layout: see `inject.match`.
    """
    if request.ours:
        problems = sorted(_name_problems(opened, source))
        problems += sorted(_type_problems(opened, source, request))
    else:
        problems = match.tensor_problems(opened, source.tensors)
    if opened.architecture != source.architecture:
        problems = [f"architecture is {opened.architecture}, not {source.architecture}", *problems]
    blocks = opened.head_blocks
    if source.head_blocks not in (None, blocks):
        problems.append(f"its head is blocks {list(blocks)}, not {list(source.head_blocks or ())}")
    detail = f"all {len(opened.tensors)} tensors of {source.architecture}"
    return Check("inventory", not problems, some(problems) or detail)


def _file_type_problems(opened: Gguf, request: Request) -> list[str]:
    if request.file_type is None:
        return []
    found = opened.get("general.file_type")
    wanted = quant_types.PUBLISHED[quant_types.check_published_type(request.file_type)]
    if found == wanted:
        return []
    packed = [kind for kind, number in quant_types.PACKED.items() if number == found]
    hint = f": its variant must be {packed[0]}" if packed else ""
    return [f"general.file_type is {found}, not {wanted} ({request.file_type}){hint}"]


def _name_problems(opened: Gguf, source: Source) -> list[str]:
    expected = source.tensors
    found = {name: info.shape for name, info in opened.tensors.items()}
    problems = [f"{name} is missing" for name in expected.keys() - found.keys()]
    problems += [f"{name} does not belong there" for name in found.keys() - expected.keys()]
    for name in expected.keys() & found.keys():
        if drop_leading_ones(found[name]) != drop_leading_ones(expected[name].shape):
            shape = list(expected[name].shape)
            problems.append(f"{name} has shape {list(found[name])}, not {shape}")
    return problems


def _type_problems(opened: Gguf, source: Source, request: Request) -> list[str]:
    """Tensors that quantization leaves alone but have another type."""
    unquantized = request.file_type if request.file_type in quant_types.UNQUANTIZED else None
    kept = request.file_type in (*quant_types.PACKED, "BF16")  # as converted
    problems = []
    for name, expected in source.tensors.items():
        changes = quantizable(expected, opened.architecture) and not kept
        wanted = unquantized if changes else expected.type.name
        found = opened.tensors.get(name)
        if found and wanted and found.type.name != wanted:
            problems.append(f"{name} is {found.type.name}, not {wanted}")
    return problems
