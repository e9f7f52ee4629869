"""Upstream's converter gives its usual bytes with the whole head, and runs no checkpoint code.

Converts tiny models of each architecture. Needs the toolchain and `make converter`.
"""

import json
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from conftest import CHECKPOINTS, ROOT, SCRIPTS
from deepseek4 import write_deepseek4
from layouts import read_tensors, seeing_qwen4_exp, write_checkpoint
from mtpforge.checkpoint.checkpoint import Checkpoint
from mtpforge.convert import native, proof
from mtpforge.errors import GgufError
from mtpforge.gguf import reader, writer
from mtpforge.gguf.reader import Gguf
from mtpforge.inject import inject
from mtpforge.llama_cpp.programs import LlamaCpp
from mtpforge.llama_cpp.server import serve
from mtpforge.quantize import llama_quantize
from mtpforge.quantize.recipe import head_recipe
from mtpforge.quantize.request import QuantizeRequest
from mtpforge.verify.request import Request
from mtpforge.verify.verify import verify
from other_architectures import HIDDEN, MODELS, write_model

CONVERTER = ROOT / "resources" / "converter"
PYTHON, SOURCE = CONVERTER / "environment" / "bin" / "python", CONVERTER / "source"
BLOCKS = {"step": 2, "step-wrapped": 2, "mimo": 3, "mimo-fp8": 3}  # of heads with more than one
UNDRAFTED = {"bailing", "exaone", "glm-next"}

pytestmark = pytest.mark.skipif(
    not PYTHON.exists(), reason="upstream's environment is missing: `make converter`"
)

# Unmodified upstream, for all checkpoints in one process: torch takes seconds to load.
PLAIN = """
import runpy, sys
source, *pairs = [word for word in sys.argv[1:] if word != "--mtp"]
options = ["--mtp"] if "--mtp" in sys.argv else []
sys.path[:0] = [source, source + "/gguf-py"]
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen35"
for checkpoint, out in zip(pairs[::2], pairs[1::2]):
    sys.argv = ["convert_hf_to_gguf.py", *options, checkpoint, "--outtype", "bf16"]
    sys.argv += ["--outfile", out]
    runpy.run_path(source + "/convert_hf_to_gguf.py", run_name="__main__")
"""


@dataclass(frozen=True)
class Made:
    """The conversions of these tests: `checkpoints` contain code, `plain` is made without it."""

    folder: Path
    runs: dict[str, "subprocess.CompletedProcess[str]"]

    def checkpoint(self, name: str) -> Path:
        return self.folder / "checkpoints" / name

    def file(self, name: str) -> Path:
        assert self.runs[name].returncode == 0, self.runs[name].stderr[-3000:]
        return self.folder / f"{name}.gguf"

    def plain(self, name: str) -> Path:
        assert self.runs["plain"].returncode == 0, self.runs["plain"].stderr[-3000:]
        return self.folder / f"plain-{name}.gguf"

    @property
    def marker(self) -> Path:
        """The file that the checkpoints' code creates if it runs."""
        return self.folder / "code-was-run"


def plant_code(checkpoint: Path, marker: Path) -> None:
    """Configuration and tokenizer classes that `trust_remote_code` would load."""
    (checkpoint / "evil.py").write_text(
        f"open({str(marker)!r}, 'w')\nEvilConfig = EvilTokenizer = object\n"
    )
    for name, key, value in (
        ("config.json", "AutoConfig", "evil.EvilConfig"),
        ("tokenizer_config.json", "AutoTokenizer", ["evil.EvilTokenizer", None]),
    ):
        settings = json.loads((checkpoint / name).read_text())
        settings |= {"auto_map": {key: value}, "nested": [{"auto_map": {key: value}}]}
        (checkpoint / name).write_text(json.dumps(settings))


