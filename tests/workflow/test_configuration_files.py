"""Files of --configfile are held to the same rules as config.yaml."""

import json
from pathlib import Path

import pytest
from repository import Repository


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory, toolchain: Path) -> Repository:
    return Repository(tmp_path_factory.mktemp("clone") / "copy", toolchain)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("twice.yaml", "build: all\nbuild: [tiny-qwen3.5]\n", "duplicate name 'build'"),
        ("twice.json", '{"build": "all", "build": ["tiny-qwen3.5"]}', "duplicate name 'build'"),
        ("code.yaml", "__use_yte__: true\nbuild: all\n", "__use_yte__: templates run code"),
        ("long.yaml", f"# {'x' * (1 << 20)}\nbuild: all\n", "larger than 1 MB"),
    ],
)
def test_a_file_that_config_yaml_may_not_be_is_refused(
    clone: Repository, name: str, content: str, reason: str
) -> None:
    (clone.path / name).write_text(content)
    done = clone.snakemake("--dry-run", "--configfile", name)
    assert done.returncode == 1
    said = done.stdout + done.stderr
    assert f"{name}: " in said and reason in said and "Traceback" not in said


def test_a_file_of_json_with_tabs_is_used(clone: Repository) -> None:
    models = {"tiny-qwen3.5": {"variants": {"Q4_0": {}}}}
    (clone.path / "more.json").write_text(json.dumps({"models": models}, indent="\t"))
    done = clone.snakemake("--dry-run", "--configfile", "more.json")
    assert done.returncode == 0, done.stderr
    assert "recipe of Q4_0" in done.stdout + done.stderr


def test_a_profile_that_is_not_there_is_refused(clone: Repository) -> None:
    done = clone.snakemake("--dry-run", "--workflow-profile", "profiles/leen")
    assert done.returncode == 1 and "no profile 'leen'" in done.stdout + done.stderr
