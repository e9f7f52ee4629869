"""How to serve the published files: runtimes, commands, and options."""

import re
import shlex
from collections.abc import Mapping, Sequence

from mtpforge.llama_cpp import runtimes
from mtpforge.publish.result import HUB, Json, Result, code

NO_REPOSITORY = "OWNER/NAME-MTP-GGUF"


def runtime(results: Sequence[Result]) -> str:
    """Since when llama.cpp drafts with these files."""
    architecture = next((result.opened.architecture for result in results if result.drafts), None)
    if architecture is None:
        return ""
    known = runtimes.RUNTIMES.get(architecture)
    since = (
        f"llama.cpp drafts with {code(architecture)} from {known.llama_cpp} on"
        if known and known.llama_cpp
        else "Not every llama.cpp drafts with it"
    )
    return f"{since}; builds {runtimes.BROKEN} fail when they draft. LM Studio drafts from {runtimes.LM_STUDIO} on."


def resolve(tag: str, names: Sequence[str]) -> str | None:
    """The file of a repository's `names` that `-hf repo:TAG` takes in llama.cpp 0c1e57098; None where it takes none."""
    for name in sorted(names):
        shard = re.search(r"-(\d{5})-of-\d{5}\.gguf$", name)
        is_model = name.endswith(".gguf") and not re.search(
            "mmproj|imatrix|(mtp|eagle3|dflash|dspark)-", name.rpartition("/")[2]
        )
        if (
            is_model
            and re.search(f"{tag}[.-]", name, re.IGNORECASE)
            and (shard is None or int(shard[1]) == 1)
        ):
            return name
    return None


def best(results: Sequence[Result]) -> Result | None:
    """The file to begin with: of the models that draft, or else of all, the first quantized one, or else the first."""
    models = [result for result in results if result.is_model]
    found = [result for result in models if result.drafts] or models
    return next(
        iter([*(result for result in found if result.report["bits_per_weight"] < 16), *found]), None
    )


def serving(results: Sequence[Result], about: Json) -> str:
    """How to serve the file to begin with, with each runtime, and how to use a sidecar."""
    result, models = best(results), [each for each in results if each.is_model]
    if result is None:
        return "There is no model here, only what goes beside one."
    repo = about.get("publish", {}).get("repo", NO_REPOSITORY)
    names = [part for each in results for part in each.parts]
    tags = {each.name: _tag(each, about["name"], names) for each in models}
    tag, options = tags[result.name], _options(result)
    sidecars = [each for each in results if not each.is_model and not each.opened.is_vision]
    text = [_why(result), ""]
    if sidecars:
        towers = [("--mmproj", each) for each in results if each.opened.is_vision]
        text += _from_here(repo, result, towers, options)
        text += [
            f"Not by `-hf` or `lemonade pull`: both draft with {code(sidecars[0].name)} in place of the head in the file."
        ]
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
        text += shell(
            ["lemonade", "pull", f"{repo}:{tag}"], ["lemonade", "run", "MODEL", *arguments]
        )
    if tag:
        text += ["LM Studio:", "", *shell(["lms", "get", f"{HUB}/{repo}@{tag}"])]
    else:
        text += ["No tag names this file alone: give Lemonade and LM Studio the file itself.", ""]
    return "\n".join([*text, *_ollama(result, models, repo, tags)])


def _tag(result: Result, name: str, names: Sequence[str]) -> str | None:
    """The variant's name, where `-hf repo:TAG` takes its file for it; None where it takes another."""
    tag = result.name.removesuffix(".gguf").removeprefix(f"{name}-")
    return (
        tag
        if re.fullmatch(r"[A-Za-z0-9_.-]+", tag) and resolve(tag, names) == result.parts[0]
        else None
    )


def _from_here(
    repo: str, model: Result | None, beside: Sequence[tuple[str, Result]], options: Sequence[str]
) -> list[str]:
    """Downloading a model, or one of the reader's own, with each (option, file) that goes beside it, and serving that."""
    files = [*(model.parts if model else ()), *(part for _, file in beside for part in file.parts)]
    given = [word for option, file in beside for word in (option, file.parts[0])]
    serve = ["llama-server", "-m", model.parts[0] if model else "MODEL", *given, *options]
    return shell(["hf", "download", repo, *files, "--local-dir", "."], serve)


def _options(result: Result, sidecar: Result | None = None) -> list[str]:
    """The options of llama-server with which it was measured, and those to draft with, if it should: as far ahead as was fastest.

    Else, and with a sidecar, of which no speed is measured, as far ahead as in the verification of the file with the head.
    """
    measured, n_max = (
        list((result.measured or {}).get("options", ())),
        None if sidecar else result.n_max,
    )
    if n_max == 0 or not (sidecar or result.drafts):
        return measured
    return [
        *measured,
        "--spec-type",
        "draft-mtp",
        "--spec-draft-n-max",
        str(n_max or len((sidecar or result).opened.head_blocks)),
    ]


def _why(result: Result) -> str:
    server = f"llama-server, with {code(result.name)}"
    if not result.drafts:
        return f"{server}, which does not draft:"
    if result.n_max is None:
        return (
            f"{server}, drafting as far ahead as in its verification, since no speed was measured:"
        )
    if result.n_max == 0:
        return f"{server}. Drafting is off, because it was not faster where this was measured:"
    return f"{server}, drafting as far ahead as was fastest here:"


def _another(models: Sequence[Result], change: str) -> list[str]:
    """What changes with the file, where there are several."""
    text = f"For another file, change the {change}"
    if len({tuple(_options(model)) for model in models}) > 1:
        measured = any(model.measured for model in models)
        ahead, off = (
            ("the table says", "it says off") if measured else ("here", "a file has no head")
        )
        text += f", and draft as far ahead as {ahead}: `--spec-type draft-mtp --spec-draft-n-max N`, or neither where {off}"
    return ["", f"{text}.", ""] if len(models) > 1 else [""]


def _sidecar(sidecar: Result, models: Sequence[Result], repo: str) -> list[str]:
    """How to use the head as a draft model: beside a model that has none, or else a reader's own."""
    model = best([model for model in models if not model.opened.head_blocks])
    which = (
        f"{code(model.name)}, which has none"
        if model
        else "a GGUF of this model that has none, as MODEL"
    )
    text = f"The sidecar {code(sidecar.name)} is the head as a draft model of its own. It is for {which}:"
    return [
        text,
        "",
        *_from_here(repo, model, [("-md", sidecar)], _options(model or sidecar, sidecar)),
    ]


def _ollama(
    result: Result, models: Sequence[Result], repo: str, tags: Mapping[str, str | None]
) -> list[str]:
    """With the file itself, or else the first without a head; without a command where it would fail."""
    refused = result.opened.head_blocks and result.opened.architecture in runtimes.OLLAMA_WITHOUT
    for each in [
        *([] if refused else [result]),
        *(model for model in models if not model.opened.head_blocks),
    ]:
        if len(each.parts) == 1 and (tag := tags[each.name]):
            return [
                "Ollama, which does not draft with the head:",
                "",
                *shell(["ollama", "run", f"hf.co/{repo}:{tag}"]),
            ]
    if len(result.parts) > 1:
        return ["Ollama does not load a model in several files."]
    if refused:
        return [
            "Ollama 0.24.0 does not load a file of this architecture that has a head (its issue 16282)."
        ]
    return ["Give Ollama the file itself too."]


def shell(*commands: Sequence[str]) -> list[str]:
    """Commands in a block of their own."""
    return ["```", *map(shlex.join, commands), "```", ""]
