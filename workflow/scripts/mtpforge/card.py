"""The model card of a folder of results: what its reports and measurements say, as a README with front matter for the Hub.

No figure is here that is not in one of these files. What a checkpoint says of itself is data: it is checked, and escaped.
"""

import html
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard import metadata_load

from . import runtimes, upstream
from .checkpoint import TEXT_LIMIT
from .errors import VerificationError
from .gguf_file import Gguf
from .quantize import head_blocks
from .table import markdown, size
from .verify import VISION

HUB = "https://huggingface.co"
NO_REPOSITORY = "OWNER/NAME-MTP-GGUF"
TAGS = ("gguf", "mtp", "speculative-decoding")
_TEXT = re.compile(r"[^\x00-\x1f\x7f]{1,200}")

Json = Mapping[str, Any]


@dataclass(frozen=True)
class Result:
    """A published file, or the folder of a split one: its report, its measurements if there are, and the GGUF (the first)."""

    report: Json
    measured: Json | None
    opened: Gguf

    @property
    def name(self) -> str:
        """As it lies in the repository."""
        return str(self.report["file"])

    @property
    def parts(self) -> list[str]:
        """The files of a split one, as they lie in the repository; else the file."""
        return [f"{self.name}/{file['name']}" for file in self.report.get("files", ())] or [self.name]

    @property
    def drafts(self) -> bool:
        """Whether it is a model that llama.cpp drafts with, alone."""
        return self.is_model and bool(head_blocks(self.opened)) and upstream.undrafted(self.opened) is None

    @property
    def is_model(self) -> bool:
        """Not a sidecar, and not a vision tower."""
        return self.opened.architecture != VISION and not self.name.startswith("mtp-")

    @property
    def n_max(self) -> int | None:
        """How many tokens to draft ahead: what measurement recommends (0: none), None where nothing was measured."""
        return None if self.measured is None else int(self.measured["recommended_n_max"])

    def measured_at(self, n_max: int) -> Json:
        """What was measured with so many tokens drafted ahead; empty where that was not."""
        return next((entry for entry in (self.measured or {}).get("by_n_max", ()) if entry["n_max"] == n_max), {})


def make(about: Json, results: Sequence[Result], checkpoint_card: Path, stamp: Json, template: Path) -> str:
    """The card. `about` is the model's part of the configuration, `stamp` that of the toolchain. Raises VerificationError."""
    theirs = read_front_matter(checkpoint_card)
    data = front_matter(about, theirs)
    title = about["publish"]["repo"].split("/")[1] if "publish" in about else f"{about['name']}-MTP-GGUF"
    undrafted = {upstream.undrafted(result.opened) for result in results if result.is_model and head_blocks(result.opened)}
    measured = [result for result in results if result.measured]
    card = ModelCard.from_template(
        data,
        template_path=str(template),
        title=escape(title),
        origin=_origin(about),
        proven=any(result.drafts for result in results),
        undrafted=" ".join(escape(why) for why in sorted(filter(None, undrafted))),
        files=table(FILES, results).rstrip(),
        split="\n".join(f"- {code(part)}" for result in results for part in result.parts if len(result.parts) > 1),
        measured=bool(measured),
        machines=" ".join(sorted({_machine(result.measured or {}) for result in measured})),
        inputs=_inputs(measured),
        verdicts="\n".join(f"- {code(r.name)}: {escape(verdict)}." for r in measured if (verdict := _measured(r, "verdict"))),
        sweeps=[(code(result.name), sweep(result.measured).rstrip()) for result in measured if result.measured],
        runtime=_runtime(results),
        serving=_serving(results, about),
        checkpoint=_source(about),
        toolchain=escape(" ".join(str(stamp[key]) for key in ("llama.cpp", "build", "commit") if stamp.get(key, "0") != "0")),
        recipe=yaml.safe_dump(_said({"variants": about["variants"]}), sort_keys=False, allow_unicode=True).rstrip(),
    )  # fmt: skip
    text = re.sub(r"\n{3,}", "\n\n", str(card)).rstrip() + "\n"
    if yaml.safe_load(ModelCard(text).data.to_yaml()) != yaml.safe_load(data.to_yaml()):
        raise VerificationError(f"{title}: the card's front matter does not read back as it was written")
    return text