@pytest.fixture(scope="module")
def made(toolchain: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("other")
    done = Made(folder, {})
    for name in MODELS:
        write_model(name, folder / "plain" / name)
        plant_code(write_model(name, done.checkpoint(name)), done.marker)
    dense = CHECKPOINTS / "tiny-qwen3.5"
    for vision in (
        Path(shutil.copytree(dense, done.checkpoint("vision"))),
        write_checkpoint(done.checkpoint("flash-next"), dense, *seeing_qwen4_exp()),
    ):
        (vision / "preprocessor_config.json").write_text(
            '{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}'
        )
    plain = [
        word for name in MODELS for word in (folder / "plain" / name, folder / f"plain-{name}.gguf")
    ]
    jobs: dict[str, list[object]] = {"plain": [PYTHON, "-c", PLAIN, SOURCE, *plain]}
    for out, name, part in (
        *((name, name, "all") for name in MODELS),
        ("trunk", "glm", "trunk"),
        ("draft", "glm", "draft"),
        ("mmproj", "vision", "mmproj"),
        ("mmproj-flash-next", "flash-next", "mmproj"),
    ):
        options = (
            "--converter",
            CONVERTER,
            "--tokenizer-pre",
            "qwen35",
            "--log",
            folder / f"{out}.log",
        )
        files = (done.checkpoint(name), "--part", part, "--out", folder / f"{out}.gguf")
        jobs[out] = [sys.executable, SCRIPTS / "convert_upstream.py", *files, *options]
    jobs["unnamed"] = [word for word in jobs["glm"] if word not in ("--tokenizer-pre", "qwen35")]
    jobs["unnamed"][jobs["unnamed"].index(folder / "glm.gguf")] = folder / "unnamed.gguf"
    # Nemotron is the only one whose code upstream trusts.
    jobs["runner"] = [
        PYTHON,
        "-I",
        SCRIPTS / "run_upstream.py",
        "--tokenizer-pre",
        "qwen35",
        SOURCE,
        done.checkpoint("nemotron"),
    ]
    jobs["runner"] += ["--outfile", folder / "runner.gguf"]

    with ThreadPoolExecutor(2) as pool:
        done.runs.update(zip(jobs, pool.map(call, jobs.values()), strict=True))
    return done


def call(job: list[object]) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        list(map(str, job)), capture_output=True, text=True, cwd=ROOT, timeout=600
    )


# ── conversion ──


@pytest.mark.parametrize("name", MODELS)
def test_the_file_has_upstreams_bytes(made: Made, name: str) -> None:
    assert made.file(name).read_bytes() == made.plain(name).read_bytes()


@pytest.mark.parametrize("name", MODELS)
def test_the_head_has_all_blocks(made: Made, name: str) -> None:
    opened = reader.read(made.file(name))
    assert len(opened.head_blocks) == BLOCKS.get(name, 1)
    assert all(
        f"blk.{block}.nextn.eh_proj.weight" in opened.tensors for block in opened.head_blocks
    )


def test_code_of_a_checkpoint_never_runs(made: Made) -> None:
    assert all(made.file(name) for name in MODELS) and not made.marker.exists()


def test_run_upstream_itself_refuses_code(made: Made) -> None:
    done = made.runs["runner"]
    assert done.returncode != 0 and "needs to run its own code: refused" in done.stderr
    assert not (made.folder / "runner.gguf").exists()


def test_an_unknown_pre_tokenizer_error_says_what_to_do(made: Made) -> None:
    done = made.runs["unnamed"]
    assert (
        done.returncode == 1
        and len(done.stderr.splitlines()) == 1
        and done.stderr.startswith("error: ")
    )
    assert "--tokenizer-pre" in done.stderr and str(made.checkpoint("glm")) in done.stderr
    assert not list(made.folder.glob("*unnamed*"))


def test_the_trunk_has_no_head(made: Made) -> None:
    trunk, whole = (reader.read(made.file(name)) for name in ("trunk", "glm"))
    head = {name for name in whole.tensors if name.startswith(f"blk.{whole.head_blocks[0]}.")}
    assert not trunk.head_blocks and trunk.tensors.keys() == whole.tensors.keys() - head


def test_a_vision_tower_gets_its_own_file(made: Made) -> None:
    opened = reader.read(made.file("mmproj"))
    assert opened.architecture == "clip" and opened.get("clip.has_vision_encoder") is True
    assert {info.type.name for info in opened.tensors.values()} == {"F16", "F32"}
    assert not any(name.startswith(("blk.", "token_embd")) for name in opened.tensors)


def test_flash_next_sees_with_its_vision_tower(made: Made, toolchain: Path) -> None:
    target = made.folder / "flash-next.gguf"
    native.convert(made.checkpoint("flash-next"), target, "all", "qwen35")
    asked = Request(checkpoint=made.checkpoint("flash-next"), target=target)
    report = verify(made.file("mmproj-flash-next"), asked, LlamaCpp(toolchain, threads=1))
    assert [check.name for check in report.checks if check.passed] == ["vision"]


