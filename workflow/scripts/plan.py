"""Forecast a build, before any weights are fetched: what runs, bytes, disk, memory and time.

Sizes are exact to 64 bytes, with two exceptions: those of llama.cpp's converter are about right
until it has run, and a variant whose types are searched is at most as large as said. Times come
from a calibration of this machine, which is kept in ~/.cache/mtpforge, and from the last run of
each job here; they assume an idle machine.

example: plan.py
         plan.py qwen3.5-4b --json
"""

import sys

sys.path.insert(0, __file__.rpartition("/")[0])  # PYTHONSAFEPATH leaves it out

import json
import shutil
import signal
from argparse import Namespace
from contextlib import suppress
from dataclasses import asdict, replace
from functools import reduce
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

from huggingface_hub import constants
from mtpforge import cli, table
from mtpforge.convert import chat_templates
from mtpforge.errors import ConfigError, ForgeError, ToolchainError
from mtpforge.forecast import costs, planned_ggufs
from mtpforge.forecast.calibration import calibrated, network_rate
from mtpforge.forecast.downloads import Downloads
from mtpforge.forecast.reruns import Reruns, asking
from mtpforge.forecast.steps import ModelForecast, ShardByShardForecast
from mtpforge.llama_cpp import memory, programs
from mtpforge.llama_cpp.programs import LlamaCpp
from mtpforge.llama_cpp.toolchain import cache_root, cached
from mtpforge.rules import entry_files, lean
from mtpforge.rules.build import Build
from mtpforge.rules.config import SHARDS, Config, Model, read_file

REQUIREMENT = Path("envs/llama.cpp.txt")
LEAN: dict[str, Literal[True, "shards"]] = {"lean": True, "shards": SHARDS}
_LESS_MEMORY = (
    "take smaller types, a published importance matrix instead of a text's, or a larger machine, as"
    " of a cluster (docs/cluster.md): see docs/sizing.md#memory"
)
_WIDTH = 24
"""Characters of the name of a step, with which its table has 100 columns."""
_PATIENCE = 30
"""Seconds for the first line of `make`, which must not wait for a network that is down."""


def main() -> None:
    """Parse the command line and print the forecast."""
    parser = cli.parser(__doc__)
    parser.add_argument(
        "models", nargs="*", metavar="MODEL", help="models in config.yaml (default: `build`)"
    )
    parser.add_argument(
        "--config", type=Path, action="append", metavar="FILE",
        help="default: config.yaml; can be given again: a later file wins",
    )  # fmt: skip
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument("--totals", action="store_true", help="print only the totals")
    parser.add_argument(
        "--lean", nargs="?", const="lean", choices=LEAN,
        help="forecast a build with profiles/lean (`lean: true`) or profiles/shards "
        "(`lean: shards`)",
    )  # fmt: skip
    parser.add_argument(
        "--machines", type=int, default=1, metavar="N",
        help="how many machines like this one share a quantization, as on a cluster (default: 1)",
    )  # fmt: skip
    parser.add_argument(
        "--published", action="store_true", help="only models that `make publish` uploads"
    )
    programs.add_options(parser)
    args = parser.parse_args()
    if args.totals:
        signal.signal(signal.SIGALRM, _give_up)
        signal.alarm(_PATIENCE)
    paths = args.config or [_own_config()]
    build = _build(paths)
    llama = _programs(args, build)
    build.config.lean = LEAN[args.lean] if args.lean else build.config.lean
    chosen = _chosen(paths[0], args.models, build)
    if args.published:
        chosen = [model for model in chosen if model.publish]
    plan = Plan(paths, build.config, chosen, llama, args.machines)
    if args.json:
        models = {each.model.key: _as_json(each, plan.fetches) for each in plan.forecasts}
        totals = plan.totals()
        about = {**totals, "notes": plan.notes, "warnings": warnings(totals), "models": models}
        print(json.dumps(about, indent=1))
        return
    if not args.totals:
        for each in plan.forecasts:
            print(as_table(each, plan.fetches[each.model.key], plan.network))
    print(*plan.notes, in_words(plan.totals()), sep="\n")


def _own_config() -> Path:
    path = Path("config.yaml")
    if not path.exists():
        raise ConfigError(
            f"{Path.cwd()} has no {path}: run it in mtpforge's folder, or give --config FILE"
        )
    return path


