"""Each documented target of make runs with only what it installs: the packages of its locks.

An environment of its own has links to those packages, and to no others that the tests have.
"""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import Distribution, distributions, packages_distributions
from pathlib import Path

import pytest
from conftest import ROOT
from environments import packages
from mtpforge.llama_cpp.compilation import read_pin
from packaging.utils import canonicalize_name

MAKEFILE = (ROOT / "Makefile").read_text()
INSTALLS = {"setup": "run", "setup-test": "test", "cluster": "cluster", "s3": "s3"}
PROGRAMS = ("python", "snakemake", "pytest", "ruff", "snakefmt", "mypy")
OPTIONAL = {"boto3": "s3", "botocore": "s3", "snakemake_executor_plugin_slurm": "cluster"}
"""What another target installs; without it a message says so."""
BY_CONVERTER = {"torch", "transformers", "conversion"}
"""In the environment of llama.cpp's converter, which runs these programs."""


def rules() -> dict[str, tuple[list[str], list[str]]]:
    """Target -> what it needs first, and its lines."""
    found: dict[str, tuple[list[str], list[str]]] = {}
    for head, body in re.findall(r"^([a-z0-9-]+):(.*\n(?:\t.*\n)*)", MAKEFILE, re.MULTILINE):
        needs, *lines = body.splitlines()
        found[head] = (needs.partition("##")[0].split(), lines)
    return found


RULES = rules()
TARGETS = re.findall(r"^([a-z0-9-]+):.*##", MAKEFILE, re.MULTILINE)


def locks(target: str) -> set[str]:
    """The locks that are installed once a target runs."""
    needs, lines = RULES[target]
    own = {INSTALLS[target]} if target in INSTALLS else set()
    called = set(re.findall(r"\$\(call install,[^,]+,([\w-]+)", "\n".join(lines)))
    return own.union(called, *(locks(need) for need in needs))


def programs(target: str) -> list[list[str]]:
    """The commands that a target runs in the environment."""
    text = "\n".join(RULES[target][1]).replace("\\\n", " ")
    commands = re.findall(r"\$\(ACTIVE\) ([^&|;\n]+)", text)
    found = [re.search(rf"\b({'|'.join(PROGRAMS)}) .*|\bmypy$", line) for line in commands]
    assert all(found), commands
    return [match[0].replace('"', "").split() for match in found if match]


def allowed(*names: str) -> set[str]:
    return set().union(*(packages(ROOT / f"envs/{name}.txt") for name in names))


# ── an environment with only these ──


