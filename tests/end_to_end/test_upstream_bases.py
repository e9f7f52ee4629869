"""Heads for bases that llama.cpp's own programs made, the pinned version's and an older one's.

Only upstream's programs convert the checkpoint without its head, and quantize, split, merge and
rename it. After injection, every byte that does not depend on the number of blocks must be the
same, and the file must draft exactly as one that was quantized with its head. Needs the toolchain,
upstream's environment (`make converter`) and the older llama.cpp (`make older`).
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import older
import pytest
import yaml
from conftest import CHECKPOINTS, MODELS, ROOT, SCRIPTS
from gguf.constants import GGUFValueType
from mtpforge.gguf import reader
from mtpforge.gguf.head import quantizable
from mtpforge.gguf.metadata import Value
from mtpforge.gguf.reader import Gguf, TensorInfo
from mtpforge.llama_cpp import server
from mtpforge.llama_cpp.programs import LlamaCpp
from mtpforge.llama_cpp.server import serve
from mtpforge.quantize.recipe import default_head

CONVERTER = ROOT / "resources" / "converter"
PYTHON = CONVERTER / "environment" / "bin" / "python"

pytestmark = pytest.mark.skipif(
    not PYTHON.exists(), reason="upstream's environment is missing: `make converter`"
)

QUANTIZED = ("Q8_0", "Q4_K_M", "IQ4_XS", "IQ3_S")
REWRITTEN = {
    "split": "Q4_K_M",
    "split-header-alone": "Q8_0",
    "merged": "Q4_K_M",
    "renamed": "IQ4_XS",
}
TYPES = {"BF16": "BF16", **{kind: kind for kind in QUANTIZED}, **REWRITTEN}
"""Base -> type of its trunk."""

Bases = dict[str, dict[str, Path]]
Run = Callable[..., "subprocess.CompletedProcess[str]"]


# ── bases ──


def call(*command: object) -> None:
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, cwd=ROOT, timeout=600
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def make_bases(source: Path, programs: Path, folder: Path) -> Bases:
    """Model -> base -> its (first) file, made by the llama.cpp whose converter is in `source`."""

    def of(model: str) -> dict[str, Path]:
        (folder / model).mkdir()
        made = {name: folder / model / f"{name}.gguf" for name in TYPES}
        runner = [
            PYTHON,
            "-I",
            "-B",
            SCRIPTS / "run_upstream.py",
            "--tokenizer-pre",
            "qwen35",
            source,
        ]
        call(
            *runner, CHECKPOINTS / model, "--no-mtp", "--outtype", "bf16", "--outfile", made["BF16"]
        )
        for kind in QUANTIZED:
            call(programs / "llama-quantize", made["BF16"], made[kind], kind, 1)
        for name, options in {
            "split": (),
            "split-header-alone": ("--no-tensor-first-split",),
        }.items():
            split = [programs / "llama-gguf-split", "--split", "--split-max-tensors", 20, *options]
            call(*split, made[TYPES[name]], folder / model / name)
            made[name] = next((folder / model).glob(f"{name}-00001-of-*.gguf"))
        call(programs / "llama-gguf-split", "--merge", made["split"], made["merged"])
        rename = Path(sys.executable).with_name("gguf-new-metadata")
        call(rename, "--general-name", "Another", made[TYPES["renamed"]], made["renamed"])
        return made

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(MODELS, pool.map(of, MODELS), strict=True))


@pytest.fixture(scope="module")
def of_pinned(toolchain: Path, tmp_path_factory: pytest.TempPathFactory) -> Bases:
    return make_bases(CONVERTER / "source", toolchain, tmp_path_factory.mktemp("pinned"))


@pytest.fixture(scope="module")
def of_older(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    entry = older.entry()
    if not entry.exists():
        missing = f"llama.cpp {older.VERSION} is missing: `make older`"
        pytest.fail(missing) if os.environ.get("CI") else pytest.skip(missing)
    return make_bases(entry / "source", entry / "bin", tmp_path_factory.mktemp("older"))


@dataclass(frozen=True)
class Case:
    """A base, and the output of inject.py."""

    model: str
    type: str
    base: Path
    out: Path

    def shards(self) -> list[Gguf]:
        """The files of the base: one, or its shards."""
        return [
            reader.read(path)
            for path in sorted(
                self.base.parent.glob(self.base.name.replace("-00001-of-", "-?????-of-"))
            )
        ]


CASES = [
    (model, maker, name)
    for model in MODELS
    for maker in ("of_pinned", "of_older")
    for name in TYPES
]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(
    request: pytest.FixtureRequest, run: Run, tmp_path_factory: pytest.TempPathFactory
) -> Case:
    model, maker, name = request.param
    base: Path = request.getfixturevalue(maker)[model][name]
    out = tmp_path_factory.mktemp("injected") / "out.gguf"
    done = run(
        "inject.py",
        base,
        "--head",
        CHECKPOINTS / model,
        "--head-type",
        default_head(TYPES[name]),
        "--out",
        out,
    )
    assert done.returncode == 0, done.stderr
    return Case(model, TYPES[name], base, out)


# ── bytes ──


def tensors(*files: Gguf) -> list[tuple[TensorInfo, bytes]]:
    """All tensors in order, with their bytes."""
    return [
        (info, piece.path.read_bytes()[piece.offset : piece.offset + piece.size])
        for opened in files
        for info, piece in zip(opened.tensors.values(), opened.ranges.values(), strict=True)
    ]


def test_every_tensor_of_the_base_is_unchanged(case: Case) -> None:
    base, injected = tensors(*case.shards()), tensors(reader.read(case.out))
    block = case.shards()[0].get(f"{case.shards()[0].architecture}.block_count")
    assert injected[: len(base)] == base
    assert injected[len(base) :] and all(
        info.name.startswith(f"blk.{block}.") for info, _ in injected[len(base) :]
    )


def test_only_metadata_that_counts_blocks_or_files_changes(case: Case) -> None:
    base, injected = case.shards()[0], reader.read(case.out)
    kind = base.architecture
    expected = dict(base.metadata)
    added = len(injected.tensors) - sum(len(shard.tensors) for shard in case.shards())
    expected[f"{kind}.block_count"] = Value.of(
        base.get(f"{kind}.block_count") + 1, GGUFValueType.UINT32
    )
    layers = f"{kind}.attention.recurrent_layers"
    if layers in expected:
        expected[layers] = Value.of(
            [*base.get(layers), False], GGUFValueType.ARRAY, GGUFValueType.BOOL
        )
    if base.get("split.count"):  # the output is a single file
        for key in ("split.no", "split.count", "split.tensors.count"):
            del expected[key]
    elif "split.tensors.count" in expected:  # left behind by a merge
        count = expected["split.tensors.count"]
        expected["split.tensors.count"] = Value.of(count.decode() + added, count.type)
    ours = {f"{kind}.nextn_predict_layers", "mtpforge.padding"}
    assert [(key, value) for key, value in injected.metadata.items() if key not in ours] == list(
        expected.items()
    )
    assert injected.metadata[f"{kind}.nextn_predict_layers"] == Value.of(1, GGUFValueType.UINT32)


def test_the_last_key_is_the_padding(case: Case) -> None:
    key, value = list(reader.read(case.out).metadata.items())[-1]
    assert key == "mtpforge.padding" and value.type is GGUFValueType.STRING


# ── drafts ──


@pytest.fixture(scope="module")
def preserved(
    built: Path, run: Run, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Case], Path]:
    """The whole checkpoint, converted by us and quantized with the types of the base's trunk.

    The types must be given: Q4_K_M has better ones for the last blocks, and with a head, other
    blocks are the last.
    """
    folder = tmp_path_factory.mktemp("preserved")

    def make(case: Case) -> Path:
        whole = built / "results" / case.model / "work/convert/all.gguf"
        out = folder / f"{case.model}-{case.type}.gguf"
        if case.type == "BF16":
            return whole
        if not out.exists():
            recipe = folder / "recipe.yaml"
            infos = [
                info
                for shard in case.shards()
                for info in shard.tensors.values()
                if quantizable(info, "qwen35")
            ]
            recipe.write_text(
                yaml.safe_dump(
                    {f"^{re.escape(i.name)}$": i.type.name for i in infos}, sort_keys=False
                )
            )
            done = run(
                "quantize.py",
                whole,
                "--type",
                case.type,
                "--head",
                "Q8_0",
                "--tensors",
                recipe,
                "--out",
                out,
            )
            assert done.returncode == 0, done.stderr
        return out

    return make


@pytest.fixture(scope="module")
def drafted(
    toolchain: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Path, str], server.Completion]:
    """The text that llama-server generates with a file's head; cached by file."""
    log = tmp_path_factory.mktemp("server") / "log"
    options = [
        "--ctx-size",
        "1024",
        "--spec-type",
        "draft-mtp",
        "--spec-draft-n-max",
        "1",
    ]

    @cache
    def ask(path: Path, model: str) -> server.Completion:
        with serve(LlamaCpp(toolchain, threads=1), path, log, options) as running:
            return running.completion((CHECKPOINTS / model / "prompts/code.txt").read_text(), 64)

    return ask


def test_it_drafts_like_a_file_that_kept_its_head(
    case: Case, preserved: Callable[[Case], Path], drafted: Callable[[Path, str], server.Completion]
) -> None:
    """The trunks are equal: older programs quantize to these types as the pinned ones do."""
    reference = reader.read(preserved(case))
    assert dict(tensors(*case.shards())).items() <= dict(tensors(reference)).items()
    injected, kept = drafted(case.out, case.model), drafted(reference.path, case.model)
    assert (injected.tokens, injected.drafts, injected.accepted) == (
        kept.tokens,
        kept.drafts,
        kept.accepted,
    )
    assert injected.accepted > 0.6 * injected.drafts > 0
