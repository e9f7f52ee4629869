"""The model card of a folder of results: what its reports and measurements say, as a README with front matter for the Hub.

No figure is here that is not in one of these files. What a checkpoint says of itself is data: it is checked, and escaped.
"""

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard import metadata_load

from mtpforge.errors import VerificationError
from mtpforge.io.text import TEXT_LIMIT
from mtpforge.llama_cpp import architectures
from mtpforge.publish.result import HUB, Json, Result, code, escape
from mtpforge.publish.serving import runtime, serving
from mtpforge.table import markdown, size

TAGS = ("gguf", "mtp", "speculative-decoding")
_TEXT = re.compile(r"[^\x00-\x1f\x7f]{1,200}")


def make(
    about: Json, results: Sequence[Result], checkpoint_card: Path, stamp: Json, template: Path
) -> str:
    """The card. `about` is the model's part of the configuration, `stamp` that of the toolchain. Raises VerificationError."""
    theirs = read_front_matter(checkpoint_card)
    data = front_matter(about, theirs)
    title = (
        about["publish"]["repo"].split("/")[1]
        if "publish" in about
        else f"{about['name']}-MTP-GGUF"
    )
    undrafted = {
        architectures.why_not_drafting(result.opened)
        for result in results
        if result.is_model and result.opened.head_blocks
    }
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
        runtime=runtime(results),
        serving=serving(results, about),
        checkpoint=_source(about),
        toolchain=escape(" ".join(str(stamp[key]) for key in ("llama.cpp", "build", "commit") if stamp.get(key, "0") != "0")),
        recipe=yaml.safe_dump(_said({"variants": about["variants"]}), sort_keys=False, allow_unicode=True).rstrip(),
    )  # fmt: skip
    text = re.sub(r"\n{3,}", "\n\n", str(card)).rstrip() + "\n"
    if yaml.safe_load(ModelCard(text).data.to_yaml()) != yaml.safe_load(data.to_yaml()):
        raise VerificationError(
            f"{title}: the card's front matter does not read back as it was written"
        )
    return text


# ── front matter ──


def read_front_matter(path: Path) -> dict[str, Any]:
    """What a checkpoint's own card says of itself, as far as it has the form that the Hub asks for; empty where there is none.

    Not its library_name: that library does not load a GGUF. The Hub shows how to use one by its files, without any.
    """
    try:
        found = (
            metadata_load(path) if path.is_file() and path.stat().st_size <= TEXT_LIMIT else None
        )
    except (ValueError, yaml.YAMLError, RecursionError):  # somebody else's affair
        found = None
    known: dict[str, Any] = {}
    for key, value in (found or {}).items():
        if key in ("license", "license_name", "license_link", "pipeline_tag") and _is_text(value):
            known[key] = value
        elif key in ("tags", "language"):
            known[key] = [
                item for item in (value if isinstance(value, list) else [value]) if _is_text(item)
            ]
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
    known = [
        (heading, column) for heading, column in cells if any(cell is not None for cell in column)
    ]
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
    (
        "memory",
        lambda r: (
            None if _measured(r, "memory_bytes") is None else size(_measured(r, "memory_bytes"))
        ),
    ),
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
        return [
            run
            for run in runs
            if (run["n_max"], run["state"]) == wanted and kind in (None, run["kind"])
        ]

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
        (
            "by position",
            lambda entry: (
                " ".join(f"{share:.0%}" for share in entry.get("by_position") or ()) or None
            ),
        ),
        *map(of_kind, kinds),
    ]
    return table(columns, measured["by_n_max"])


def _machine(measured: Json) -> str:
    machine = measured.get("machine", {})
    devices = [*machine.get("devices", ())]
    where = ", ".join(escape(str(part)) for part in (machine.get("processor"), *devices) if part)
    options = f", {code(shlex.join(measured['options']))}" if measured.get("options") else ""
    version, threads = escape(str(measured.get("llama.cpp", "unknown"))), measured.get("threads")
    return (
        f"Measured with llama.cpp {version}, threads: {threads}{options}"
        + (f", on {where}" if where else "")
        + "."
    )


def _inputs(measured: Sequence[Result]) -> str:
    """On what was measured, as far as the measurements say it: older ones do not."""
    texts, prompts = set(), set()
    what = (
        "Perplexity and KL divergence"
        if any(_measured(result, "kl_divergence") for result in measured)
        else "Perplexity"
    )
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
    return (
        f"[{escape(source['repo'])}]({HUB}/{source['repo']})"
        if "repo" in source
        else escape(about["name"])
    )


def _said(entry: Json) -> dict[str, Any]:
    """A part of the configuration without what is not asked for."""
    return {
        key: _said(value) if isinstance(value, Mapping) else value
        for key, value in entry.items()
        if value is not False
    }


def _source(about: Json) -> str:
    source = about["source"]
    return (
        f"{_origin(about)}, commit {code(source['revision'])}"
        if "repo" in source
        else f"a local folder, {code(source['path'])}"
    )