def call(bin: Path, *command: str, cwd: Path = ROOT) -> str:
    """Run a program of the environment."""
    kept = {name: os.environ[name] for name in ("HOME", "LANG") if name in os.environ}
    done = subprocess.run(
        [str(bin / command[0]), *command[1:]], cwd=cwd, capture_output=True, text=True, timeout=200,
        env={**kept, "PATH": f"{bin}:/usr/bin:/bin", "PYTHONPATH": "workflow/scripts"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def test_the_environment_has_only_the_lock(of_run: Path) -> None:
    said = call(
        of_run, "python", "-c",
        "import numpy, importlib.util as util; print(util.find_spec('pytest'), numpy.__file__)",
    )  # fmt: skip
    assert said.startswith("None ") and str(of_run.parent) in said


# ── what the targets run ──


def test_a_file_of_a_target_s_name_does_not_stop_it() -> None:
    phony = re.search(r"^\.PHONY:((?:.*\\\n)*.*)$", MAKEFILE, re.MULTILINE)
    assert phony and set(phony[1].replace("\\\n", " ").split()) == set(RULES)


def test_every_documented_target_is_read() -> None:
    assert set(TARGETS) <= set(RULES) and len(TARGETS) > 25
    assert locks("all") == {"run"} and locks("lint") == {"run", "test"}
    assert locks("s3") == {"run", "s3"} and locks("clean") == set()
    assert ["snakemake", "--cores", "$(CORES)", "plots", "$(CHOSEN)"] in programs("report")
    assert any("workflow/scripts/add.py" in words for words in programs("quant"))


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_has_the_programs_that_it_runs(target: str) -> None:
    owned = allowed(*locks(target))
    for program, *words in programs(target):
        if program == "python":
            assert (ROOT / words[0]).is_file()
            continue
        owners = [each for each in distributions() if program in scripts_of(each)]
        assert {canonicalize_name(each.metadata["Name"]) for each in owners} & owned, program


def scripts_of(package: Distribution) -> set[str]:
    return {each.name for each in package.entry_points} | {
        file.name for file in package.files or () if file.parent.name == "bin"
    }


def test_programs_of_make_can_be_imported_with_what_make_installs(of_run: Path) -> None:
    given = [words[1] for target in TARGETS for words in programs(target) if words[0] == "python"
             and locks(target) == {"run"} and "tests/golden" not in words[1]]  # fmt: skip
    scripts = [str(path.relative_to(ROOT)) for path in (ROOT / "workflow/scripts").glob("*.py")]
    importing = (
        "import importlib, importlib.util, pkgutil, sys\n"
        "for number, path in enumerate(sys.argv[1:]):\n"
        "    sys.path.insert(0, path.rpartition('/')[0])\n"
        "    found = importlib.util.spec_from_file_location(f'program{number}', path)\n"
        "    found.loader.exec_module(importlib.util.module_from_spec(found))\n"
        "import mtpforge\n"
        "for each in pkgutil.walk_packages(mtpforge.__path__, 'mtpforge.'):\n"
        "    importlib.import_module(each.name)\n"
        "print('all of them')\n"
    )
    chosen = sorted({*given, *scripts} - {"workflow/scripts/run_upstream.py"})
    assert {"workflow/scripts/plan.py", "docs/generate.py", "tests/older.py"} <= set(chosen)
    assert "all of them" in call(of_run, "python", "-c", importing, *chosen)


def test_a_build_is_forecast_before_it_fetches() -> None:
    assert RULES["all"][1][0].strip() == "@$(FORECAST)"
    of_publish = RULES["publish"][1][0].strip()
    assert of_publish == "@$(subst --totals,--totals --published,$(FORECAST))"
    for target in ("all", "publish"):  # and only once
        assert RULES[target][1][1].strip().startswith("@$(ACTIVE) MTPFORGE_FORECAST=told snakemake")


@pytest.mark.parametrize(("folder", "lock"), [
    ("workflow", "run"), ("docs", "run"), ("bench", "run"), ("tests", "test")
])  # fmt: skip
def test_no_function_imports_what_the_lock_lacks(folder: str, lock: str) -> None:
    owned = allowed("run", lock)
    owners = packages_distributions()
    local = {path.stem for path in ROOT.rglob("*.py")} | {"mtpforge"}
    for path in (ROOT / folder).rglob("*.py"):
        for name in imported(path) - local - set(sys.stdlib_module_names) - BY_CONVERTER:
            if name in OPTIONAL and lock == "run":
                continue
            needed = {canonicalize_name(owner) for owner in owners.get(name, ())}
            assert needed & owned, f"{path.relative_to(ROOT)} imports {name}"


def imported(path: Path) -> set[str]:
    """First parts of all modules that a file imports, in functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {each.name.partition(".")[0] for each in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            names.add(node.module.partition(".")[0])
    return names


@pytest.mark.parametrize(
    ("line", "config"),
    [
        ("all", 'build=["a","b"]'),
        ("report", 'build=["a","b"]'),
        ("publish", 'build=["a","b"]'),
        ("publish DRY_RUN=1", 'dry_run=true build=["a","b"]'),
    ],
)
def test_a_target_may_be_for_some_models_only(line: str, config: str) -> None:
    command = ["make", "-n", "-o", "setup", *line.split(), "CORES=1"]
    command.append("MODELS=a b")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    runs = map(shlex.split, done.stdout.replace("\\\n", "").splitlines())
    given = [" ".join(run).partition(" --config ")[2] for run in runs if "snakemake" in run]
    assert given and set(given) == {config}


def test_help_lists_what_users_need_before_what_developers_do() -> None:
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    users, developers = done.stdout.split("To develop mtpforge:\n")
    listed = [re.findall(r"^make (\S+)", part, re.MULTILINE) for part in (users, developers)]
    assert sorted([*listed[0], *listed[1]]) == sorted(TARGETS)
    assert {"all", "quant", "publish", "s3", "check-results", "help"} <= set(listed[0])
    assert {"lint", "test", "golden", "bench", "lock", "setup-test"} <= set(listed[1])
    assert "the same" not in done.stdout and "BASE=OWNER/NAME:Q4_K_M or FILE.gguf" in users


# ── light ones, really run ──


def test_a_report_is_written_with_what_make_installs(of_run: Path, tmp_path: Path) -> None:
    """By a small workflow with `make report`'s own line."""
    (line,) = [words for words in programs("report") if "--reporter" in words]
    for name in ("report", "scripts", "templates"):
        shutil.copytree(ROOT / "workflow" / name, tmp_path / "workflow" / name)
    (tmp_path / "results").mkdir()
    (tmp_path / "results/summary.md").write_text("| file |\n| ---- |\n| x    |\n")
    (tmp_path / "Snakefile").write_text(
        'report: "workflow/report/workflow.rst"\n'
        'rule plots:\n    input: "a.svg"\n'
        'rule draw:\n    output: report("a.svg", category="x")\n'
        '    shell: "echo \'<svg xmlns=\\"http://www.w3.org/2000/svg\\"/>\' > {output}"\n'
    )
    call(of_run, "snakemake", "--cores", "1", "plots", cwd=tmp_path)
    call(of_run, *(word for word in line if word != "$(CHOSEN)"), cwd=tmp_path)
    assert (tmp_path / "report.html").stat().st_size > 1000


@pytest.mark.parametrize("target", ["help", "clean-work", "check-results"])
def test_light_targets_run(target: str, of_run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("Makefile", "workflow", "envs"):
        (copy / name).symlink_to(ROOT / name)
    (copy / ".venv").symlink_to(of_run.parent)
    digest = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    (copy / "made").mkdir()
    (copy / "made/README.md").touch()
    (copy / "made/SHA256SUMS").write_text(f"{digest}  README.md\n")
    command = ["make", "-o", "setup", target, "FOLDER=made"]
    kept = {**os.environ, "PYTHONPATH": ""}
    done = subprocess.run(
        command, cwd=copy, capture_output=True, text=True, timeout=100, env=kept
    )  # fmt: skip
    said = done.stdout + done.stderr
    expected = {"help": "make report", "clean-work": "nothing was deleted",
                "check-results": "lists no GGUF"}  # fmt: skip
    assert expected[target] in said and "ModuleNotFoundError" not in said


def test_a_compiler_is_asked_for_only_if_llama_cpp_must_be_built(tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("make", "sh", "grep", "sed"):
        (tools / name).symlink_to(str(shutil.which(name)))
    for name in ("Makefile", "envs", "config.yaml"):
        (tmp_path / name).symlink_to(ROOT / name)

    def make() -> int:
        places = {"PATH": str(tools), "MTPFORGE_CACHE": str(tmp_path / "cache")}
        command = ["make", "compiler", "CORES=1"]
        return subprocess.run(command, cwd=tmp_path, env=places, capture_output=True).returncode

    assert make() == 2
    stamp = tmp_path / "cache/llama.cpp/0/stamp.json"
    stamp.parent.mkdir(parents=True)
    pin = read_pin(ROOT / "envs/llama.cpp.txt")
    for sha256, code in (("0" * 64, 2), (pin.sha256, 0)):
        stamp.write_text(f'{{"archive_sha256": "{sha256}"}}\n')
        assert make() == code
