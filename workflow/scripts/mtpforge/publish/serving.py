"""How to serve the published files: commands and options for each runtime.

The lines are Markdown. Draft lengths and other options are those that were measured.
"""

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import yaml

from mtpforge.gguf.quant_types import TABLE, TENSOR_TYPES
from mtpforge.llama_cpp import runtimes
from mtpforge.publish.card_config import HUB, About
from mtpforge.publish.choice import draft_length, needed, recommended, resolve, without_tag
from mtpforge.publish.markdown import code, escape, shell
from mtpforge.publish.result import Result
from mtpforge.publish.serving_memory import TOKENS

NO_REPOSITORY = "OWNER/NAME-MTP-GGUF"
_TO_TRY = "--spec-type draft-mtp --spec-draft-n-max 2"
"""What drafts on a machine that was not measured."""


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
        least = f"To draft with a {code(name)} model, use llama.cpp {known.least}"
    else:
        least = f"Older llama.cpp builds cannot draft with a {code(name)} model"
    return (
        f"{least}. Builds {runtimes.BROKEN} fail when drafting. "
        f"LM Studio needs version {runtimes.LM_STUDIO} or newer."
    )


def serving(results: Sequence[Result], about: About) -> str:
    """The commands to serve one recommended file in each runtime, and how to use the sidecar."""
    result = recommended(results)
    if result is None:
        return "This repository has no complete model, only files to use with one."
    files = _Repository(about.repo or NO_REPOSITORY, about.name, tuple(results))
    lines = [
        *_which(files, result),
        *_llama_server(files, result),
        *(line for sidecar in files.sidecars for line in _sidecar(files, sidecar)),
        *_llama_swap(files, result),
        *_lemonade(files, result),
        *_lm_studio(files, result),
        *_ollama(files, result),
    ]
    return "\n".join(lines)


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
        return {model.name: self._tag(model, self.paths) for model in self.models}

    @cached_property
    def paths(self) -> list[str]:
        """The paths of all files, with the shards of split ones."""
        return [shard for result in self.results for shard in result.shards]

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
        lines += [*_own_head_first(files, result), ""]
    else:
        lines += shell(["llama-server", *_from_hub(files, result), *options])
    return lines


def _from_hub(files: _Repository, result: Result) -> list[str]:
    """The options of llama-server that download a file."""
    tag = files.tags[result.name]
    if tag:
        return ["-hf", f"{files.name}:{tag}"]
    return ["-hf", files.name, "--hf-file", result.shards[0]]


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
        why = "Speed was not measured"
        if result.measured and result.measured.by_n_max:
            once = "Speed was measured only once"
            why = once if result.is_steady else "There is no reliable measurement of speed"
        return f"{server}. {why}, so start with a draft length of {draft_length(result)}:"
    cut = result.measured is not None and result.measured.cut_short
    if result.n_max == 0:
        tried = "with any of the few settings tried (search cut short)" if cut else "when measured"
        return f"{server}. Drafting is off because it was not faster {tried}{_where(result)}:"
    tried = "among the few settings tried (search cut short)" if cut else "when measured"
    return f"{server} and the draft length that was fastest {tried}:"


def _where(result: Result) -> str:
    """Where drafting was not faster; if not on a GPU, what to try there."""
    found = result.measured
    if found is None:
        return ""
    if found.machine.devices:
        return f" on {escape(', '.join(found.machine.devices))}"
    cpu = f" on {found.threads} CPU thread{'s' * (found.threads != 1)}"
    best = found.confirmed
    return cpu + (f"; on a GPU, try {code(_TO_TRY)}" if best and best.drafts else "")


def server_options(model: Result) -> list[str]:
    """The options that a model was measured with, its context, and drafting if it should draft.

    Without a measurement it drafts as far ahead as in verification: the number of head blocks.
    """
    length = draft_length(model)
    return [*_options(model), *(_drafting(length, model.p_min) if length else ())]


def sets_context(model: Result) -> bool:
    """Whether its commands have to name the context that its need is reckoned for.

    Without a number, llama-server may take the longest of the model, which can need more memory
    than all the rest.
    """
    if {"-c", "--ctx-size"} & {*model.options} or needed(model) is None:
        return False
    longest = model.gguf.get(f"{model.gguf.architecture}.context_length")
    return not isinstance(longest, int) or longest > TOKENS


def _options(model: Result) -> list[str]:
    context = ["--ctx-size", str(TOKENS)] if sets_context(model) else []
    return [*model.options, *context]


def _drafting(n_max: int, p_min: float = 0.0) -> list[str]:
    stop = ["--spec-draft-p-min", f"{p_min:g}"] if p_min else []
    return ["--spec-type", "draft-mtp", "--spec-draft-n-max", str(n_max), *stop]


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


def _which(files: _Repository, result: Result) -> list[str]:
    """Which file the commands serve, and how to adapt them to another, if there are several."""
    if len(files.models) == 1:
        return []
    default = [] if files.sidecars else without_tag(files.paths)
    named, other = f"These commands use {code(result.name)}", ""
    if default == result.shards[:1]:
        named += ", the file that llama.cpp takes without a tag (`-hf REPOSITORY`)"
    elif default:
        named += ", the recommended file"
        takes = f"takes {code(default[0])}" if len(default) == 1 else "may take another"
        other = f" Without a tag (`-hf REPOSITORY`), llama.cpp {takes}."
    if files.sidecars:
        change = "the name in both commands"
    elif all(files.tags.values()):
        change = "the tag"
    else:
        change = "the model to `-hf REPOSITORY --hf-file FILE`"
    change += _other_lengths(files)
    return [f"{named}. If you chose another file, change {change}.{other}", ""]