def test_a_changed_vision_tower_is_refused(made: Made, tmp_path: Path) -> None:
    """llama-server accepts a tower of zeros, so only the proof sees it."""
    good, checkpoint = reader.read(made.file("mmproj")), Checkpoint(made.checkpoint("vision"))
    proof.prove(good, checkpoint, "mmproj")
    for name, piece in good.ranges.items():
        raw = bytearray(good.path.read_bytes())
        raw[piece.offset] ^= 1
        (tmp_path / "damaged.gguf").write_bytes(raw)
        with pytest.raises(GgufError, match=f"and {re.escape(name)} "):
            proof.prove(reader.read(tmp_path / "damaged.gguf"), checkpoint, "mmproj")


# ── drafting ──


@pytest.mark.parametrize("name", MODELS)
def test_a_quantized_file_is_verified_against_the_unquantized(
    made: Made, toolchain: Path, tmp_path: Path, name: str
) -> None:
    out = tmp_path / "quantized.gguf"
    asked = QuantizeRequest("Q4_0", head_recipe("Q8_0"))
    llama_quantize.quantize(made.file(name), out, asked, LlamaCpp(toolchain, threads=1))
    prompts = ("The quick brown fox", "def area(")
    request = Request(
        reference=made.file(name),
        file_type="Q4_0",
        head="Q8_0",
        prompts=prompts,
        min_acceptance=0.95,
    )
    report = verify(out, request, LlamaCpp(toolchain, threads=1))
    checks = {check.name: check.detail for check in report.checks}
    last = ["loading"] if name in UNDRAFTED else ["drafting", "same text"]
    assert (
        list(checks)
        == [
            "types",
            "inventory",
            "metadata",
            "chat template",
            "finite",
            "norms",
            "values",
            *last,
            "programs",
        ]
        and report.head == "Q8_0"
    )
    if name in UNDRAFTED:
        assert report.drafts is None and "cannot draft" in checks["loading"]
    else:
        assert report.drafts > 100 and report.acceptance > 0.95


@pytest.mark.parametrize("name", ["glm-next", "ling"])
def test_matrices_that_upstream_keeps_in_f32_are_right(
    made: Made, toolchain: Path, name: str
) -> None:
    request = Request(
        reference=made.file(name), file_type="BF16", head="BF16", prompts=("def area(",)
    )
    report = verify(made.file(name), request, LlamaCpp(toolchain, threads=1))
    assert report.types["F32"] > 20 and report.types["BF16"] > 20


def test_the_report_says_if_llama_server_cannot_draft(made: Made, run, tmp_path: Path) -> None:
    done = run(
        "verify.py",
        made.file("exaone"),
        "--reference",
        made.file("exaone"),
        "--out",
        tmp_path / "report.json",
    )
    assert done.returncode == 0, done.stderr
    said = (
        r"\| loading +\| passed +\| \d+ tokens generated from 3 prompts; "
        r"llama\.cpp b11434 loads exaone-moe but cannot"
    )
    assert re.search(said, done.stdout), done.stdout
    assert "drafts" not in json.loads((tmp_path / "report.json").read_text())


def swapped(source: Path, out: Path) -> Path:
    """A copy whose head swaps hidden state and embedding in every block."""
    shutil.copy(source, out)
    opened = reader.read(source)
    with out.open("r+b") as file:
        for block in opened.head_blocks:
            piece = opened.ranges[f"blk.{block}.nextn.eh_proj.weight"]
            file.seek(piece.offset)
            rows = [file.read(4 * HIDDEN) for _ in range(HIDDEN)]  # BF16
            file.seek(piece.offset)
            file.write(b"".join(row[2 * HIDDEN :] + row[: 2 * HIDDEN] for row in rows))
    return out


@pytest.mark.parametrize("name", ["glm", "mimo"])
def test_a_head_with_its_halves_swapped_is_refused(
    made: Made, fails, tmp_path: Path, name: str
) -> None:
    file = swapped(made.file(name), tmp_path / "swapped.gguf")
    message = fails("verify.py", file, "--threads", 1, out=tmp_path / "report.json")
    assert "drafting: 0 of " in message or "the head is dead" in message
    assert "values: blk." in fails(
        "verify.py",
        file,
        "--reference",
        made.file(name),
        "--threads",
        1,
        out=tmp_path / "report.json",
    )


def test_a_reference_of_another_model_is_refused(made: Made, fails, tmp_path: Path) -> None:
    options = ("--reference", made.file("glm-lite"), "--threads", 1)
    assert "inventory: " in fails(
        "verify.py", made.file("glm"), *options, out=tmp_path / "report.json"
    )


