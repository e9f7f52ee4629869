"""The model card of a results folder: a README with front matter for the Hub, and a second page.

All figures come from reports and measurements. Text from a checkpoint's card is checked and
escaped.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard

from mtpforge.errors import VerificationError
from mtpforge.gguf import template_warnings
from mtpforge.llama_cpp.stamp import Stamp
from mtpforge.measure.measurement import Measurement
from mtpforge.publish import choice, details, serving_memory, tables
from mtpforge.publish.card_config import About
from mtpforge.publish.card_parts import any_drafts, filled, machine, of_bf16, sentences, toolchain
from mtpforge.publish.front_matter import front_matter, read_front_matter
from mtpforge.publish.markdown import code, escape
from mtpforge.publish.result import Result
from mtpforge.publish.serving import NO_REPOSITORY, runtime, serving, sets_context
from mtpforge.search.compared import TAKE_THAT, Compared
from mtpforge.table import rounded_size
from mtpforge.verify.metadata import templates_in

PICTURES = {
    "distance": "File size against KL divergence from BF16",
    "drafting": "Speed against draft length",
}
"""Figures of the card, with what they show."""


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
    data = front_matter(about, read_front_matter(checkpoint_card), results)
    values = _values(about, results) | {
        "toolchain": toolchain(stamp),
        "found": _found(compared, results),
    }
    text = filled(template, values, data)
    if yaml.safe_load(ModelCard(text).data.to_yaml()) != yaml.safe_load(data.to_yaml()):
        raise VerificationError(
            f"{about.title}: the card's front matter does not read back as it was written"
        )
    return text


def _values(about: About, results: Sequence[Result]) -> dict[str, Any]:
    """The values that templates/card.md fills in."""
    choices = choice.by_memory(results)
    return {
        "title": escape(about.title),
        "origin": about.origin,
        "head": about.head,
        "injected": about.given_heads,
        "several": len(results) > 1,
        "checked": _checked(results),
        "pictures": _pictures(results),
        "not_drafting": _not_drafting(results),
        "not_run": _not_run(results),
        "template": _template(results),
        "by_memory": tables.by_memory(choices, results, about.name).rstrip() if choices else "",
        "estimates": "\n".join(f"- {sentence}" for sentence in _estimates(results) if sentence),
        "files": tables.files(results, about.name).rstrip(),
        "legend": _legend(results, about),
        "details": details.NAME,
        "matrices": "\n\n".join(about.published_matrices),
        "measured": any(result.measured for result in results),
        "swept": any(result.measured and result.measured.by_n_max for result in results),
        "steady": any(result.is_steady for result in results),
        "runtime": runtime(results),
        "serving": serving(results, about),
        "placeholder": "" if about.repo else NO_REPOSITORY,
        "sources": "\n".join(f"- {source}" for source in about.sources),
    }


# ── pictures and files ──


def _pictures(results: Sequence[Result]) -> str:
    """The figures that show something, side by side on the Hub."""
    measured = [result.measured for result in results if result.measured]
    shown = {
        "distance": any(found.kl_divergence for found in measured),
        "drafting": any(result.is_steady for result in results),
    }
    return "\n".join(
        f'<img src="plots/{name}.svg" alt="{PICTURES[name]}" width="335">'
        for name, is_shown in shown.items()
        if is_shown
    )


def _estimates(results: Sequence[Result]) -> list[str]:
    """What the needs are estimated from, what changes them, and what is not in them."""
    best = choice.recommended(results)
    size = choice.tower_bytes(results)
    tower = f"the vision tower of {rounded_size(size)} (`--no-mmproj` leaves it out), "
    if best is None:
        return []
    kept = choice.kept(best)
    return [
        _MEMORY,
        f"These needs are estimates: the file, {tower if size else ''}{choice.tokens(best):,} "
        "tokens of context with keys and values at f16 or q8_0 "
        "(`--cache-type-k q8_0 --cache-type-v q8_0`), "
        f"{'the states of recurrent layers, ' if kept and kept.state else ''}"
        "and 1 GB for llama.cpp's buffers.",
        _CONTEXT if sets_context(best) else "",
        _slots(results),
        _head_cost(results),
        "llama-server also caches earlier prompts in RAM, up to 8 GiB of them: "
        "`--cache-ram 0` turns that off.",
    ]


_MEMORY = (
    "Memory is VRAM if the whole model runs on the GPU, otherwise RAM, which the system and other "
    "programs share. A model can also be split between the two, but then runs slower."
)
_CONTEXT = (
    "The llama-server commands below set this context with `--ctx-size 8192`: raise it for longer "
    "texts. Without it, llama-server may reserve the model's full context."
)


def _slots(results: Sequence[Result]) -> str:
    """How much memory fewer requests at a time save, if that can be seen in two digits."""
    best = choice.recommended(results)
    if best is None or choice.slots(best) == 1:
        return ""
    saved = (choice.needed(best) or 0) - (choice.needed(best, at_a_time=1) or 0)
    if saved < max(0.02 * best.report.bytes, 50e6):
        return ""
    return (
        f"llama-server serves {choice.slots(best)} requests at a time: `--parallel 1` saves "
        f"{rounded_size(saved)}."
    )


def _head_cost(results: Sequence[Result]) -> str:
    """What drafting costs in memory with the file to start with; empty if it cannot."""
    best = choice.recommended(results)
    kept = choice.kept(best) if best else None
    if best is None or kept is None:
        return ""
    if not best.drafts:
        return _sidecar_cost(best, results)
    slots, length = choice.slots(best), choice.draft_length(best) or best.gguf.draft_length
    weights = rounded_size(serving_memory.head_bytes(best.gguf))
    rest = kept.head_cache + kept.states(slots, length) - kept.states(slots, 0)
    included = " (included in the table)" if choice.draft_length(best) else ""
    return (
        f"The head takes {weights} of {code(best.name)}, "
        f"and with drafting llama-server needs {rounded_size(rest)} more than without{included}."
    )


def _sidecar_cost(model: Result, results: Iterable[Result]) -> str:
    """What drafting with the sidecar costs beside a model; empty if there is none."""
    sidecar = next((result for result in results if result.is_sidecar), None)
    needed = choice.needed_with(sidecar, model) if sidecar else None
    if sidecar is None or needed is None:
        return ""
    return (
        f"Drafting with {code(sidecar.name)} needs {rounded_size(needed)} more, "
        "which is not in the table."
    )


def _legend(results: Sequence[Result], about: About) -> str:
    """What the columns of the files' table mean."""
    measured = [result.measured for result in results if result.measured]
    known = {
        "head: type of the head's tensors": any(result.has_head for result in results),
        "accepted: share of drafted tokens that the model accepted in verification"
        f"{of_bf16(results)}": any(result.report.acceptance is not None for result in results),
        f"tokens/s: without{' → with' * tables.any_faster(results)} drafting": any(
            result.is_steady for result in results
        ),
        "draft: how many tokens to draft ahead": any(
            result.is_steady and result.n_max is not None for result in results
        ),
        "p_min: drafting stops at tokens less likely than this": any(
            result.p_min for result in results
        ),
        f"KL: mean KL divergence from BF16{_texts(measured, about)}, lower is better": any(
            found.kl_divergence for found in measured
        ),
    }
    words = "; ".join(text for text, shown in known.items() if shown)
    swept = [found for found in measured if found.by_n_max]
    missing = not swept and not any(found.kl_divergence for found in measured)
    parts = [
        f"{words[0].upper()}{words[1:]}." if words else "",
        _types(results),
        "Speed and KL divergence were not measured." if missing else "",
        tables.NOT_STEADY if swept and not any(result.is_steady for result in results) else "",
        sentences(map(machine, swept)),
    ]
    return "\n\n".join(filter(None, parts))


