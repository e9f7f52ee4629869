"""A sidecar of a model whose BF16 file is too large to run: a quant is run with it instead."""

import json
from pathlib import Path

from repository import Repository

TOO_LITTLE = {"SLURM_MEM_PER_NODE": "4"}
"""MiB; BF16 has 5.3."""


def test_a_sidecar_is_run_with_a_quant_and_never_again(tmp_path: Path, toolchain: Path) -> None:
    copy = Repository(tmp_path / "repository", toolchain)
    model = copy.config["models"]["tiny-qwen3.5"]
    model |= {"sidecar": "Q8_0", "variants": {"Q8_0": {}, "IQ4_XS": {}}}
    copy.write_config()
    done = copy.snakemake(**TOO_LITTLE)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    report = copy.path / "results/tiny-qwen3.5/reports/mtp-tiny-qwen3.5-Q8_0.json"
    found = json.loads(report.read_text())
    checks = {check["name"]: check["detail"] for check in found["checks"]}
    assert checks["model"].startswith("run with tiny-qwen3.5-IQ4_XS.gguf instead of all.gguf: ")
    assert found["acceptance"] > 0.8 and "BF16 was not run" in checks["acceptance"]
    assert copy.pending() == {}  # on this machine, which has more memory
    model["variants"]["IQ4_XS"]["head"] = "Q6_K"
    copy.write_config()
    pending = copy.pending()
    assert pending["verify"] == 1 and "verify_sidecar" not in pending