class Fetch(NamedTuple):
    """Bytes that a model fetches, that are there, that stay before its steps, and on the disk then.

    The last are those of all files of the run.
    """

    left: int
    there: int
    kept: int
    disk: int


class Plan:
    """The forecasts of these models, what they fetch, and what is not known. Raises ForgeError."""

    def __init__(
        self,
        paths: list[Path],
        config: Config,
        models: list[Model],
        llama: LlamaCpp,
        machines: int = 1,
    ) -> None:
        self.notes: list[str] = []
        self.frees_nothing = lean.why_not_here()
        if self.frees_nothing and config.is_lean:
            self.notes.append(f"note: nothing is freed on the way: {self.frees_nothing}")
            config = config.model_copy(update={"lean": False})
        self.config = config
        self.llama = llama
        self.reruns: Reruns = {}
        self.downloads = Downloads()
        cache = cache_root().parent / "calibration.json"
        self.machine = replace(calibrated(Path(), cache, llama), nodes=machines)
        with asking(paths, [model.key for model in models]) as answer:
            self.forecasts = [self._forecast(model, config) for model in models]
            try:
                self.reruns = answer()
            except ConfigError as error:
                self.notes.append(f"note: results that are there count as current: {error}")
        for each in self.forecasts:
            self.notes += lean.notes(config, each.model)
            each.settle(self.reruns)
        self.fetches = self._follow()
        for each in self.forecasts:
            if each.passing:
                more = table.size(each.passing)
                self.notes.append(
                    f"note: {each.model.key}: `make publish` deletes each file once it is "
                    f"uploaded; with `make` alone, {more} more are on the disk"
                )
        self.network = network_rate(cache, constants.ENDPOINT, self.downloads.rate)

    def _follow(self) -> dict[str, "Fetch"]:
        """Follow the disk from model to model; returns what each of them fetches."""
        found = {}
        disk = self.downloads.there + sum(each.there for each in self.forecasts)
        for number, each in enumerate(self.forecasts):
            models = [other.model.key for other in self.forecasts[: number + 1]]
            left, there, stays = self.downloads.of(models, self.reruns)
            frees = lean.freed(self.config, each.model) if self.config.is_lean else None
            _, shards = each.by_shards(frees.part) if frees else (0, 0)
            later = min(shards, stays)
            disk += stays - later
            found[each.model.key] = Fetch(left, there, stays - later, disk)
            disk = each.follow(disk, frees.part if frees else "", later)
        return found

    def _forecast(self, model: Model, config: Config) -> ModelForecast:
        try:
            outline = self.downloads.outline(model)
            self.downloads.free(model.compare)
            if model.chat_template:
                outline.chat_template = chat_templates.given(model.chat_template)
            is_by_shards = lean.by_shards(config, model)
            kind = ShardByShardForecast if is_by_shards else ModelForecast
            return kind(
                model,
                outline,
                self.llama,
                machine=self.machine,
                given_size=self.downloads.file_size,
                drafter=self.downloads.drafter(model),
            )
        except ForgeError as error:
            raise type(error)(f"{model.key}: {error}") from None

    def totals(self) -> dict[str, Any]:
        """The totals of the build in bytes and seconds, beside what this machine has.

        `fetch_seconds` is None if the speed of the network is not known. `compile_seconds` is what
        llama.cpp takes to build; 0 if it is built.
        """
        given = self.config.toolchain.llama_cpp
        is_built = planned_ggufs.is_exact(self.llama) or given.bin_dir
        fetch = self.downloads.fetch(self.reruns)
        free = shutil.disk_usage(".").free
        peak, freed = self._peak(self.config, self.forecasts)
        steps = [step for each in self.forecasts for step in each.steps]
        left = [step for step in steps if not step.done]
        largest = max(left, key=lambda step: step.memory, default=None)
        needed = largest.memory if largest else 0
        return {
            "steps": len(steps),
            "to_run": len(left),
            "fetch": fetch,
            "fetched": self.downloads.total - fetch,
            "disk": sum(each.kept for each in self.forecasts)
            + fetch
            - self.downloads.freed(self.reruns)
            - freed,
            "peak": peak,
            "free": free,
            "smaller": self._smaller(peak, free) if peak > free else {},
            "frees_nothing": self.frees_nothing,
            "needs_memory": needed,
            "largest_step": largest.path if largest else "",
            "memory": self._memory(needed),
            "seconds": round(sum(each.seconds for each in self.forecasts)),
            "fetch_seconds": round(fetch / self.network) if self.network else None,
            "compile_seconds": 0 if is_built else costs.compiling(self.machine, given.cuda),
            "servers": sum(each.servers for each in self.forecasts),
        }

    def _peak(self, config: Config, forecasts: list[ModelForecast]) -> tuple[int, int]:
        """The most bytes that a build takes on the disk, and those that it frees of shards."""
        kept = sum(each.kept for each in forecasts)
        scratch = max((each.scratch for each in forecasts), default=0)
        fetch = self.downloads.fetch(self.reruns)
        pairs = [(each, lean.freed(config, each.model)) for each in forecasts if config.is_lean]
        freeing = [(each, frees.part) for each, frees in pairs if frees]
        found = [(*each.freed(part), *each.by_shards(part)) for each, part in freeing]
        freed = sum(freed for freed, *_ in found)
        if not freed:
            return kept + scratch + fetch, 0
        shards = sum(shards for *_, shards in found)
        converting = max(max(before, by_shards) for _, before, by_shards, _ in found)
        peak = max(kept + scratch + fetch - freed, fetch - min(shards, fetch) + converting)
        return peak, freed

    def _smaller(self, peak: int, free: int) -> dict[str, int]:
        """The peak with each profile that takes less than `peak`, up to the first that fits."""
        found: dict[str, int] = {}
        if self.frees_nothing:
            return found
        for name, kind in LEAN.items():
            config = self.config.model_copy(update={"lean": kind})
            forecasts = [self._forecast(each.model, config) for each in self.forecasts]
            for each in forecasts:
                each.settle(self.reruns)
            least, _ = self._peak(config, forecasts)
            if least < peak:
                found[name] = least
            if least <= free:
                break
        return found

    def _memory(self, needed: int) -> int:
        """Bytes of memory for a step that needs so many: GPUs count if it has to be."""
        with suppress(ToolchainError):  # before the programs are built, GPUs are not known
            return memory.room(needed, self.machine.memory, self.llama)
        return self.machine.memory


