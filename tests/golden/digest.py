"""The content of a GGUF as comparable JSON: all metadata and tensors, in file order.

Read with gguf-py's reader, so that the comparison does not depend on our own.
"""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, GGUFValueType

LONGEST = 16  # longer arrays are hashed


def digest(path: Path) -> dict[str, Any]:
    """Metadata as key -> [type, value or sha256], tensors as name -> [type, shape, sha256]."""
    reader = GGUFReader(path)
    metadata = {}
    for field in reader.fields.values():
        if not field.name.startswith("GGUF."):
            kind = (
                "[" + field.types[-1].name + "]"
                if field.types[0] is GGUFValueType.ARRAY
                else field.types[0].name
            )
            metadata[field.name] = [kind, shortened(field.contents())]
    tensors = {}
    for tensor in reader.tensors:
        raw = tensor.data.tobytes()
        # A = -exp(A_log): the last bit depends on the math library, so the values are kept.
        value = (
            [float(x).hex() for x in tensor.data]
            if tensor.name.endswith("ssm_a")
            else hashlib.sha256(raw).hexdigest()
        )
        tensors[tensor.name] = [
            tensor.tensor_type.name,
            [int(n) for n in reversed(tensor.shape)],
            value,
        ]
    return {"metadata": metadata, "tensors": tensors}


def differences(golden: dict[str, Any], made: dict[str, Any]) -> list[str]:
    """Describe the differences between two sets of parts; order counts."""
    found = []
    if golden["upstream"] != made["upstream"]:
        found.append(f"made by {golden['upstream']}, now {made['upstream']}")
    for part, expected in golden["parts"].items():
        for kind in ("metadata", "tensors"):
            ours, theirs = made["parts"][part][kind], expected[kind]
            if list(ours) != list(theirs):
                changed = sorted(ours.keys() ^ theirs.keys())
                found.append(f"{part}: other {kind}, or in another order: {changed}")
            found += [
                f"{part}: {key} is {ours.get(key)}"
                for key, value in theirs.items()
                if not _same(ours.get(key), value)
            ]
    return found


def _same(ours: Any, theirs: Any) -> bool:
    """Equal, or hexadecimal float32 values that differ at most in the last bit."""
    if not (
        isinstance(theirs, list)
        and isinstance(theirs[-1], list)
        and str(theirs[-1][0]).startswith("-0x")
    ):
        return bool(ours == theirs)
    a, b = (
        np.array([float.fromhex(x) for x in value[-1]], np.float32).view(np.int32)
        for value in (ours, theirs)
    )
    return bool(ours[:-1] == theirs[:-1] and np.abs(a - b).max() <= 1)


def shortened(value: Any) -> Any:
    """The value itself, or number and sha256 of the items of a long array."""
    if isinstance(value, list) and len(value) > LONGEST:
        return f"{len(value)} items, sha256 {hashlib.sha256(repr(value).encode()).hexdigest()}"
    return value
