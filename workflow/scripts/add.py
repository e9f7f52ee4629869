"""Write the entry of a model, pinned to the current commit, into config.d, and build it if asked.

The entry names the converter that the checkpoint needs. A checkpoint that cannot be converted is
refused, before any weights are downloaded. Without --write or --build it is only printed.

example: add.py Qwen/Qwen3.5-4B
         add.py Qwen/Qwen3.5-4B --preset publisher --publish YOU/Qwen3.5-4B-MTP-GGUF --write
         add.py Qwen/Qwen3.5-4B --preset publisher --types Q6_K Q4_K_M IQ4_XS --measure --write
         add.py Qwen/Qwen3.5-4B --type IQ4_XS --build
         add.py Qwen/Qwen3.5-4B --base OWNER/NAME:FILE.gguf --build
"""

import sys

sys.path.insert(0, __file__.rpartition("/")[0])  # PYTHONSAFEPATH leaves it out

import json
import os
import re
import subprocess
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from huggingface_hub import get_token
from mtpforge import cli, run_owner, table
from mtpforge.entries import address, files, presets, proposal
from mtpforge.entries.address import Address
from mtpforge.entries.presets import PRESETS, Variants
from mtpforge.entries.proposal import Entry, Source
from mtpforge.errors import ConfigError, ForgeError
from mtpforge.llama_cpp.toolchain import cached
from mtpforge.rules import entry_files, layout, profiles
from mtpforge.rules.build import Build
from mtpforge.rules.config import Config, read_file
from mtpforge.rules.fields import DEFAULT

CONFIG = Path("config.yaml")
PROGRAMS = Path("resources/toolchain/stamp.json")
REQUIREMENT = Path("envs/llama.cpp.txt")


def main() -> None:
    """Parse the command line; print, write or build."""
    args = _arguments()
    if (args.write or args.build) and not REQUIREMENT.exists():
        raise ConfigError(f"{REQUIREMENT}: no such file here: run it in mtpforge's folder")
    if args.write or args.build:
        profiles.check(args.profile)
    given = address.checkpoint(args.source)
    entry = _entry(args, given)
    if not (args.write or args.build):
        print(files.as_text(entry), end="")
        return
    entry.key = _free_key(entry, args.model)
    if pinned := _pinned_before(entry, given):
        entry = replace(_entry(args, pinned), key=entry.key)
    with files.written(entry) as path:
        config = _check()
        _announce(entry, path)
        plan, first = _forecast(entry.key, args.profile), _first(config)
        if built := args.build and not (plan["to_run"] or plan["fetch"] or first):
            outputs = layout.outputs(config.models[entry.key])
            print("already built:", ", ".join(output.file for output in outputs))
        else:
            lines = [*_in_lines(plan, first), *_upload(entry), *_matrix(entry)]
            print(*lines, sep="\n", flush=True)
        if args.dry_run:
            print("dry run: nothing was built or written")
            raise SystemExit(0)
        if args.write:
            print(f"wrote {path}")
            print(f"next   {_next(entry, args.profile)}")
            return
        _ask(args.yes or built)
        _build(entry.key, args.profile, args.cores)


def _upload(entry: Entry) -> list[str]:
    """Where the files will be uploaded, who can see them there, and how to log in if necessary."""
    if "publish" not in entry.settings:
        return []
    log_in = "" if get_token() else "; first log in: `.venv/bin/hf auth login`, or set HF_TOKEN"
    repo = entry.settings["publish"]["repo"]
    return [f"upload {repo}; if it is new, it is private until you make it public{log_in}"]


def _matrix(entry: Entry) -> list[str]:
    """Which types are made without an importance matrix that would help them."""
    found = ", ".join(presets.without_matrix(entry.variants))
    note = f"note: no importance matrix for {found}: IMATRIX=default computes one"
    return [note] if found else []


def _next(entry: Entry, profile: str) -> str:
    """What to do with a written entry."""
    make = "make" if profile == "default" else f"make PROFILE={profile}"
    forecast = f"`{make} plan MODELS={entry.key}` forecasts it in full"
    if "publish" not in entry.settings:
        return f"{forecast}; `{make} MODELS={entry.key}` builds it"
    return f"{forecast}; `{make} publish DRY_RUN=1` builds it and lists the upload"


def _build(key: str, profile: str, cores: str) -> NoReturn:
    """Become the run of Snakemake that builds a model."""
    sys.stdout.flush()
    os.environ[run_owner.TOLD] = "told"
    command = [sys.executable, "-m", "snakemake", "--workflow-profile", f"profiles/{profile}"]
    command += ["--cores", cores, "all", "--config", f"build={json.dumps([key])}"]
    os.execv(sys.executable, command)  # noqa: S606 - a list, never a shell string


