"""What a GGUF holds, as JSON that can be compared: every metadata value and every tensor, in file order.

Read with gguf-py's own reader, so that our reader and writer are not what vouches for them.
"""

import hashlib
from pathlib import Path
from typing import Any

from gguf import GGUFReader, GGUFValueType

LONGEST = 16  # items of an array that are kept as they are; longer ones as a digest


def digest(path: Path) -> dict[str, Any]:
    """Metadata as key -> [type, value or sha256], tensors as name -> [type, shape rows first, sha256]."""
    reader = GGUFReader(path)
    metadata = {}
    for field in reader.fields.values():
        if not field.name.startswith("GGUF."):
            kind = "[" + field.types[-1].name + "]" if field.types[0] is GGUFValueType.ARRAY else field.types[0].name
            metadata[field.name] = [kind, _short(field.contents())]
    tensors = {}
    for tensor in reader.tensors:
        raw = tensor.data.tobytes()
        # A = -exp(A_log): the last bit depends on the maths library of the machine, so the values themselves are kept.
        value = [float(x).hex() for x in tensor.data] if tensor.name.endswith("ssm_a") else hashlib.sha256(raw).hexdigest()
        tensors[tensor.name] = [tensor.tensor_type.name, [int(n) for n in reversed(tensor.shape)], value]
    return {"metadata": metadata, "tensors": tensors}


def _short(value: Any) -> Any:
    if isinstance(value, list) and len(value) > LONGEST:
        return f"{len(value)} items, sha256 {hashlib.sha256(repr(value).encode()).hexdigest()}"
    return value