# ── front matter ──


def read_front_matter(path: Path) -> dict[str, Any]:
    """What a checkpoint's own card says of itself, as far as it has the form that the Hub asks for; empty where there is none.

    Not its library_name: that library does not load a GGUF. The Hub shows how to use one by its files, without any.
    """
    try:
        found = metadata_load(path) if path.is_file() and path.stat().st_size <= TEXT_LIMIT else None
    except (ValueError, yaml.YAMLError, RecursionError):  # somebody else's affair
        found = None
    known: dict[str, Any] = {}
    for key, value in (found or {}).items():
        if key in ("license", "license_name", "license_link", "pipeline_tag") and _is_text(value):
            known[key] = value
        elif key in ("tags", "language"):
            known[key] = [item for item in (value if isinstance(value, list) else [value]) if _is_text(item)]
    return known


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and _TEXT.fullmatch(value) is not None


def front_matter(about: Json, theirs: Json) -> ModelCardData:
    """For the Hub: the model that this is a quantization of, and what that says of itself."""
    source, data = about["source"], {key: value for key, value in theirs.items() if value}
    if "repo" in source:
        data |= {"base_model": [source["repo"]], "base_model_relation": "quantized"}
    if (link := _address(source, str(data.pop("license_link", "")))) is not None:
        data["license_link"] = link
    if "publish" in about:
        data["quantized_by"] = about["publish"]["repo"].split("/")[0]
    data["tags"] = list(dict.fromkeys([*data.get("tags", ()), *TAGS]))
    return ModelCardData(**data)


def _address(source: Json, link: str) -> str | None:
    """The full address of a link on the checkpoint's card, where a name alone is a file beside it; None where it has none."""
    try:
        if link and "repo" in source:
            link = urljoin(f"{HUB}/{source['repo']}/blob/{source['revision']}/", link)
        return link if urlsplit(link).scheme in ("https", "http") else None
    except ValueError:  # somebody else's affair
        return None


# ── tables ──

Column = tuple[str, Callable[[Any], str | None]]
"""Its heading, and a row's cell: None where nothing is known."""


def table(columns: Sequence[Column], rows: Sequence[Any]) -> str:
    """A Markdown table without the columns of which no row knows anything."""
    cells = [(heading, [cell(row) for row in rows]) for heading, cell in columns]
    known = [(heading, column) for heading, column in cells if any(cell is not None for cell in column)]
    lines = [tuple(column[i] or "-" for _, column in known) for i in range(len(rows))]
    return markdown([tuple(heading for heading, _ in known), *lines])


def _number(value: Any, form: str) -> str | None:
    """None where nothing is known; what rounds to zero has no sign."""
    return None if value is None else format(value, f"z{form}")


def _acceptance(entry: Json) -> str | None:
    return _number(entry.get("acceptance"), ".1%")


def _measured(result: Result, key: str) -> Any:
    return (result.measured or {}).get(key)


def _divergence(key: str, form: str) -> Callable[[Result], str | None]:
    return lambda result: _number((_measured(result, "kl_divergence") or {}).get(key), form)


FILES: tuple[Column, ...] = (
    ("file", lambda r: code(r.name).replace("|", r"\|")),
    ("size", lambda r: size(r.report["bytes"])),
    ("bits/weight", lambda r: _number(r.report["bits_per_weight"], ".2f")),
    ("head", lambda r: escape(r.report["head"]) or None),
    ("acceptance", lambda r: _acceptance(r.report)),
    ("tok/s", lambda r: _number(r.measured_at(r.n_max or 0).get("tokens_per_second"), ".1f")),
    ("drafted ahead", lambda r: None if r.n_max is None else str(r.n_max or "off")),
    ("tok/s without drafting", lambda r: _number(r.measured_at(0).get("tokens_per_second"), ".1f")),
    ("memory", lambda r: None if _measured(r, "memory_bytes") is None else size(_measured(r, "memory_bytes"))),
    ("perplexity", lambda r: _number(_measured(r, "perplexity"), ".4f")),
    ("KL divergence", _divergence("mean", ".5f")),
    ("99.9%", _divergence("p99.9", ".4f")),
    ("same first choice", _divergence("same_top", ".1%")),
)