def _arguments() -> Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument(
        "source", metavar="SOURCE",
        help="checkpoint: OWNER/NAME, OWNER/NAME@TAG, a Hub URL, or a local folder",
    )  # fmt: skip
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--preset", metavar="NAME", default="basic",
        help=f"{', '.join(PRESETS)}; default: %(default)s",
    )  # fmt: skip
    parser.add_argument(
        "--types", nargs="+", metavar="TYPE", help="these types instead of the preset's"
    )
    what.add_argument("--type", help="make this type only, such as IQ4_XS")
    what.add_argument(
        "--base", metavar="GGUF",
        help="inject the head into this GGUF: FILE.gguf, OWNER/NAME:FILE.gguf, OWNER/NAME:TYPE, or"
        " a Hub URL",
    )  # fmt: skip
    parser.add_argument(
        "--replace-head", action="store_true", help="the base of --base may have a head already"
    )
    parser.add_argument("--head", metavar="TYPE", help="type of the head (default: Q8_0)")
    parser.add_argument(
        "--imatrix", metavar="TEXT",
        help="text for the importance matrix (`default`: an embedded one), or a ready matrix "
        "(*.gguf, *.dat); if left out: the embedded text, where a matrix is needed",
    )  # fmt: skip
    parser.add_argument(
        "--measure", action="store_true",
        help="measure speed and acceptance, and KL divergence unless there is no BF16 file",
    )  # fmt: skip
    parser.add_argument("--publish", metavar="OWNER/NAME", help="repository to upload it to")
    parser.add_argument("--tokenizer-pre", metavar="NAME", help="as in config.yaml")
    parser.add_argument(
        "--model", metavar="KEY", type=proposal.plain_key,
        help="key of the model (default: its name, or that of the repository to upload it to)",
    )  # fmt: skip
    then = parser.add_mutually_exclusive_group()
    then.add_argument("--write", action="store_true", help="write config.d/KEY.yaml")
    then.add_argument("--build", action="store_true", help="write it, ask, and build the model")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    parser.add_argument("--dry-run", action="store_true", help="only show the forecast")
    parser.add_argument(
        "--profile", default="default", metavar="NAME",
        help="forecast and build with profiles/NAME: lean and shards are for small disks",
    )  # fmt: skip
    parser.add_argument(
        "--cores",
        type=_cores,
        default="all",
        metavar="N",
        help="for --build (default: %(default)s)",
    )
    return parser.parse_args()


def _cores(text: str) -> str:
    if not re.fullmatch("[1-9][0-9]*|all", text):
        raise ConfigError(f"{text[:100]!r} is not a number of cores: set CORES to one, or to all")
    return text


def _entry(args: Namespace, given: Address | Path) -> Entry:
    """The entry of a source that is asked for. Raises ForgeError."""
    source = Source(given)
    options: dict[str, Any] = {}
    if args.tokenizer_pre:
        options["tokenizer_pre"] = args.tokenizer_pre
    if args.measure:
        options["measure"] = {} if args.base or source.packed else {"text": DEFAULT}
    if args.publish:
        options["publish"] = {"repo": address.repository(args.publish).repo}
    entry = source.entry(_variants(args, source), options)
    if args.base:
        entry.key += "-injected"  # beside quantized variants the whole checkpoint would be fetched
        entry.about = "The base, with the head of the source; nothing else is fetched"
    if args.publish:  # an entry of its own: all its variants are uploaded
        entry.key = proposal.plain_key(options["publish"]["repo"].partition("/")[2])
    return entry


def _variants(args: Namespace, source: Source) -> Variants:
    if args.types and (args.type or args.base or source.packed):
        raise ConfigError("TYPES is for `make add` of a checkpoint that is not packed")
    if args.base:
        label, base = proposal.base(address.gguf(args.base))
        variants: Variants = {label: {"base": base}}
        if args.replace_head:
            variants[label]["replace_head"] = True
        else:
            proposal.refuse_head(base)
    elif args.type and source.packed and args.type.upper() != "NVFP4":
        raise ConfigError(f"{source.label}: is packed as NVFP4, and stays so: set TYPE=NVFP4")
    elif args.type:
        variants = presets.single(args.type, args.imatrix)
    elif source.packed:
        variants = {"NVFP4": {}}
    else:
        variants = presets.preset(args.preset, args.imatrix, args.types)
    if args.head:
        head = "none" if args.head.lower() == "none" else args.head.upper()
        variants = {name: {**each, "head": head} for name, each in variants.items()}
    return variants