def test_the_trunk_drafts_with_a_separate_draft_model(
    made: Made, toolchain: Path, tmp_path: Path
) -> None:
    draft = [
        "--model-draft",
        str(made.file("draft")),
        "--spec-type",
        "draft-mtp",
        "--spec-draft-n-max",
        "1",
    ]
    llama = LlamaCpp(toolchain, threads=1)
    options = ["--ctx-size", "2048", *draft]
    with serve(llama, made.file("trunk"), tmp_path / "log", options) as running:
        answer = running.completion("The quick brown fox", 100)
    assert answer.drafts > 40 and answer.accepted > 0.95 * answer.drafts


def test_a_head_is_injected_into_a_quantized_trunk(
    made: Made, toolchain: Path, tmp_path: Path
) -> None:
    base, out = tmp_path / "trunk-Q4_0.gguf", tmp_path / "injected.gguf"
    llama = LlamaCpp(toolchain, threads=1)
    llama_quantize.quantize(made.file("trunk"), base, QuantizeRequest("Q4_0"), llama)
    options = inject.Options(head_types=head_recipe("Q8_0"))
    inject.inject(base, made.file("draft"), out, options, LlamaCpp(toolchain))
    request = Request(
        head="Q8_0",
        base=base,
        reference=made.file("glm"),
        prompts=("def area(",),
        min_acceptance=0.95,
    )
    report = verify(out, request, LlamaCpp(toolchain, threads=1))
    assert {check.name for check in report.checks} >= {
        "inventory",
        "values",
        "trunk",
        "drafting",
        "same text",
    }


# ── the proof ──


def rewrite(source: Path, out: Path, drop: str = "\0", flip: str = "\0") -> Gguf:
    """A copy without tensors ending in `drop`, with the last bit of those in `flip` changed."""
    opened = reader.read(source)
    writer.write(
        out,
        opened.metadata,
        [(info, [opened.ranges[n]]) for n, info in opened.tensors.items() if not n.endswith(drop)],
    )
    made = reader.read(out)
    with out.open("r+b") as file:
        for name, piece in made.ranges.items():
            if name.endswith(flip) and name.startswith(f"blk.{made.head_blocks[-1]}."):
                file.seek(piece.offset + piece.size - 2)
                byte = file.read(1)[0]
                file.seek(-1, 1)
                file.write(bytes([byte ^ 1]))
    return reader.read(out)


@pytest.mark.parametrize(
    ("name", "ending"),
    [
        ("glm", "nextn.hnorm.weight"),
        ("glm-lite", "attn_k_b.weight"),
        ("step", "nextn.enorm.weight"),
        ("step", "ffn_up_exps.weight"),
        ("nemotron", "attn_k.weight"),
        ("mimo", "attn_sinks.weight"),
        ("mimo-fp8", "attn_qkv.weight"),
        ("mimo-fp8", "attn_output.weight"),
        ("bailing", "exp_probs_b.bias"),
    ],
)
def test_a_lost_or_changed_tensor_of_the_head_is_named(
    made: Made, tmp_path: Path, name: str, ending: str
) -> None:
    checkpoint = Checkpoint(made.checkpoint(name))
    proof.prove(rewrite(made.file(name), tmp_path / "same.gguf"), checkpoint, "all")
    for fault in ({"drop": ending}, {"flip": ending}):
        with pytest.raises(GgufError, match="upstream changed tensors of the head") as caught:
            proof.prove(
                rewrite(made.file(name), tmp_path / "faulty.gguf", **fault), checkpoint, "all"
            )
        assert ("and none of the GGUF" in str(caught.value)) == ("drop" in fault)


def test_f32_values_are_compared_after_rounding(made: Made, tmp_path: Path) -> None:
    """F32 matrices that round to the BF16 values; then one that does not."""
    config, key = (
        json.loads((made.checkpoint("glm") / "config.json").read_text()),
        "model.layers.2.self_attn.q_proj.weight",
    )
    tensors = read_tensors(made.checkpoint("glm"))
    for name, (dtype, array) in tensors.items():
        if dtype == "BF16" and array.ndim > 1 and ".mlp.gate." not in name:
            tensors[name] = ("F32", ((array.astype(np.uint32) << 16) + 0x7000).view(np.float32))
    wide = write_checkpoint(tmp_path / "wide", CHECKPOINTS / "tiny-qwen3.5", config, tensors)
    proof.prove(reader.read(made.file("glm")), Checkpoint(wide), "all")
    tensors[key] = ("F32", (tensors[key][1].view(np.uint32) + 0x2000).view(np.float32))
    other = write_checkpoint(tmp_path / "other", CHECKPOINTS / "tiny-qwen3.5", config, tensors)
    with pytest.raises(GgufError, match=re.escape(key)):
        proof.prove(reader.read(made.file("glm")), Checkpoint(other), "all")


