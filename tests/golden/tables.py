"""The heads, types and options that a llama.cpp knows, as JSON, to compare one build with another.

Reads the source of its converter, and the help of its programs. Runs in the converter's
environment, as a program of its own, because it imports that source's gguf-py.

example: tables.py resources/converter/source resources/toolchain/bin
"""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

PROGRAMS = ("llama-quantize", "llama-imatrix", "llama-gguf-split")


def main() -> None:
    """Print the tables of SOURCE and of the programs in BIN."""
    source, programs = map(Path, sys.argv[1:])
    sys.path[:0] = [str(source), str(source / "gguf-py")]
    tables = {**heads(), **types(), "options": options(programs)}
    tables["pre_tokenizers"] = {"converter": pre_tokenizers(source)}
    json.dump(tables, sys.stdout, indent=1)


def heads() -> dict[str, Any]:
    """The tensors of heads by GGUF architecture, and whether its Hugging Face names export them."""
    from conversion import ModelBase, ModelType, load_all_models  # type: ignore[import-not-found]
    from gguf import MODEL_ARCH_NAMES, MODEL_TENSORS, TENSOR_NAMES

    tensors = {
        MODEL_ARCH_NAMES[arch]: [TENSOR_NAMES[t] for t in found if t.name.startswith("NEXTN")]
        for arch, found in MODEL_TENSORS.items()
    }
    converters = {}
    load_all_models()
    for name, made in ModelBase._model_classes[ModelType.TEXT].items():
        gguf = MODEL_ARCH_NAMES[made.model_arch]
        if tensors[gguf]:
            exports = made.supports_mtp_export and not made.no_mtp
            converters[name] = [gguf, "exports a head" if exports else "exports no head alone"]
    return {
        "heads": {name: found for name, found in tensors.items() if found},
        "converters": dict(sorted(converters.items())),
    }


def types() -> dict[str, Any]:
    """Tensor types with their number, block and bytes, and file types with their number."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

    return {
        "tensor_types": {t.name: [t.value, *GGML_QUANT_SIZES[t]] for t in GGMLQuantizationType},
        "file_types": {t.name: t.value for t in LlamaFileType},
    }


def pre_tokenizers(source: Path) -> list[str]:
    """The pre-tokenizers that the converter recognizes, as its source names them."""
    text = (source / "conversion" / "base.py").read_text(encoding="utf-8")
    return sorted(set(re.findall(r'^ +res = "(.+)"$', text, re.MULTILINE)))


def options(folder: Path) -> dict[str, list[str]]:
    """The long options in a program's help; of llama-server only those for drafting."""
    found = {name: _options(folder / name) for name in PROGRAMS}
    server = [name for name in _options(folder / "llama-server") if "spec-" in name]
    return {**found, "llama-server": server}


def _options(program: Path) -> list[str]:
    asked = subprocess.run([program, "--help"], capture_output=True, text=True)
    lines = [line for line in asked.stdout.splitlines() if re.match(r"\s*-", line)]
    return sorted({name for line in lines for name in re.findall(r"(?<!\S)--[\w-]*\w", line)})


if __name__ == "__main__":
    main()