def sweep(measured: Json) -> str:
    """Of one file, a line for each number of tokens drafted ahead: speed, warm and cold, and what was accepted."""
    runs = measured.get("runs", ())
    kinds = sorted({run["kind"] for run in runs})

    def of(entry: Json, state: str, kind: str | None = None) -> list[Json]:
        wanted = (entry["n_max"], state)
        return [run for run in runs if (run["n_max"], run["state"]) == wanted and kind in (None, run["kind"])]

    def accepted(found: list[Json]) -> str | None:
        drafts = sum(run["drafts"] for run in found)
        return f"{sum(run['accepted'] for run in found) / drafts:.1%}" if drafts else None

    def of_kind(kind: str) -> Column:
        return escape(kind), lambda entry: accepted(of(entry, "warm", kind))

    columns: list[Column] = [
        ("drafted ahead", lambda entry: str(entry["n_max"] or "off")),
        ("tok/s", lambda entry: f"{entry['tokens_per_second']:.1f}"),
        ("from-to", lambda entry: "-".join(f"{speed:.1f}" for speed in entry["spread"])),
        ("cold", lambda entry: _number(entry.get("cold_tokens_per_second"), ".1f")),
        ("x without", lambda entry: _number(entry.get("speedup"), ".2f")),
        ("accepted", _acceptance),
        ("cold, accepted", lambda entry: accepted(of(entry, "cold"))),
        ("by position", lambda entry: " ".join(f"{share:.0%}" for share in entry.get("by_position") or ()) or None),
        *map(of_kind, kinds),
    ]
    return table(columns, measured["by_n_max"])


def _machine(measured: Json) -> str:
    machine = measured.get("machine", {})
    devices = [*machine.get("devices", ())]
    where = ", ".join(escape(str(part)) for part in (machine.get("processor"), *devices) if part)
    options = f", {code(shlex.join(measured['options']))}" if measured.get("options") else ""
    version, threads = escape(str(measured.get("llama.cpp", "unknown"))), measured.get("threads")
    return f"Measured with llama.cpp {version}, threads: {threads}{options}" + (f", on {where}" if where else "") + "."


def _inputs(measured: Sequence[Result]) -> str:
    """On what was measured, as far as the measurements say it: older ones do not."""
    texts, prompts = set(), set()
    what = "Perplexity and KL divergence" if any(_measured(result, "kl_divergence") for result in measured) else "Perplexity"
    for result in measured:
        if text := _measured(result, "text"):
            where = f"{code(text['name'])} (sha256 {code(text['sha256'])}, at most {text['chunks']} chunks of 512 tokens)"
            texts.add(f"{what} on {where}.")
        if kinds := _measured(result, "prompts"):
            repeats = _measured(result, "repeats")
            each = f", {repeats} warm request{'s' * (repeats != 1)} each" if repeats else ""
            prompts.add(f"Speed on prompts of the kinds {escape(', '.join(sorted(kinds)))}{each}.")
    return " ".join([*sorted(texts), *sorted(prompts)])


# ── serving ──


def _origin(about: Json) -> str:
    source = about["source"]
    return f"[{escape(source['repo'])}]({HUB}/{source['repo']})" if "repo" in source else escape(about["name"])


def _said(entry: Json) -> dict[str, Any]:
    """A part of the configuration without what is not asked for."""
    return {key: _said(value) if isinstance(value, Mapping) else value for key, value in entry.items() if value is not False}


def _source(about: Json) -> str:
    source = about["source"]
    return f"{_origin(about)}, commit {code(source['revision'])}" if "repo" in source else f"a local folder, {code(source['path'])}"