def _other_lengths(files: _Repository) -> str:
    """How the drafting options of the other files differ; empty if they do not."""
    if len({tuple(server_options(model)) for model in files.models}) == 1:
        return ""
    options = "--spec-type draft-mtp --spec-draft-n-max N"
    if any(model.p_min for model in files.models):
        ahead = f"draft length and p_min to those in the table (`{options} --spec-draft-p-min P`"
        return (
            f", and {ahead}; leave out p_min if the table has none, and all three if it says off)"
        )
    if any(model.is_steady and model.n_max is not None for model in files.models):
        length = f"the draft length to that in the table (`{options}`"
        return f", and {length}; leave out both options if it says off)"
    return f". Drop `{options}` if the file has no head"


def _sidecar(files: _Repository, sidecar: Result) -> list[str]:
    """How to use a head as a draft model, with a file that has none or with the reader's own."""
    model = recommended(files.headless)
    which = (
        f"{code(model.name)}, which has no head" if model else "a GGUF of this model without one"
    )
    text = f"The sidecar {code(sidecar.name)} is the head as a separate draft model, for {which}"
    # No speed is measured with a sidecar: draft as far ahead as in its verification.
    options = [*(_options(model) if model else ()), *_drafting(sidecar.gguf.draft_length)]
    commands = _downloaded(files, model, beside=[("-md", sidecar)], options=options)
    return [f"{text}:" if model else f"{text} (MODEL):", "", *commands]


# ── other runtimes ──


def _llama_swap(files: _Repository, result: Result) -> list[str]:
    """An entry of llama-swap's configuration; none if the file has to be downloaded before."""
    if files.sidecars:
        return []
    command = shlex.join([*_from_hub(files, result), *server_options(result)])
    entry = {"cmd": f"llama-server --port ${{PORT}} {command}"}
    models = {"models": {result.name.removesuffix(".gguf"): entry}}
    text = yaml.safe_dump(models, allow_unicode=True, width=1000).rstrip()
    return ["llama-swap, in its `config.yaml`:", "", "```yaml", text, "```", ""]


def _lemonade(files: _Repository, result: Result) -> list[str]:
    tag = files.tags[result.name]
    if not tag or files.sidecars:
        return []
    off = ["--spec-type", "none"] if result.drafts and not draft_length(result) else []
    options = [*server_options(result), *off]  # it drafts with every head unless told otherwise
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
    """Commands that download and load a file. LM Studio drafts only if it is told to."""
    tag = files.tags[result.name]
    if not tag:
        return ["No tag selects this file: load the downloaded file in Lemonade and LM Studio.", ""]
    get = ["lms", "get", f"{HUB}/{files.name}@{tag}"]
    length = draft_length(result)
    if not length:
        return ["LM Studio:", "", *shell(get)]
    options = ["--speculative-draft-mtp", "--speculative-draft-max-tokens", str(length)]
    if result.p_min:
        options += ["--speculative-draft-min-continue-probability", f"{result.p_min:g}"]
    return [
        "LM Studio (`lms ls` prints the name to use as MODEL):",
        "",
        *shell(get, ["lms", "load", "MODEL", *options]),
    ]


def _ollama(files: _Repository, result: Result) -> list[str]:
    """Commands for the file, or for the first without a head; or why there are none."""
    tag = files.tags[result.name]
    length = _length_without_p_min(result)
    if len(result.shards) > 1:
        return ["Ollama does not load split files."]
    if not tag:
        return ["In Ollama, import the downloaded file too.", *_old_ollama(files, result)]
    name = f"hf.co/{files.name}:{tag}"
    if not length:
        return ["Ollama:", "", *shell(["ollama", "run", name]), *_old_ollama(files, result)]
    modelfile = ["```", f"FROM {name}", f"PARAMETER draft_num_predict {length}", "```", ""]
    return [
        f"Ollama {runtimes.OLLAMA_DRAFTS} or newer drafts if its Modelfile says so:",
        "",
        *modelfile,
        *shell(["ollama", "create", "MODEL", "-f", "Modelfile"], ["ollama", "run", "MODEL"]),
        *_old_ollama(files, result),
    ]


def _length_without_p_min(result: Result) -> int:
    """How far ahead to draft without p_min, which Ollama has not; 0 if that is not faster."""
    if not result.p_min:
        return draft_length(result)
    totals = result.measured.by_n_max if result.measured else ()
    faster = [total for total in totals if not total.p_min and (total.speedup or 0) > 1]
    return max(faster, key=lambda total: total.tokens_per_second).n_max if faster else 0


def _old_ollama(files: _Repository, result: Result) -> list[str]:
    """That old versions do not load files with a head, and which file they do load."""
    if not (result.has_head and result.gguf.architecture in runtimes.OLLAMA_WITHOUT):
        return []
    refused = f"Ollama {runtimes.OLLAMA} cannot load files of this architecture with a head"
    issue = f" (ollama issue {runtimes.OLLAMA_ISSUE})"
    for each in files.headless:
        if len(each.shards) == 1 and (tag := files.tags[each.name]):
            return [f"{refused}{issue}, but can load `hf.co/{files.name}:{tag}`, which has none."]
    return [f"{refused}{issue}."]
