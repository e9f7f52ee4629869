"""Tables of the distance from BF16, one for each model: of its files, and of other people's."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from mtpforge.measure.measurement import KlDivergence, Measurement, Other, Text
from mtpforge.table import markdown, size

HEADING = "Distance from BF16"
COLUMNS = ("file", "size", "KL divergence", "99.9%", "maximum", "top-token agreement", "perplexity")


def distances(measured: Mapping[Path, Measurement], others: Mapping[Path, Other]) -> str:
    """A Markdown table for each model with a KL divergence; empty without one.

    Paths are `<folder of a model>/measure/...` and `<folder of a model>/work/others/...`. Below a
    table is what could not be compared.
    """
    files: dict[Path, list[Measurement]] = defaultdict(list)
    for path, found in measured.items():
        if found.kl_divergence:
            files[path.parents[1]].append(found)
    theirs: dict[Path, list[Other]] = defaultdict(list)
    for path, other in others.items():
        theirs[path.parents[2]].append(other)
    models = dict.fromkeys([*files, *theirs])
    return "\n".join(_of_model(each.name, files[each], theirs[each]) for each in models)


def cells(found: KlDivergence) -> tuple[str, str, str, str]:
    """Mean, 99.9th percentile, maximum, and top-token agreement."""
    return (
        _with_error(found.mean, found.mean_error, ".5f"),
        f"{found.p99_9:z.4f}",
        "-" if found.maximum is None else f"{found.maximum:z.3f}",
        _with_error(found.same_top, found.same_top_error, ".2%"),
    )


def _of_model(model: str, files: Sequence[Measurement], others: Sequence[Other]) -> str:
    rows = [_row(found.stem, found) for found in files]
    rows += [_row(f"{other.name} (not made here)", other) for other in others]
    problems = [f"- {each.name}: not compared: {each.problem}\n" for each in others if each.problem]
    heading = f"{HEADING}: {model}{_on(found.text for found in files)}\n"
    parts = [heading, markdown([COLUMNS, *filter(None, rows)]), "".join(problems)]
    return "\n".join(filter(None, parts))


def _row(name: str, found: Measurement | Other) -> tuple[str, ...] | None:
    if found.kl_divergence is None:
        return None
    perplexity = "-" if found.perplexity is None else f"{found.perplexity:.4f}"
    return (name, size(found.bytes), *cells(found.kl_divergence), perplexity)


def _with_error(value: float, error: float | None, form: str) -> str:
    return format(value, f"z{form}") + (f" ± {format(error, form)}" if error is not None else "")


def _on(texts: Iterable[Text | None]) -> str:
    """The text that the files were measured on."""
    text = next(filter(None, texts), None)
    return f", on at most {text.chunks} chunks of {text.name}" if text else ""