def _texts(measured: Iterable[Measurement], about: About) -> str:
    """The texts on which files were compared, such as ` on TEXT`; empty if they are not known."""
    names = sorted({about.text(found.text) for found in measured if found.text})
    return f" on {' and '.join(names)}" if names else ""


_QUALITY = {
    "BF16": "is not quantized",
    "Q8": "is practically as good as BF16",
    "Q6": "loses hardly anything",
    "Q5": "loses little",
    "Q4": "is the usual compromise between size and quality",
    "IQ4_XS": "is a little smaller than Q4 and about as good, but slower on a CPU",
    "Q3": "loses noticeably",
    "IQ3": "loses noticeably, and is slower on a CPU",
    "Q2": "loses a lot: for when nothing else fits",
    "IQ2": "loses a lot: for when nothing else fits",
    "IQ1": "loses most: for when nothing else fits",
}
"""What each kind of type means for the choice of a file."""
_KIND = re.compile(rf"(?<![A-Z0-9])({'|'.join(_QUALITY)})(?![A-Z0-9])")


def _types(results: Iterable[Result]) -> str:
    """What the types in the names of the models mean; empty if there is no choice of them."""
    names = (result.name for result in results if result.is_model)
    kinds = {found[-1] for name in names if (found := _KIND.findall(name))}  # after the model's
    words = "; ".join(f"{kind} {words}" for kind, words in _QUALITY.items() if kind in kinds)
    return f"By type: {words}." if len(kinds) > 1 else ""


def _found(compared: Iterable[Compared], results: Sequence[Result]) -> str:
    """The verdict on each file whose types were found."""
    return "\n".join(
        f"- The types in {code(each.file)} were "
        f"[found by a search]({details.NAME}#types-found-by-the-search): "
        f"{escape(_verdict(each, results))}."
        for each in compared
    )


def _verdict(compared: Compared, results: Iterable[Result]) -> str:
    """The verdict, without advice to take a file that was made only to compare."""
    stock = compared.stock and compared.stock.kl_divergence
    others = (each.measured for each in results if each.name != compared.file)
    is_published = any(found.kl_divergence == stock for found in others if found)
    return compared.verdict if is_published else compared.verdict.replace(TAKE_THAT, "")


# ── what there is to say ──


def _checked(results: Sequence[Result]) -> str:
    """That llama-server drafted with the files, and how many drafts it accepted; empty if not."""
    if not any_drafts(results):
        return ""
    which = "Each file with a head" if len(results) > 1 else "The file"
    if any(result.report.not_run for result in results):
        which = "Each other file with a head"
    known = (result.report.acceptance for result in results if result.drafts)
    shares = sorted(share for share in known if share is not None)
    ends = dict.fromkeys(f"{100 * share:.0f}" for share in (shares[:1] + shares[-1:]))
    accepted = f", and {'-'.join(ends)}% of its drafts are accepted" if ends else ""
    return f"{which} was checked in llama-server: the head drafts{accepted}."


def _not_drafting(results: Iterable[Result]) -> str:
    """Why heads of these files do not draft; empty if all do."""
    return sentences(f"{escape(why)}." for result in results if (why := result.why_not_drafting))


def _not_run(results: Iterable[Result]) -> str:
    """Which files were published without being run, and why; empty if none."""
    return sentences(
        f"{code(result.name)} was not run before it was published ({escape(why)}), but its tensors "
        "were compared with those of the checkpoint."
        for result in results
        if (why := result.report.not_run)
    )


def _template(results: Iterable[Result]) -> str:
    """Warnings of names in chat templates that only an attack needs."""
    found = (template_warnings.warning(templates_in(result.gguf).values()) for result in results)
    return sentences(f"Warning: {escape(words)}." for words in found if words)