def test_swapped_experts_are_refused(made: Made, tmp_path: Path) -> None:
    shutil.copy(made.file("glm"), tmp_path / "faulty.gguf")
    piece = reader.read(made.file("glm")).ranges["blk.2.ffn_up_exps.weight"]
    raw = bytearray((tmp_path / "faulty.gguf").read_bytes())
    half = piece.size // 2
    body = raw[piece.offset : piece.offset + piece.size]
    raw[piece.offset : piece.offset + piece.size] = body[half:] + body[:half]
    (tmp_path / "faulty.gguf").write_bytes(raw)
    with pytest.raises(GgufError, match=r"mlp\.experts\.0\.up_proj\.weight"):
        proof.prove(
            reader.read(tmp_path / "faulty.gguf"), Checkpoint(made.checkpoint("glm")), "all"
        )


def test_an_undeclared_head_is_refused(made: Made) -> None:
    with pytest.raises(GgufError, match="1 blocks, upstream declares 0"):
        proof.prove(reader.read(made.file("trunk")), Checkpoint(made.checkpoint("glm")), "all")
    with pytest.raises(GgufError, match="in the trunk"):
        proof.prove(reader.read(made.file("glm")), Checkpoint(made.checkpoint("glm")), "trunk")


# ── DeepSeek-V4 ──


@pytest.fixture(scope="module")
def v4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trunk and draft model, and what unmodified upstream makes of the same checkpoint."""
    folder = tmp_path_factory.mktemp("v4")
    checkpoint = write_deepseek4(folder / "checkpoint")
    options = ("--converter", CONVERTER, "--tokenizer-pre", "qwen35")
    jobs: list[list[object]] = []
    for part, only in (("trunk", []), ("draft", ["--mtp"])):
        out = ("--part", part, "--out", folder / f"{part}.gguf", *options)
        jobs.append([sys.executable, SCRIPTS / "convert_upstream.py", checkpoint, *out])
        plain = (*only, SOURCE, checkpoint, folder / f"plain-{part}.gguf")
        jobs.append([PYTHON, "-c", PLAIN, *plain])
    for done in map(call, jobs):
        assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_deepseek4_has_upstreams_bytes(v4: Path) -> None:
    for part in ("trunk", "draft"):
        assert (v4 / f"{part}.gguf").read_bytes() == (v4 / f"plain-{part}.gguf").read_bytes()
    assert list(reader.read(v4 / "draft.gguf").head_blocks) == [3]


def test_deepseek4_drafts_with_its_sidecar(v4: Path, toolchain: Path) -> None:
    request = Request(
        reference=v4 / "draft.gguf",
        target=v4 / "trunk.gguf",
        file_type="MXFP4",
        prompts=("The quick brown fox",),
        min_acceptance=0.95,
    )
    report = verify(v4 / "draft.gguf", request, LlamaCpp(toolchain, threads=1))
    assert report.head == "F32/MXFP4/Q8_0" and report.acceptance > 0.95


@pytest.mark.parametrize(
    "name",
    [
        "blk.3.ffn_down_exps.weight",
        "blk.3.nextn.eh_proj.weight",
        "blk.3.attn_q_b.weight",
        "blk.3.exp_probs_b.bias",
        "output_hc_fn.weight",
    ],
)
def test_a_lost_or_changed_tensor_of_deepseek4_is_named(
    v4: Path, tmp_path: Path, name: str
) -> None:
    checkpoint, good = Checkpoint(v4 / "checkpoint"), reader.read(v4 / "draft.gguf")
    with pytest.raises(GgufError, match="and none of the GGUF"):
        proof.prove(rewrite(good.path, tmp_path / "lost.gguf", drop=name), checkpoint, "draft")
    raw = bytearray(good.path.read_bytes())
    raw[good.ranges[name].offset] ^= 1
    (tmp_path / "changed.gguf").write_bytes(raw)
    with pytest.raises(GgufError, match=f"and {re.escape(name)} "):
        proof.prove(reader.read(tmp_path / "changed.gguf"), checkpoint, "draft")
