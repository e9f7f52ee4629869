"""What jobs used, as Snakemake recorded it, fits what they ask a cluster for."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import MODELS
from mtpforge.rules.build import Build
from mtpforge.rules.config import read_file

# The file of a job's record, and the needs of its rule.
RECORDS = {
    r"convert-(?P<part>\w+)": "convert",
    r"(?P<kind>quantized|trunk)-(?P<name>.+)": "quantize",
    r"inject-(?P<variant>.+)": "inject",
    r"acceptance": "acceptance",
    r"verify-{model}-(?P<variant>.+)": "verify",
    r"reference-logits": "logits",
    r"measure-{model}-(?P<variant>.+)": "measure",
    r"errors-[^-]+-(?P<type>.+)": "errors",
    r"search_logits-.+": "search_logits",
    r"sensitivities-.+-(?P<method>class|tensor)": "sensitivities",
    r"compare-(?P<variant>.+)": "compare",
}


@pytest.mark.parametrize("model", MODELS)
def test_jobs_use_no_more_than_they_ask_for(
    built: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(built)
    needs = Build(read_file(Path("config.yaml"))).needs
    seen = set()
    for record in sorted(Path("benchmarks", model).glob("*.jsonl")):
        rule, wildcards = _job(model, record.stem)
        wanted = needs.asked(getattr(needs, rule))
        job = {"threads": needs.threads(wildcards), "attempt": 1}
        for line in record.read_text().splitlines():
            used = json.loads(line)
            if isinstance(used["max_rss"], float):  # else it ended before it was looked at
                assert used["max_rss"] * 1.048576 <= wanted["mem_mb"](wildcards, **job), record
            assert used["s"] <= 60 * wanted["runtime"](wildcards, **job), record
            seen.add(rule)
    assert seen == set(RECORDS.values())


def test_files_take_no_more_disk_than_was_asked_for(
    built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(built)
    needs = Build(read_file(Path("config.yaml"))).needs
    for model in MODELS:
        files = sorted(Path("results", model).glob("*.gguf"))
        assert len(files) == 6
        for file in files:
            variant = file.stem.removeprefix(f"{model}-")
            job = SimpleNamespace(model=model, variant=variant, kind="quantized", name=variant)
            found = needs.quantize(job) if variant != "BF16" else needs.inject(job)
            assert file.stat().st_size <= found.disk, file


def _job(model: str, stem: str) -> tuple[str, SimpleNamespace]:
    """The rule and the wildcards of the job whose record has this name."""
    for pattern, rule in RECORDS.items():
        if match := re.fullmatch(pattern.replace("{model}", re.escape(model)), stem):
            return rule, SimpleNamespace(model=model, **match.groupdict())
    raise AssertionError(stem)
