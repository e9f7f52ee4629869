"""Tables of the distance from BF16 of measured files: one for each model."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path

from mtpforge.measure.measurement import KlDivergence, Measurement, Text
from mtpforge.table import markdown, size

HEADING = "Distance from BF16"
COLUMNS = ("file", "size", "KL divergence", "99.9%", "maximum", "same first choice", "perplexity")


def distances(measured: Mapping[Path, Measurement]) -> str:
    """A Markdown table for each model with a KL divergence; empty without one.

    `measured` are measurements by their paths, `<folder of a model>/measure/...`.
    """
    compared = [(path, found) for path, found in measured.items() if found.kl_divergence]
    by_model = groupby(compared, key=lambda each: each[0].parent.parent)
    return "\n".join(
        _of_model(folder.name, [found for _, found in files]) for folder, files in by_model
    )


def cells(found: KlDivergence) -> tuple[str, str, str, str]:
    """Mean, 99.9th percentile, maximum, and the share of the same first choices."""
    return (
        _with_error(found.mean, found.mean_error, ".5f"),
        f"{found.p99_9:z.4f}",
        "-" if found.maximum is None else f"{found.maximum:z.3f}",
        _with_error(found.same_top, found.same_top_error, ".2%"),
    )


def _of_model(model: str, measured: Sequence[Measurement]) -> str:
    rows = [COLUMNS, *(_row(found) for found in measured)]
    return f"{HEADING}: {model}{_on(found.text for found in measured)}\n\n{markdown(rows)}"


def _row(found: Measurement) -> tuple[str, ...]:
    assert found.kl_divergence is not None
    perplexity = "-" if found.perplexity is None else f"{found.perplexity:.4f}"
    return (found.stem, size(found.bytes), *cells(found.kl_divergence), perplexity)


def _with_error(value: float, error: float | None, form: str) -> str:
    return format(value, f"z{form}") + (f" ± {format(error, form)}" if error is not None else "")


def _on(texts: Iterable[Text | None]) -> str:
    """The text that the files were measured on."""
    text = next(filter(None, texts), None)
    return f", on at most {text.chunks} chunks of {text.name}" if text else ""
