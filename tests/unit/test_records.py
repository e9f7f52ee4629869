"""Reports, measurements and stamps: one reader and one writer, and malformed files are refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from mtpforge.errors import RecordError
from mtpforge.io.records import Record
from mtpforge.llama_cpp.stamp import Stamp
from mtpforge.measure.measurement import Measurement
from mtpforge.verify.report import Acceptance, Report

REPORT: dict[str, Any] = {
    "file": "x-Q8_0",
    "bytes": 10,
    "sha256": "0" * 64,
    "bits_per_weight": 8.5,
    "head": "BF16",
    "types": {"BF16": 1, "Q8_0": 2},
    "errors": {"output.weight": 0.005},
    "errors_by_type": {"Q8_0": {"tensors": 1, "mean": 0.005, "worst": 0.005, "gate": 0.0105}},
    "trunk": {"tensors": 2, "sha256_before": "1" * 64, "sha256_after": "1" * 64},
    "drafts": 10,
    "accepted": 0,
    "acceptance": 0.0,
    "bf16_acceptance": 0.1,
    "checks": [{"name": "types", "passed": True, "detail": "3 tensors"}],
    "head_source": {"verified": 3},
    "files": [{"name": "x-Q8_0-00001-of-00001.gguf", "bytes": 10, "sha256": "0" * 64}],
}
OPTIONAL = (
    "errors", "errors_by_type", "trunk", "drafts", "accepted", "acceptance", "bf16_acceptance",
    "files",
)  # fmt: skip
RUN = {
    "n_max": 0,
    "p_min": 0.0,
    "kind": "code",
    "form": "raw",
    "state": "cold",
    "repeats": 1,
    "tokens_per_second": [10.5],
    "median": 10.5,
    "spread": [10.5, 10.5],
    "drafts": 0,
    "accepted": 0,
    "acceptance": None,
    "by_position": [],
}
TOTAL = {
    "n_max": 0,
    "p_min": 0.0,
    "repeats": 1,
    "tokens_per_second": 10.5,
    "spread": [10.5, 10.5],
    "cold_tokens_per_second": 10.5,
    "drafts": 0,
    "accepted": 0,
    "acceptance": None,
    "by_position": [],
    "speedup": 1.0,
    "memory_bytes": None,
}
DIVERGENCE = {
    "mean": 0.01,
    "mean_error": 0.001,
    "p99.9": 0.5,
    "maximum": 2.5,
    "same_top": 0.9,
    "same_top_error": 0.02,
}
KIND = {
    "kind": "code",
    "form": "chat",
    "n_max": 2,
    "p_min": 0.75,
    "tokens_per_second": 20.5,
    "without": 10.5,
    "speedup": None,
    "acceptance": 0.9,
}
MEASUREMENT: dict[str, Any] = {
    "file": "x.gguf",
    "bytes": 10,
    "threads": 2,
    "options": ["-fa", "on"],
    "llama.cpp": "0.5.0-dev 0c1e57098",
    "machine": {"processor": "x", "processors": 2, "devices": []},
    "prompts": {"code": "2" * 64},
    "repeats": 1,
    "n_predict": 200,
    "runs": [RUN],
    "by_n_max": [TOTAL],
    "by_kind": [KIND],
    "steady": True,
    "waiting": None,
    "recommended_n_max": 0,
    "recommended_p_min": 0.0,
    "verdict": "no head",
    "memory_bytes": None,
    "perplexity": 4.5,
    "kl_divergence": {"mean": 0.01, "p99.9": 0.5, "same_top": 0.9},
    "text": {"name": "wiki", "sha256": "3" * 64, "chunks": 2},
}
BUILT = {
    "llama.cpp": "0.5.0-dev",
    "commit": "0c1e57098",
    "archive_sha256": "4" * 64,
    "compiler": "GNU 12.2.0",
    "flags": ["-DA=B"],
    "machine": "Linux x86_64",
    "programs": {"llama-server": "5" * 64},
}
LINKED = {
    "llama.cpp": "b1",
    "build": "1",
    "commit": "0c1e57098",
    "compiler": "GNU 12.2.0",
    "programs": {"llama-server": "5" * 64},
}


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        (Report, REPORT),
        (Report, {key: value for key, value in REPORT.items() if key not in OPTIONAL}),
        (Measurement, MEASUREMENT),
        (Measurement, {key: value for key, value in MEASUREMENT.items() if key != "text"}),
        (Measurement, {**MEASUREMENT, "perplexity": None, "kl_divergence": None}),
        (Measurement, {**MEASUREMENT, "kl_divergence": DIVERGENCE}),
        (Acceptance, {"drafts": 10, "accepted": 9, "acceptance": 0.9}),
        (Acceptance, {"skipped": "too large"}),
        (Stamp, BUILT),
        (Stamp, LINKED),
    ],
)
def test_what_is_read_is_written_with_the_same_bytes(
    tmp_path: Path, kind: type[Record], content: dict[str, Any]
) -> None:
    text = json.dumps(content, indent=1) + "\n"
    (tmp_path / "in.json").write_text(text)
    kind.read(tmp_path / "in.json").write(tmp_path / "out.json")
    assert (tmp_path / "out.json").read_text() == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "r.json: Invalid JSON"),
        ("[]", "r.json: Input should be an object"),
        (json.dumps({**REPORT, "bytes": "10"}), "r.json:bytes: Input should be a valid integer"),
        (json.dumps({**REPORT, "bytes": True}), "r.json:bytes: Input should be a valid integer"),
        (json.dumps({**REPORT, "unknown": 1}), "r.json:unknown: "),
        (json.dumps({**REPORT, "checks": [{"name": "x"}]}), "r.json:checks.0.passed: Field requ"),
        (json.dumps({key: REPORT[key] for key in REPORT if key != "file"}), "r.json:file: Field"),
        (b"\xff", "r.json: Invalid JSON"),
    ],
)
def test_a_malformed_file_is_refused(tmp_path: Path, text: str | bytes, message: str) -> None:
    path = tmp_path / "r.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(RecordError, match=r"not a file of verify\.py: delete it") as caught:
        Report.read(path)
    assert message in str(caught.value)


def test_a_file_that_is_missing_is_an_error_of_the_file_system(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Report.read(tmp_path / "none.json")