def _runtime(results: Sequence[Result]) -> str:
    """Since when llama.cpp drafts with these files."""
    architecture = next((result.opened.architecture for result in results if result.drafts), None)
    if architecture is None:
        return ""
    first = runtimes.LLAMA_CPP.get(architecture)
    since = f"llama.cpp drafts with {code(architecture)} from {first} on" if first else "Not every llama.cpp drafts with it"
    return f"{since}; builds {runtimes.BROKEN} fail when they draft. LM Studio drafts from {runtimes.LM_STUDIO} on."


def resolve(tag: str, names: Sequence[str]) -> str | None:
    """The file of a repository's `names` that `-hf repo:TAG` takes in llama.cpp 0c1e57098; None where it takes none."""
    for name in sorted(names):
        shard = re.search(r"-(\d{5})-of-\d{5}\.gguf$", name)
        is_model = name.endswith(".gguf") and not re.search("mmproj|imatrix|(mtp|eagle3|dflash|dspark)-", name.rpartition("/")[2])
        if is_model and re.search(f"{tag}[.-]", name, re.IGNORECASE) and (shard is None or int(shard[1]) == 1):
            return name
    return None


def best(results: Sequence[Result]) -> Result | None:
    """The file to begin with: of the models that draft, or else of all, the first quantized one, or else the first."""
    models = [result for result in results if result.is_model]
    found = [result for result in models if result.drafts] or models
    return next(iter([*(result for result in found if result.report["bits_per_weight"] < 16), *found]), None)


def _serving(results: Sequence[Result], about: Json) -> str:
    """How to serve the file to begin with, with each runtime, and how to use a sidecar."""
    result, models = best(results), [each for each in results if each.is_model]
    if result is None:
        return "There is no model here, only what goes beside one."
    repo = about.get("publish", {}).get("repo", NO_REPOSITORY)
    names = [part for each in results for part in each.parts]
    tags = {each.name: _tag(each, about["name"], names) for each in models}
    tag, options = tags[result.name], _options(result)
    sidecars = [each for each in results if not each.is_model and each.opened.architecture != VISION]
    text = [_why(result), ""]
    if sidecars:
        towers = [("--mmproj", each) for each in results if each.opened.architecture == VISION]
        text += _from_here(repo, result, towers, options)
        text += [f"Not by `-hf` or `lemonade pull`: both draft with {code(sidecars[0].name)} in place of the head in the file."]
        change = "name in both commands"
    else:
        where = [f"{repo}:{tag}"] if tag else [repo, "--hf-file", result.parts[0]]
        text += shell(["llama-server", "-hf", *where, *options])
        change = "tag" if all(tags.values()) else "model to `-hf REPOSITORY --hf-file FILE`"
    text += _another(models, change)
    for sidecar in sidecars:
        text += _sidecar(sidecar, models, repo)
    if tag and not sidecars:
        arguments = ["--llamacpp-args", shlex.join(options)] if options else []
        text += ["Lemonade, where MODEL is the name that `lemonade list` then shows:", ""]
        text += shell(["lemonade", "pull", f"{repo}:{tag}"], ["lemonade", "run", "MODEL", *arguments])
    if tag:
        text += ["LM Studio:", "", *shell(["lms", "get", f"{HUB}/{repo}@{tag}"])]
    else:
        text += ["No tag names this file alone: give Lemonade and LM Studio the file itself.", ""]
    return "\n".join([*text, *_ollama(result, models, repo, tags)])


def _tag(result: Result, name: str, names: Sequence[str]) -> str | None:
    """The variant's name, where `-hf repo:TAG` takes its file for it; None where it takes another."""
    tag = result.name.removesuffix(".gguf").removeprefix(f"{name}-")
    return tag if re.fullmatch(r"[A-Za-z0-9_.-]+", tag) and resolve(tag, names) == result.parts[0] else None