def as_table(forecast: ModelForecast, fetch: Fetch, network: float = 0) -> str:
    """A model's files, and its steps that will run. `network` is bytes a second; 0: not known."""
    files = [("file", "size", "head", "pieces")]
    for file in forecast.files:
        head = table.size(file.head) if file.head else "none"
        size = f"about {table.size(file.bytes)}" if file.about else table.size(file.bytes)
        files.append((file.name, size, head, str(file.pieces)))
    steps = [("step", "adds", "disk after", "memory", "time", "why")]
    if fetch.left:
        spent = table.duration(fetch.left / network) if network else "?"
        steps.append(("fetch", _size(fetch.kept), _size(fetch.disk), "", spent, "missing"))
    left = [step for step in forecast.steps if not step.done]
    for step in left:
        kept, disk, needed = map(_size, (step.kept, step.disk, step.memory))
        name = step.name.removeprefix(f"{forecast.model.base_name}-")
        name = _shortened(f"{step.stage.replace('_', ' ')} {name}")
        steps.append((name, kept, disk, needed, table.duration(step.seconds), step.why or ""))
    first = f"{forecast.model.key}: {_fetching(fetch)}; {_starts(forecast.servers)}"
    done = len(forecast.steps) - len(left)
    last = table.markdown(steps) if steps[1:] else ""
    last += f"{done} of {len(forecast.steps)} steps are done\n" * bool(done)
    return f"{first}\n\n{table.markdown(files)}\n{last}"


def _shortened(name: str) -> str:
    """A name without its middle, if it would make the table too wide."""
    return name if len(name) <= _WIDTH else f"{name[: _WIDTH // 2]}…{name[1 - _WIDTH // 2 :]}"


def _fetching(fetch: Fetch) -> str:
    if not (fetch.left or fetch.there):
        return "nothing to fetch"
    return f"fetch {table.size(fetch.left)}, {table.size(fetch.there)} are there"


def _starts(servers: int) -> str:
    return f"llama-server starts {servers} times" if servers != 1 else "llama-server starts once"


