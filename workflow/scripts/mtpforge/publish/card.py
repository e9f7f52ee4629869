"""The model card of a results folder: a README with front matter for the Hub.

All its figures come from reports and measurements. Text from a checkpoint's card is checked and
escaped.
"""

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub import ModelCard

from mtpforge.errors import ConfigError, VerificationError
from mtpforge.gguf import template_warnings
from mtpforge.io.text import ANYWHERE, TEMPLATE_LIMIT, read_text
from mtpforge.llama_cpp.stamp import Stamp
from mtpforge.measure.measurement import Measurement
from mtpforge.publish import tables
from mtpforge.publish.card_config import About
from mtpforge.publish.front_matter import front_matter, read_front_matter
from mtpforge.publish.markdown import code, escape
from mtpforge.publish.result import Result
from mtpforge.publish.serving import runtime, serving
from mtpforge.search.compared import Compared, mixture_table
from mtpforge.verify.metadata import templates_in

_FAULTS = (
    jinja2.TemplateError,
    ArithmeticError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)
"""What a template can raise."""


def make(
    about: About,
    results: Sequence[Result],
    checkpoint_card: Path,
    stamp: Stamp,
    template: Path,
    compared: Sequence[Compared] = (),
) -> str:
    """The card. `checkpoint_card` need not exist; `compared` are files whose types were found.

    Raises ConfigError if the template cannot be read or filled in; VerificationError if the front
    matter does not read back as it was written.
    """
    data = front_matter(about, read_front_matter(checkpoint_card))
    values = _values(about, results) | {"toolchain": _toolchain(stamp), "found": _found(compared)}
    try:
        card = ModelCard.from_template(data, template_str=_read_template(template), **values)
    except _FAULTS as error:
        raise ConfigError(f"{template}: cannot be filled in ({error})") from None
    text = re.sub(r"\n{3,}", "\n\n", str(card)).rstrip() + "\n"
    if yaml.safe_load(ModelCard(text).data.to_yaml()) != yaml.safe_load(data.to_yaml()):
        raise VerificationError(
            f"{about.title}: the card's front matter does not read back as it was written"
        )
    return text


def _read_template(path: Path) -> str:
    return read_text(path, ConfigError, most=TEMPLATE_LIMIT, within=ANYWHERE)


def _values(about: About, results: Sequence[Result]) -> dict[str, Any]:
    """The values that templates/card.md fills in."""
    measured = [(result.name, result.measured) for result in results if result.measured]
    swept = [(name, found) for name, found in measured if found.by_n_max]
    measurements = [found for _, found in swept]
    return {
        "title": escape(about.title),
        "origin": about.origin,
        "head": about.head,
        "drafts": any(result.drafts and not result.report.not_run for result in results),
        "not_drafting": _not_drafting(results),
        "not_run": _not_run(results),
        "template": _template(results),
        "files": tables.files(results).rstrip(),
        "split": _split(results),
        "measured": bool(measurements),
        "machines": _sentences(map(_machine, measurements)),
        "inputs": f"{_texts(measurements)} {_prompts(measurements)}".strip(),
        "verdicts": "\n".join(f"- {code(name)}: {escape(m.verdict)}." for name, m in measured),
        "sweeps": [(code(name), tables.sweep(found).rstrip()) for name, found in swept],
        "runtime": runtime(results),
        "serving": serving(results, about),
        "sources": "\n".join(f"- {source}" for source in about.sources),
        "recipe": _recipe(about),
    }


def _found(compared: Iterable[Compared]) -> str:
    """The verdict and the mixture of each file whose types were found."""
    return "\n\n".join(
        f"{code(each.file)} has types that were found for its size: {escape(each.verdict)}. "
        f"How much a tensor matters was {_METHODS.get(each.sensitivity, '')}. "
        f"{escape(each.head.words) if each.head else ''} Matrices by type:\n\n"
        f"{mixture_table({escape(name): row for name, row in each.mixture.items()})}".rstrip()
        for each in compared
    )


_METHODS = {
    "class": "measured by class of tensors and by layer",
    "tensor": "measured for each",
    "prior": "taken from measurements of other models",
}


def _not_drafting(results: Iterable[Result]) -> str:
    """Why heads of these files do not draft; empty if all do."""
    return _sentences(f"{escape(why)}." for result in results if (why := result.why_not_drafting))


def _not_run(results: Iterable[Result]) -> str:
    """Which files were published without being run, and why; empty if none."""
    return _sentences(
        f"{code(result.name)} was not run before it was published ({escape(why)}), but its tensors "
        "were compared with those of the checkpoint."
        for result in results
        if (why := result.report.not_run)
    )


def _template(results: Iterable[Result]) -> str:
    """Warnings of names in chat templates that only an attack needs."""
    found = (template_warnings.warning(templates_in(result.gguf).values()) for result in results)
    return _sentences(f"Warning: {escape(words)}." for words in found if words)


def _split(results: Iterable[Result]) -> str:
    """The shards of all split files, as a list."""
    split = [result.shards for result in results if len(result.shards) > 1]
    return "\n".join(f"- {code(shard)}" for shards in split for shard in shards)


def _machine(measured: Measurement) -> str:
    """The llama.cpp, options and machine of a measurement."""
    threads = f"{measured.threads} thread{'s' * (measured.threads != 1)}"
    options = [code(shlex.join(measured.options))] if measured.options else []
    setup = ", ".join([f"llama.cpp {escape(measured.llama_cpp)}", threads, *options])
    names = [measured.machine.processor, *measured.machine.devices]
    machine = ", ".join(escape(name) for name in names if name)
    return f"Measured with {setup}{' on ' * bool(machine)}{machine}."


def _texts(measurements: Sequence[Measurement]) -> str:
    """The texts on which perplexity was measured."""
    compared = any(found.kl_divergence for found in measurements)
    what = "Perplexity and KL divergence were" if compared else "Perplexity was"
    texts = {found.text for found in measurements if found.text}
    return _sentences(
        f"{what} measured on {code(text.name)} (sha256 {code(text.sha256)}, "
        f"up to {text.chunks} chunks of 512 tokens)."
        for text in texts
    )


def _prompts(measurements: Iterable[Measurement]) -> str:
    """The prompts on which speed was measured."""
    return _sentences(
        f"Speed was measured on prompts of these kinds: {escape(', '.join(sorted(found.prompts)))} "
        f"({found.repeats} warm request{'s' * (found.repeats != 1)} each)."
        for found in measurements
    )


def _sentences(found: Iterable[str]) -> str:
    """Sentences in alphabetical order, without repeats."""
    return " ".join(sorted(set(found)))


def _toolchain(stamp: Stamp) -> str:
    """Version, build and commit of llama.cpp, as far as they are known."""
    known = [stamp.llama_cpp, stamp.build, stamp.commit]
    return escape(" ".join(part for part in known if part and part != "0"))


def _recipe(about: About) -> str:
    """The variants as in config.yaml, without options that are off."""
    recipe = _without_false({"variants": about.variants})
    return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True).rstrip()


def _without_false(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_false(value) if isinstance(value, Mapping) else value
        for key, value in entry.items()
        if value is not False
    }
