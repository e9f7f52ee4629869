"""Forecast a build: bytes to fetch, sizes, disk, memory and time, before any weights are fetched.

Sizes are exact to a few bytes. Times come from a calibration of this machine, which is kept in
~/.cache/mtpforge, and from the last run of each job here; they assume an idle machine.

example: plan.py
         plan.py qwen3.5-4b --json
"""

import sys

sys.path.insert(0, __file__.rpartition("/")[0])  # PYTHONSAFEPATH leaves it out

import json
import shutil
import signal
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mtpforge import cli, prompts, table
from mtpforge.errors import ConfigError, ForgeError
from mtpforge.forecast import files
from mtpforge.forecast.downloads import Downloads
from mtpforge.forecast.machine import Machine, calibrated
from mtpforge.forecast.steps import ModelForecast
from mtpforge.llama_cpp import programs
from mtpforge.llama_cpp.programs import LlamaCpp
from mtpforge.llama_cpp.toolchain import cache_root
from mtpforge.rules.build import Build
from mtpforge.rules.config import Model, read_file

_PATIENCE = 30
"""Seconds for the first line of `make`, which must not wait for a network that is down."""


def main() -> None:
    """Parse the command line and print the forecast."""
    parser = cli.parser(__doc__)
    parser.add_argument(
        "models", nargs="*", metavar="MODEL", help="models in config.yaml (default: `build`)"
    )
    parser.add_argument(
        "--config", type=Path, default=Path("config.yaml"), help="default: %(default)s"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument("--totals", action="store_true", help="print only the last line")
    programs.add_options(parser)
    args = parser.parse_args()
    if args.totals:
        signal.alarm(_PATIENCE)
    llama = programs.from_options(args)
    machine = calibrated(Path(), cache_root().parent / "calibration.json", llama.processors)
    downloads = Downloads()
    forecasts = [
        forecast(model, downloads, llama=llama, machine=machine)
        for model in _chosen(args.config, args.models)
    ]
    about = summary(forecasts, downloads, machine)
    if args.json:
        models = {each.model.key: _as_json(each) for each in forecasts}
        print(json.dumps({**about, "models": models}, indent=1))
        return
    if not args.totals:
        print(*map(as_table, forecasts), sep="\n")
    print(in_words(about, exact=files.is_exact(llama)))


def forecast(
    model: Model, downloads: Downloads, llama: LlamaCpp, machine: Machine
) -> ModelForecast:
    """The forecast of a model. Raises ForgeError, naming the model."""
    try:
        if not model.native:
            raise ConfigError("only models of mtpforge's own converter can be forecast")
        return ModelForecast(
            model,
            downloads.outline(model),
            llama,
            machine=machine,
            prompts=len(prompts.read_prompts(Path(model.prompts))),
            base_size=downloads.file_size,
        )
    except ForgeError as error:
        raise type(error)(f"{model.key}: {error}") from None


def summary(
    forecasts: list[ModelForecast], downloads: Downloads, machine: Machine
) -> dict[str, int]:
    """The totals of a build in bytes and seconds, beside what this machine has."""
    kept = 0
    peak = 0
    for each in forecasts:
        peak = max(peak, kept + each.peak)
        kept += each.kept
    fetch = downloads.total - downloads.present
    return {
        "fetch": fetch,
        "fetched": downloads.present,
        "disk": kept + fetch,
        "peak": peak + fetch,
        "free": shutil.disk_usage(".").free,
        "needs_memory": max((each.memory for each in forecasts), default=0),
        "memory": machine.memory,
        "seconds": round(sum(each.seconds for each in forecasts)),
        "servers": sum(each.servers for each in forecasts),
    }


def as_table(forecast: ModelForecast) -> str:
    """A model's files, and its steps."""
    files = [("file", "size", "head", "pieces")]
    for file in forecast.files:
        head = table.size(file.head) if file.head else "none"
        files.append((file.name, table.size(file.bytes), head, str(file.pieces)))
    steps = [("step", "disk", "memory", "time")]
    for step in forecast.steps:
        spent = "done" if step.done else table.duration(step.seconds)
        shown = table.size(step.kept) if step.kept else ""
        steps.append((f"{step.stage} {step.name}", shown, table.size(step.memory), spent))
    return f"{forecast.model.key}\n\n{table.markdown(files)}\n{table.markdown(steps)}"


def in_words(about: dict[str, int], exact: bool = True) -> str:
    """The totals, and a warning about each that this machine lacks."""
    lines = [
        f"to do: fetch {table.size(about['fetch'])}, disk {table.size(about['disk'])} (peak "
        f"{table.size(about['peak'])} of {table.size(about['free'])} free), about "
        f"{table.duration(about['seconds'])} besides fetching, {about['servers']} server starts"
        + ("" if exact else "; sizes are estimates until llama.cpp is built")
    ]
    if about["peak"] > about["free"]:
        lines.append(
            "warning: too little disk: free the checkpoints and intermediates of other models "
            "(`snakemake --delete-temp-output all`), or build fewer variants at a time"
        )
    if about["needs_memory"] > about["memory"]:
        lines.append(
            f"warning: a step needs {table.size(about['needs_memory'])} of memory and there are "
            f"{table.size(about['memory'])}: see docs/sizing.md#memory"
        )
    return "\n".join(lines)


def _chosen(path: Path, names: list[str]) -> list[Model]:
    build = Build(read_file(path))
    if unknown := [name for name in names if name not in build.config.models]:
        known = ", ".join(build.config.models)
        raise ConfigError(f"{path}: there is no model {unknown[0]!r}: models has {known}")
    return [build.config.models[name] for name in names] or build.config.chosen


def _as_json(forecast: ModelForecast) -> dict[str, Any]:
    return {
        "files": [asdict(file) for file in forecast.files],
        "steps": [{**asdict(step), "done": step.done} for step in forecast.steps],
    }


if __name__ == "__main__":
    cli.run(main)