def _free_key(entry: Entry, wanted: str | None = None) -> str:
    """The key of the entry: with the owner's name if another model has it. Raises ConfigError."""
    taken = (read_file(CONFIG) if CONFIG.exists() else {}).get("models") or {}
    if wanted:
        if wanted in taken:
            raise ConfigError(f"{CONFIG} has a model {wanted} already: choose another MODEL")
        return wanted
    owner = str(entry.settings["source"].get("repo", "local")).partition("/")[0].lower()
    for key in (entry.key, f"{owner}-{entry.key}"):
        if key not in taken and not _is_another(key, entry):
            return key
    raise ConfigError(f"there is another model {entry.key}: choose a name, with MODEL=NAME")


def _is_another(key: str, entry: Entry) -> bool:
    """Whether the file of the key has a model from another source."""
    path = files.path_of(key)
    has = entry_files.read_entry(path) if path.exists() else None
    source = has.get("source") if isinstance(has, dict) else None
    sources = [source, entry.settings["source"]]
    names = [each.get("repo", each.get("path")) for each in sources if isinstance(each, dict)]
    return has is not None and names[:1] != names[1:]


def _pinned_before(entry: Entry, given: Address | Path) -> Address | None:
    """The source at the commit that the file of the entry is pinned to, if it is another.

    Raises ConfigError if a tag or commit was asked for that is not this one.
    """
    path = files.path_of(entry.key)
    if isinstance(given, Path) or not path.exists() or _is_another(entry.key, entry):
        return None
    there, ours = files.commit(path), entry.settings["source"]["revision"]
    if there in (None, ours):
        return None
    if given.revision:
        raise ConfigError(
            f"{path}: is pinned to {there}, and {given.repo}@{given.revision} is {ours}: build it "
            "under another name, with MODEL=NAME, or change `revision` there"
        )
    return replace(given, revision=there)


def _check() -> Config:
    """The whole configuration with the new entry. Raises ConfigError."""
    config = read_file(CONFIG) if CONFIG.exists() else {}
    try:
        entry_files.add_entries(config, {})
        return Build(config).config
    except ConfigError as error:
        raise entry_files.located(error) from None


def _announce(entry: Entry, path: Path) -> None:
    """Print what will be made, of what."""
    names = ", ".join(entry.variants)
    source = entry.settings["source"]
    about = f"{source['repo']} at {source['revision'][:7]}" if "repo" in source else source["path"]
    bases = [each["base"] for each in entry.variants.values() if "base" in each]
    if bases:
        base = f"{names} of {bases[0]['repo']}" if "repo" in bases[0] else bases[0]["path"]
        print(f"head of {about} into {base} ({path})")
    else:
        print(f"{names} of {about} ({path})")
    if others := entry_files.read_entry(path)["variants"].keys() - entry.variants.keys():
        count = f"{len(others)} other variant{'s' * (len(others) != 1)}"
        print(f"keeps  {count} of {path}: delete there what you do not want")
    print("forecasting ...", file=sys.stderr)


def _forecast(key: str, profile: str) -> dict[str, Any]:
    """The totals of `plan.py`. Raises ForgeError with its message."""
    program = Path(__file__).with_name("plan.py")
    command = [sys.executable, str(program), key, "--json"]
    command += ["--lean", profile] if profile in ("lean", "shards") else []
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        reason = "".join(done.stderr.strip().splitlines()[-1:]).removeprefix("error: ")
        raise ForgeError(f"no forecast: {reason}")
    plan: dict[str, Any] = json.loads(done.stdout)
    return plan


def _first(config: Config) -> str:
    """The compilation of llama.cpp, if it comes first."""
    given = config.toolchain.llama_cpp
    there = PROGRAMS.exists() or given.bin_dir or cached(REQUIREMENT, given.cuda)
    return "" if there else ", after llama.cpp is built (some 5 minutes)"


def _in_lines(plan: dict[str, Any], first: str) -> list[str]:
    """Fetch, disk and time, then notes and warnings."""
    fetch, disk, peak, free = (table.size(plan[key]) for key in ("fetch", "disk", "peak", "free"))
    fetch = fetch if plan["fetch"] else "nothing"
    if plan["fetch"] and plan["fetch_seconds"] is not None:
        fetch += f", about {table.duration(plan['fetch_seconds'])}"
    more = f", at most {peak} while it runs" if peak != disk else ""
    return [
        f"fetch  {fetch}",
        f"disk   {disk}{more}; {free} are free",
        f"time   about {table.duration(plan['seconds'])} on an idle machine{first}",
        *plan["notes"],
        *plan["warnings"],
    ]


def _ask(yes: bool) -> None:
    """Return if it is yes. Raises SystemExit if it is no, ConfigError without a terminal."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise ConfigError("there is no terminal to ask on, so nothing is built: set YES=1")
    print("Build it? [Y/n] ", end="", flush=True)
    answer = sys.stdin.readline()  # empty after Ctrl-D
    if not answer or answer.strip().lower() not in ("", "y", "yes"):
        print("not built: config.d is as it was")
        raise SystemExit(0)


if __name__ == "__main__":
    cli.run(main)
