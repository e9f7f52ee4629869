"""The second page of a model card: all figures, the measurements by draft length, the recipe."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mtpforge.measure.measurement import Measurement, Other
from mtpforge.measure.recommendation import AGAIN, pair
from mtpforge.publish import choice, tables
from mtpforge.publish.card_config import About
from mtpforge.publish.card_parts import any_drafts, filled, machine, of_bf16, sentences
from mtpforge.publish.markdown import code, escape
from mtpforge.publish.result import Result
from mtpforge.search.compared import Compared, mixture_table

NAME = "DETAILS.md"


def make(
    about: About,
    results: Sequence[Result],
    template: Path,
    compared: Sequence[Compared] = (),
    others: Sequence[Other] = (),
) -> str:
    """The second page: all figures and the recipe. Raises ConfigError.

    `compared` are files whose types were found, `others` are other people's.
    """
    values = _values(about, results) | {
        "found": _mixtures(compared),
        "others": tables.others(results, others).rstrip() if others else "",
        "not_compared": _not_compared(others),
    }
    return filled(template, values)


def _values(about: About, results: Sequence[Result]) -> dict[str, Any]:
    """The values that templates/details.md fills in."""
    ordered = choice.by_size(results)
    measured = [(result.name, result.measured) for result in ordered if result.measured]
    swept = [(name, found) for name, found in measured if found.by_n_max]
    measurements = [found for _, found in swept]
    return {
        "title": escape(about.title),
        "files": tables.details(results).rstrip(),
        "drafts": any_drafts(results),
        "bf16": of_bf16(results),
        "split": _split(ordered),
        "measured": bool(measurements),
        "memory": any(found.memory_bytes for found in measurements),
        "machines": sentences(map(machine, measurements)),
        "inputs": f"{_texts(measurements, about)} {_prompts(measurements)}".strip(),
        "not_steady": "" if any(result.is_steady for result in results) else tables.NOT_STEADY,
        "verdicts": "\n".join(f"- {code(name)}: {_verdict(found)}." for name, found in measured),
        "sweeps": [
            (
                code(name),
                _fastest(found),
                tables.sweep(found).rstrip(),
                tables.kinds(found).rstrip(),
            )
            for name, found in swept
        ],
        "columns": "\n".join(f"- {words}." for words in _columns(measurements)),
        "recipe": _recipe(about),
    }


def _verdict(measured: Measurement) -> str:
    """What was found, without what only whoever measures can do."""
    verdict = measured.verdict.replace(f": {AGAIN}", "").replace(" by `minutes`", "")
    return escape(verdict)


def _not_compared(others: Iterable[Other]) -> str:
    """Why there are no figures of some other files."""
    return "\n".join(
        f"- {code(each.name)}: not compared: {escape(each.problem)}"
        for each in others
        if each.problem
    )


def _mixtures(compared: Iterable[Compared]) -> str:
    """The mixture of each file whose types were found."""
    return "\n\n".join(
        f"{code(each.file)}: how much a tensor matters was {_METHODS.get(each.sensitivity, '')}. "
        f"{escape(each.head.words) if each.head else ''} Matrices by type:\n\n"
        f"{mixture_table({escape(name): row for name, row in each.mixture.items()})}".rstrip()
        for each in compared
    )


_METHODS = {
    "class": "measured by class of tensors and by layer",
    "tensor": "measured for each",
    "prior": "taken from measurements of other models",
}


def _split(results: Iterable[Result]) -> str:
    """The shards of all split files, as a list."""
    split = [result.shards for result in results if len(result.shards) > 1]
    return "\n".join(f"- {code(shard)}" for shards in split for shard in shards)


def _texts(measurements: Sequence[Measurement], about: About) -> str:
    """The texts on which perplexity was measured."""
    compared = any(found.kl_divergence for found in measurements)
    what = "Perplexity and KL divergence were" if compared else "Perplexity was"
    texts = {found.text for found in measurements if found.text}
    return sentences(
        f"{what} measured on {about.text(text)} (sha256 {code(text.sha256)}, "
        f"up to {text.chunks} chunks of 512 tokens)."
        for text in texts
    )


def _prompts(measurements: Iterable[Measurement]) -> str:
    """The prompts on which speed was measured."""
    return sentences(
        f"Speed was measured on prompts of these kinds: {escape(', '.join(sorted(found.prompts)))} "
        f"({found.repeats} round{'s' * (found.repeats != 1)})."
        for found in measurements
    )


def _columns(measurements: Iterable[Measurement]) -> list[str]:
    """What the columns of the tables by draft length and by kind of prompt mean."""
    found = [*measurements]
    steady = [each for each in found if each.steady]
    totals = [total for each in found for total in each.by_n_max]
    kinds = [(each, kind) for each in found for kind in each.by_kind if kind.n_max]
    known = {
        "draft length: tokens drafted ahead (n_max)": True,
        "p_min: drafting stops at a token less likely than this": any(
            total.p_min for total in totals
        ),
        "rounds: each has a server of its own. Those in turns alternated with no drafting, so only "
        "these are compared with it; those of the search ran earlier, and most pairs had one: "
        "their speeds are rough": any(each.by_kind for each in steady),
        "range: the slowest and the fastest round": bool(steady),
        "cold: the first request of a new server; other figures are of later ones": True,
        "by position: how often the first drafted token was accepted, how often the second, and so "
        "on": any(total.by_position for total in totals),
        "the columns after it: acceptance by kind of prompt": True,
        "form: raw text, or in the model's chat template without thinking (chat) or with it": bool(
            kinds
        ),
        "speedup: tok/s over that without drafting; - for a form measured in one round": any(
            each.steady and kind.speedup is None for each, kind in kinds
        ),
    }
    return [words for words, shown in known.items() if shown]


def _fastest(measured: Measurement) -> str:
    """The pair that all kinds of prompts were compared with."""
    return next((pair(each.n_max, each.p_min) for each in measured.by_kind), "")


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