def _from_here(repo: str, model: Result | None, beside: Sequence[tuple[str, Result]], options: Sequence[str]) -> list[str]:
    """Downloading a model, or one of the reader's own, with each (option, file) that goes beside it, and serving that."""
    files = [*(model.parts if model else ()), *(part for _, file in beside for part in file.parts)]
    given = [word for option, file in beside for word in (option, file.parts[0])]
    serve = ["llama-server", "-m", model.parts[0] if model else "MODEL", *given, *options]
    return shell(["hf", "download", repo, *files, "--local-dir", "."], serve)


def _options(result: Result, sidecar: Result | None = None) -> list[str]:
    """The options of llama-server with which it was measured, and those to draft with, if it should: as far ahead as was fastest.

    Else, and with a sidecar, of which no speed is measured, as far ahead as in the verification of the file with the head.
    """
    measured, n_max = list((result.measured or {}).get("options", ())), None if sidecar else result.n_max
    if n_max == 0 or not (sidecar or result.drafts):
        return measured
    return [*measured, "--spec-type", "draft-mtp", "--spec-draft-n-max", str(n_max or len(head_blocks((sidecar or result).opened)))]


def _why(result: Result) -> str:
    server = f"llama-server, with {code(result.name)}"
    if not result.drafts:
        return f"{server}, which does not draft:"
    if result.n_max is None:
        return f"{server}, drafting as far ahead as in its verification, since no speed was measured:"
    if result.n_max == 0:
        return f"{server}. Drafting is off, because it was not faster where this was measured:"
    return f"{server}, drafting as far ahead as was fastest here:"


def _another(models: Sequence[Result], change: str) -> list[str]:
    """What changes with the file, where there are several."""
    text = f"For another file, change the {change}"
    if len({tuple(_options(model)) for model in models}) > 1:
        measured = any(model.measured for model in models)
        ahead, off = ("the table says", "it says off") if measured else ("here", "a file has no head")
        text += f", and draft as far ahead as {ahead}: `--spec-type draft-mtp --spec-draft-n-max N`, or neither where {off}"
    return ["", f"{text}.", ""] if len(models) > 1 else [""]


def _sidecar(sidecar: Result, models: Sequence[Result], repo: str) -> list[str]:
    """How to use the head as a draft model: beside a model that has none, or else a reader's own."""
    model = best([model for model in models if not head_blocks(model.opened)])
    which = f"{code(model.name)}, which has none" if model else "a GGUF of this model that has none, as MODEL"
    text = f"The sidecar {code(sidecar.name)} is the head as a draft model of its own. It is for {which}:"
    return [text, "", *_from_here(repo, model, [("-md", sidecar)], _options(model or sidecar, sidecar))]


def _ollama(result: Result, models: Sequence[Result], repo: str, tags: Mapping[str, str | None]) -> list[str]:
    """With the file itself, or else the first without a head; without a command where it would fail."""
    refused = head_blocks(result.opened) and result.opened.architecture in runtimes.OLLAMA_WITHOUT
    for each in [*([] if refused else [result]), *(model for model in models if not head_blocks(model.opened))]:
        if len(each.parts) == 1 and (tag := tags[each.name]):
            return ["Ollama, which does not draft with the head:", "", *shell(["ollama", "run", f"hf.co/{repo}:{tag}"])]
    if len(result.parts) > 1:
        return ["Ollama does not load a model in several files."]
    if refused:
        return ["Ollama 0.24.0 does not load a file of this architecture that has a head (its issue 16282)."]
    return ["Give Ollama the file itself too."]


def shell(*commands: Sequence[str]) -> list[str]:
    """Commands in a block of their own."""
    return ["```", *map(shlex.join, commands), "```", ""]


def escape(text: str) -> str:
    """Text as Markdown shows it, also in a table: nothing in it is markup."""
    return re.sub(r"([\\`*\[\]|~$]|\b_\B|\B_\b)", r"\\\1", html.escape(" ".join(text.split()), quote=False))


def code(text: str) -> str:
    """Text between backticks, of which it has none itself."""
    return f"`{' '.join(text.split()).replace('`', '')}`"