def in_words(about: dict[str, Any]) -> str:
    """The totals, and a warning about each that this machine lacks."""
    fetching = f" {table.size(about['fetch']) if about['fetch'] else 'nothing'}"
    if about["fetch"] and about["fetch_seconds"] is not None:
        fetching += f" (about {table.duration(about['fetch_seconds'])})"
    compiling = ""
    if about["compile_seconds"]:
        more = table.duration(about["compile_seconds"])
        compiling = (
            f"; building llama.cpp takes about {more} more, and sizes are estimates until then"
        )
    disk, peak, free = (table.size(about[name]) for name in ("disk", "peak", "free"))
    first = (
        f"to do: {about['to_run']} of {about['steps']} long jobs: fetch{fetching}, then about "
        f"{table.duration(about['seconds'])} on an idle machine; adds {disk} to the disk, at most "
        f"{peak} while it runs, {free} are free{compiling}"
    )
    return "\n".join([first, *warnings(about)])


def warnings(about: dict[str, Any]) -> list[str]:
    """What this machine lacks, and how to do without it."""
    lines = []
    if about["peak"] > about["free"]:
        lines.append(f"warning: too little disk: {_advice(about)}")
    if about["needs_memory"] > about["memory"]:
        lines.append(
            f"warning: a step needs {table.size(about['needs_memory'])} of memory and there are "
            f"{table.size(about['memory'])} ({about['largest_step']}): {_LESS_MEMORY}"
        )
    return lines


def _give_up(*_: object) -> NoReturn:
    print(f"no forecast within {_PATIENCE} s: `make plan` says if the disk is too small")
    sys.exit()


def _build(paths: list[Path]) -> Build:
    """The build of configuration files and the entries beside the first. Raises ConfigError."""
    first, *others = map(read_file, paths)
    given: dict[str, Any] = reduce(entry_files.merged, others, {})
    config, folder = entry_files.merged(first, given), paths[0].parent / entry_files.FOLDER
    try:
        entry_files.add_entries(config, given, folder)
        return Build(config)
    except ConfigError as error:
        raise entry_files.located(error, folder) from None


def _advice(about: dict[str, Any]) -> str:
    """How to build with less disk."""
    for name, peak in about["smaller"].items():
        if peak <= about["free"]:
            return (
                f"`make PROFILE={name}`, or `--workflow-profile profiles/{name}`, takes "
                f"{table.size(peak)} at its peak: see docs/sizing.md#disk"
            )
    free = (
        "free the checkpoints and intermediates of other models "
        "(`.venv/bin/snakemake --delete-temp-output all`), or build fewer variants at a time"
    )
    if reason := about["frees_nothing"]:
        return f"profiles/lean and profiles/shards need as much, because {reason}: {free}"
    if not about["smaller"]:
        return free
    name, peak = min(about["smaller"].items(), key=lambda each: each[1])
    return f"even `make PROFILE={name}` takes {table.size(peak)} at its peak: {free}"


def _programs(args: Namespace, build: Build) -> LlamaCpp:
    """The programs that the build will use, from where they are before it links them."""
    llama = programs.from_options(args)
    if args.bin != programs.DEFAULT_FOLDER or planned_ggufs.is_exact(llama):
        return llama
    given = build.config.toolchain.llama_cpp
    with suppress(ToolchainError):  # no compiler, which the build will say
        entry = None if given.bin_dir else cached(REQUIREMENT, given.cuda)
        folder = entry / "bin" if entry else Path(given.bin_dir or args.bin).expanduser()
        return replace(llama, folder=folder)
    return llama


def _chosen(path: Path, names: list[str], build: Build) -> list[Model]:
    if unknown := [name for name in names if name not in build.config.models]:
        known = ", ".join(build.config.models)
        raise ConfigError(f"{path}: there is no model {unknown[0]!r}: models has {known}")
    return [build.config.models[name] for name in names] or build.config.chosen


def _size(count: int) -> str:
    return table.size(count) if count else ""


def _as_json(forecast: ModelForecast, fetches: dict[str, Fetch]) -> dict[str, Any]:
    fetch = fetches[forecast.model.key]
    return {
        "fetch": fetch.left,
        "there": fetch.there,
        "servers": forecast.servers,
        "files": [asdict(file) for file in forecast.files],
        "steps": [{**asdict(step), "done": step.done} for step in forecast.steps],
    }


if __name__ == "__main__":
    cli.run(main)
