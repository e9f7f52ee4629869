"""How to serve the published files: commands and options for each runtime.

The lines are Markdown. Draft lengths and other options are those that were measured.
"""

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from mtpforge.gguf.quant_types import TABLE, TENSOR_TYPES
from mtpforge.llama_cpp import runtimes
from mtpforge.publish.card_config import HUB, About
from mtpforge.publish.markdown import code, shell
from mtpforge.publish.result import Result

NO_REPOSITORY = "OWNER/NAME-MTP-GGUF"
_NOT_A_MODEL = re.compile("mmproj|imatrix|(mtp|eagle3|dflash|dspark)-")
_SHARD = re.compile(r"-(\d{5})-of-\d{5}\.gguf$")


def runtime(results: Sequence[Result]) -> str:
    """First versions of the runtimes that draft with these files, and types that few programs have.

    Empty if none of the files drafts, and all have types of llama.cpp.
    """
    sentences = [_first_versions(results), *(_own_types(result) for result in results)]
    return " ".join(filter(None, sentences))


def _own_types(result: Result) -> str:
    known = {*TENSOR_TYPES, TABLE}
    types = " and ".join(code(kind) for kind in result.report.types if kind not in known)
    return f"{code(result.name)} has {types} tensors: few programs know them." if types else ""


def _first_versions(results: Iterable[Result]) -> str:
    drafting = (result for result in results if result.drafts or result.is_sidecar)
    name = next((result.gguf.architecture for result in drafting), None)
    if name is None:
        return ""
    known = runtimes.RUNTIMES.get(name)
    if known and known.llama_cpp:
        first = f"First llama.cpp build that drafts with {code(name)}: {known.llama_cpp}"
    else:
        first = f"Older llama.cpp builds cannot draft with {code(name)}"
    return (
        f"{first}. Builds {runtimes.BROKEN} fail when drafting. "
        f"LM Studio needs version {runtimes.LM_STUDIO} or newer."
    )


def serving(results: Sequence[Result], about: About) -> str:
    """The commands to serve one recommended file in each runtime, and how to use the sidecar."""
    result = recommended(results)
    if result is None:
        return "This repository has no complete model, only files to use with one."
    files = _Repository(about.repo or NO_REPOSITORY, about.name, tuple(results))
    lines = [
        *_llama_server(files, result),
        *(line for sidecar in files.sidecars for line in _sidecar(files, sidecar)),
        *_lemonade(files, result),
        *_lm_studio(files, result),
        *_ollama(files, result),
    ]
    return "\n".join(lines)


def recommended(results: Iterable[Result]) -> Result | None:
    """The file to start with: the first quantized model that drafts, or the first that comes close.

    A file that drafts comes before one that does not, then a quantized one before BF16.
    """
    models = [result for result in results if result.is_model]
    candidates = [model for model in models if model.drafts] or models
    quantized = [model for model in candidates if model.report.bits_per_weight < 16]
    return next(iter(quantized or candidates), None)


def resolve(tag: str, names: Iterable[str]) -> str | None:
    """The file that `-hf repo:TAG` selects in llama.cpp b11434; None if it finds none."""
    matches = re.compile(f"{tag}[.-]", re.IGNORECASE)
    return next(filter(matches.search, filter(_can_be_selected, sorted(names))), None)


def _can_be_selected(name: str) -> bool:
    """Whether llama.cpp takes a file for a model, or for the first shard of one."""
    if not name.endswith(".gguf") or _NOT_A_MODEL.search(name.rpartition("/")[2]):
        return False
    shard = _SHARD.search(name)
    return shard is None or int(shard[1]) == 1


@dataclass(frozen=True)
class _Repository:
    """The published files by role, and the tags that select them."""

    name: str
    model_name: str
    results: tuple[Result, ...]

    @cached_property
    def models(self) -> list[Result]:
        return [result for result in self.results if result.is_model]

    @cached_property
    def headless(self) -> list[Result]:
        return [model for model in self.models if not model.has_head]

    @cached_property
    def sidecars(self) -> list[Result]:
        return [result for result in self.results if result.is_sidecar]

    @cached_property
    def vision_towers(self) -> list[Result]:
        return [result for result in self.results if result.gguf.is_vision]

    @cached_property
    def tags(self) -> Mapping[str, str | None]:
        """File name of a model -> its variant's name, if `-hf repo:TAG` selects this file by it."""
        names = [shard for result in self.results for shard in result.shards]
        return {model.name: self._tag(model, names) for model in self.models}

    def _tag(self, model: Result, names: Sequence[str]) -> str | None:
        tag = model.name.removesuffix(".gguf").removeprefix(f"{self.model_name}-")
        plain = re.fullmatch(r"[A-Za-z0-9_.-]+", tag) is not None
        return tag if plain and resolve(tag, names) == model.shards[0] else None


# ── llama-server ──


def _llama_server(files: _Repository, result: Result) -> list[str]:
    options = server_options(result)
    lines = [_why(result), ""]
    if files.sidecars:
        towers = [("--mmproj", tower) for tower in files.vision_towers]
        lines += _downloaded(files, result, beside=towers, options=options)
        lines += _own_head_first(files, result)
    else:
        tag = files.tags[result.name]
        which = [f"{files.name}:{tag}"] if tag else [files.name, "--hf-file", result.shards[0]]
        lines += shell(["llama-server", "-hf", *which, *options])
    return [*lines, *_other_files(files)]


