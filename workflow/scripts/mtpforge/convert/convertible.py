"""Whether a converter can make a part of a checkpoint, from configuration and headers alone."""

from collections.abc import Iterator
from contextlib import contextmanager

from gguf import GGUFWriter

from mtpforge.checkpoint import fp8, quantization
from mtpforge.checkpoint.checkpoint import Outline
from mtpforge.checkpoint.families.family import Family
from mtpforge.checkpoint.families.registry import FAMILIES, family_of
from mtpforge.checkpoint.safetensors import CheckpointTensor
from mtpforge.convert import gemma4, upstream, upstream_head
from mtpforge.convert.plan import plan_conversion, settled_hparams
from mtpforge.convert.tensor_names import is_buffer
from mtpforge.errors import CheckpointError
from mtpforge.llama_cpp.converter_architectures import ARCHITECTURES
from mtpforge.llama_cpp.runtimes import PINNED

CONVERTERS = ("mtpforge", "llama.cpp")
"""As in config.yaml, the preferred one first."""

_ONLY_HEAD = ", or inject its head, which is not quantized, into a GGUF of the trunk"

UNPACKED = ("BF16", "F16", "F32", "F64", fp8.DTYPE, "F8_E8M0")
"""Types with one element for each weight."""
_NO_WEIGHTS = ("I64", "BOOL")  # counters, shapes and masks


def check(checkpoint: Outline, converter: str, part: str) -> None:
    """Raise CheckpointError if the converter cannot make the part, naming one that can."""
    error = refusal(checkpoint, converter, part)
    if error is None:
        return
    for other in CONVERTERS:
        if f"converter: {other}" in str(error):
            break
        if other != converter and refusal(checkpoint, other, part) is None:
            raise CheckpointError(f"{error}: set `converter: {other}` in config.yaml")
    raise error


def check_pair(trunk: Outline, head: Outline) -> None:
    """Check that a draft model made from one checkpoint can draft for another's trunk.

    Raises CheckpointError.
    """
    known = [ARCHITECTURES.get(each.architecture) for each in (trunk, head)]
    if [each and each.only for each in known] == ["trunk", "draft"]:
        gemma4.check_pair(trunk, head)
    elif trunk.architecture != head.architecture:
        raise CheckpointError(
            f"{head.directory}: is {head.architecture}, which cannot draft for "
            f"{trunk.directory}, a {trunk.architecture}"
        )


def refusal(checkpoint: Outline, converter: str, part: str) -> CheckpointError | None:
    """Why the converter cannot make the part; None if it can."""
    try:
        if converter == "llama.cpp":
            upstream.check(checkpoint, part)
        else:
            _check_native(checkpoint, part)
    except CheckpointError as error:
        return error
    return None


def choose(checkpoint: Outline, part: str) -> str:
    """Return the preferred converter that can make the part. Raises CheckpointError if none can."""
    errors: dict[str, CheckpointError] = {}
    for converter in CONVERTERS:
        error = refusal(checkpoint, converter, part)
        if error is None:
            return converter
        errors[converter] = error
    name = checkpoint.architecture
    if name in ARCHITECTURES:
        raise errors["llama.cpp"]
    if not any(name in family.huggingface_architectures for family in FAMILIES):
        known = ", ".join(ARCHITECTURES)
        raise CheckpointError(f"{errors['mtpforge']}; with `converter: llama.cpp`, {known}")
    raise errors["mtpforge"]


def has_drafter(checkpoint: Outline) -> bool:
    """Whether the head of the architecture is a drafter, in a checkpoint of its own."""
    entry = ARCHITECTURES.get(checkpoint.architecture)
    return entry is not None and entry.only == "trunk"


def undrafted(checkpoint: Outline) -> str:
    """Return that the pinned llama.cpp cannot draft with the head; empty if it can."""
    entry = ARCHITECTURES.get(checkpoint.architecture)
    if entry is None or entry.drafts:
        return ""
    return f", with which llama.cpp {PINNED} cannot draft yet"


def head_tensors(checkpoint: Outline, converter: str) -> list[CheckpointTensor]:
    """Return the tensors of the head as a converter sees it. Raises CheckpointError."""
    if converter == "llama.cpp":
        return upstream_head.head_tensors(checkpoint)
    family = family_of(checkpoint.architecture)
    return [t for name, t in checkpoint.tensors.items() if _in_head(name, family)]


def explain(error: CheckpointError, checkpoint: Outline, label: str) -> CheckpointError:
    """Return the error with the checkpoint's label, and with its quantization if it has one."""
    how = quantization.describe(checkpoint.config)
    shown = f" ({how})" if how and how not in str(error) else ""
    return CheckpointError(f"{label}{shown}: {error}")


@contextmanager
def naming_quantization(checkpoint: Outline, family: Family, part: str) -> Iterator[None]:
    """Say in a CheckpointError that the part's weights are quantized, if they are."""
    try:
        yield
    except CheckpointError as error:
        packed = _packed(checkpoint, family, part)
        if packed is None:
            raise
        how = quantization.describe(checkpoint.config) or f"{packed.name} is {packed.dtype}"
        has_head = any(_in_head(name, family) for name in checkpoint.tensors)
        usable = has_head and part != "head" and _packed(checkpoint, family, "head") is None
        way = f"use the original checkpoint, in BF16 or FP8{_ONLY_HEAD * usable}"
        if refusal(checkpoint, "llama.cpp", part) is None:
            way = "set `converter: llama.cpp` in config.yaml"
        raise CheckpointError(
            f"its weights are quantized ({how}), which mtpforge's converter cannot read: "
            f"{way} ({error})"
        ) from None


def _check_native(checkpoint: Outline, part: str) -> None:
    """Plan the conversion, and compute the metadata that follow from config.json."""
    family = family_of(checkpoint.architecture)
    hparams = settled_hparams(checkpoint, family)
    with naming_quantization(checkpoint, family, part):
        plan_conversion(checkpoint, family, hparams=hparams, part=part)
    writer = GGUFWriter(path=None, arch=family.gguf_architecture)
    family.describe(writer, hparams, 0 if part == "trunk" else 1)


def _packed(checkpoint: Outline, family: Family, part: str) -> CheckpointTensor | None:
    """Return a tensor of the part that holds packed weights; None if there is none."""
    for name, tensor in checkpoint.tensors.items():
        if (
            tensor.dtype not in (*UNPACKED, *_NO_WEIGHTS)
            and not is_buffer(tensor)
            and not name.endswith(family.constants)
            and (part != "head" or _in_head(name, family))
        ):
            return tensor
    return None


def _in_head(name: str, family: Family) -> bool:
    return family.canonical(name).startswith(family.head_prefix)