def _own_head_first(files: _Repository, result: Result) -> list[str]:
    """A warning that some commands prefer the sidecar; empty for a file without a head."""
    if not result.has_head:
        return []
    return [
        "Do not use `-hf` or `lemonade pull` with this repository: "
        f"both would draft with {code(files.sidecars[0].name)} instead of the file's own head."
    ]


def _why(result: Result) -> str:
    """Which file the first command serves, and why with this draft length."""
    server = f"llama-server with {code(result.name)}"
    if not result.drafts:
        return f"{server}, without drafting:"
    if result.n_max is None:
        return f"{server}. Speed was not measured, so the draft length is that of verification:"
    if result.n_max == 0:
        return f"{server}. Drafting is off because it was not faster when measured:"
    return f"{server} and the draft length that was fastest when measured:"


def server_options(model: Result) -> list[str]:
    """The options that a model was measured with, and those for drafting if it should draft.

    Without a measurement it drafts as far ahead as in verification: the number of head blocks.
    """
    if not model.drafts or model.n_max == 0:
        return model.options
    return [*model.options, *_drafting(model.n_max or model.gguf.draft_length)]


def _drafting(n_max: int) -> list[str]:
    return ["--spec-type", "draft-mtp", "--spec-draft-n-max", str(n_max)]


def _downloaded(
    files: _Repository,
    model: Result | None,
    *,
    beside: Sequence[tuple[str, Result]],
    options: Sequence[str],
) -> list[str]:
    """Commands that download a model, and each (option, file) to load with it, and serve them.

    Without a model, they serve the reader's own, called MODEL.
    """
    names = [
        *(model.shards if model else ()),
        *(shard for _, file in beside for shard in file.shards),
    ]
    loaded = [word for option, file in beside for word in (option, file.shards[0])]
    path = model.shards[0] if model else "MODEL"
    return shell(
        ["hf", "download", files.name, *names, "--local-dir", "."],
        ["llama-server", "-m", path, *loaded, *options],
    )


def _other_files(files: _Repository) -> list[str]:
    """How to adapt the commands to another file, if there are several."""
    if len(files.models) == 1:
        return [""]
    if files.sidecars:
        change = "the name in both commands"
    elif all(files.tags.values()):
        change = "the tag"
    else:
        change = "the model to `-hf REPOSITORY --hf-file FILE`"
    return ["", f"For another file, change {change}{_other_lengths(files)}.", ""]


def _other_lengths(files: _Repository) -> str:
    """How the drafting options of the other files differ; empty if they do not."""
    if len({tuple(server_options(model)) for model in files.models}) == 1:
        return ""
    options = "`--spec-type draft-mtp --spec-draft-n-max N`"
    if any(model.measured for model in files.models):
        return f", and the draft length to that in the table ({options}; neither if it is off)"
    return f". Drop {options} if the file has no head"


def _sidecar(files: _Repository, sidecar: Result) -> list[str]:
    """How to use a head as a draft model, with a file that has none or with the reader's own."""
    model = recommended(files.headless)
    which = (
        f"{code(model.name)}, which has no head" if model else "a GGUF of this model without one"
    )
    text = f"The sidecar {code(sidecar.name)} is the head as a separate draft model, for {which}"
    # No speed is measured with a sidecar: draft as far ahead as in its verification.
    options = [*(model or sidecar).options, *_drafting(sidecar.gguf.draft_length)]
    commands = _downloaded(files, model, beside=[("-md", sidecar)], options=options)
    return [f"{text}:" if model else f"{text} (MODEL):", "", *commands]


# ── other runtimes ──


def _lemonade(files: _Repository, result: Result) -> list[str]:
    tag = files.tags[result.name]
    if not tag or files.sidecars:
        return []
    options = server_options(result)
    arguments = ["--llamacpp-args", shlex.join(options)] if options else []
    return [
        "Lemonade (`lemonade list` prints the name to use as MODEL):",
        "",
        *shell(
            ["lemonade", "pull", f"{files.name}:{tag}"],
            ["lemonade", "run", "MODEL", *arguments],
        ),
    ]


def _lm_studio(files: _Repository, result: Result) -> list[str]:
    tag = files.tags[result.name]
    if not tag:
        return ["No tag selects this file: load the downloaded file in Lemonade and LM Studio.", ""]
    return ["LM Studio:", "", *shell(["lms", "get", f"{HUB}/{files.name}@{tag}"])]


def _ollama(files: _Repository, result: Result) -> list[str]:
    """A command for the file, or for the first without a head; or why there is none."""
    refused = result.has_head and result.gguf.architecture in runtimes.OLLAMA_WITHOUT
    for each in [*([] if refused else [result]), *files.headless]:
        if len(each.shards) == 1 and (tag := files.tags[each.name]):
            command = ["ollama", "run", f"hf.co/{files.name}:{tag}"]
            return ["Ollama, which does not draft with the head:", "", *shell(command)]
    if len(result.shards) > 1:
        return ["Ollama does not load split files."]
    if refused:
        return [f"Ollama {runtimes.OLLAMA} does not load files of this architecture with a head."]
    return ["In Ollama, import the downloaded file too."]
