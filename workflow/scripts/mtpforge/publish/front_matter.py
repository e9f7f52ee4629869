"""Front matter of the model card, which the Hub reads: base model, license, tags."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

from huggingface_hub import EvalResult, ModelCardData

from mtpforge.errors import CheckpointError, printable
from mtpforge.io import text
from mtpforge.measure.measurement import Measurement, Score, Text
from mtpforge.publish.card_config import About
from mtpforge.publish.result import Result

TAGS = ("gguf", "mtp", "speculative-decoding")
_COPIED = ("license", "license_name", "license_link", "pipeline_tag")
_COPIED_LISTS = ("tags", "language")
_TEXT = re.compile(r"[^\x00-\x1f\x7f]{1,200}")


def read_front_matter(path: Path) -> dict[str, Any]:
    """The license, tags and languages on a checkpoint's card; malformed values are left out.

    library_name is left out, because that library cannot load a GGUF. Without it, the Hub looks at
    the files to show how to use them.
    """
    found = _load(path)
    known = {key: found[key] for key in _COPIED if _is_text(found.get(key))}
    for key in _COPIED_LISTS:
        values = found.get(key)
        known[key] = list(filter(_is_text, values if isinstance(values, list) else [values]))
    return {key: value for key, value in known.items() if value}


def front_matter(
    about: About, checkpoint: Mapping[str, Any], results: Sequence[Result] = ()
) -> ModelCardData:
    """The front matter of our card; `checkpoint` is what `read_front_matter` returned.

    Perplexity and KL divergence of `results` are in it as the Hub's evaluation results.
    """
    data = dict(checkpoint)
    if repositories := [trunk.repo for trunk in about.trunks if trunk.repo]:
        names = list(dict.fromkeys(repositories))
        data |= {"base_model": names, "base_model_relation": "quantized"}
    if (link := _absolute(about, data.pop("license_link", ""))) is not None:
        data["license_link"] = link
    if about.repo:
        data["quantized_by"] = about.repo.split("/")[0]
    data["tags"] = list(dict.fromkeys([*data.get("tags", ()), *TAGS]))
    if found := [*_evaluations(results)]:
        data |= {"model_name": about.title, "eval_results": found}
    return ModelCardData(**data)


def _evaluations(results: Sequence[Result]) -> Iterator[EvalResult]:
    """What was measured on a text or on tasks, file by file."""
    for result in results:
        if result.measured and result.measured.text:
            for name, value in _metrics(result.measured):
                yield _evaluation(result, result.measured.text, name, value)
        if result.measured:
            for kind, score in result.measured.tasks.items():
                yield _tasks(result, kind, score)


def _metrics(measured: Measurement) -> Iterator[tuple[str, float]]:
    """Names and values of the metrics; those that JSON cannot hold are left out."""
    divergence = measured.kl_divergence
    found = {
        "Perplexity": measured.perplexity,
        "KL divergence": divergence.mean if divergence else None,
    }
    for name, value in found.items():
        if value is not None and math.isfinite(value):
            yield name, round(value, 6)


def _evaluation(result: Result, text: Text, name: str, value: float) -> EvalResult:
    """One metric of one file, on a text that is not on the Hub."""
    return EvalResult(
        task_type="text-generation",
        dataset_type="text",
        dataset_name=printable(text.name),
        dataset_args={"sha256": text.sha256, "chunks": text.chunks},
        metric_type=name.lower().replace(" ", "_"),
        metric_name=f"{name} ({printable(result.name)})",
        metric_value=value,
    )


def _tasks(result: Result, kind: str, score: Score) -> EvalResult:
    """The score of one file on one kind of tasks."""
    return EvalResult(
        task_type="text-generation",
        dataset_type=kind,
        dataset_name=kind.replace("_", " "),
        dataset_args={"tasks": score.tasks},
        metric_type="accuracy",
        metric_name=f"Accuracy ({printable(result.name)})",
        metric_value=round(score.share, 6),
    )


def _load(path: Path) -> Mapping[str, Any]:
    """All front matter of a checkpoint's card; empty if there is none or it cannot be parsed."""
    try:
        return text.read_front_matter(path)
    except CheckpointError:
        return {}  # the checkpoint's broken card must not stop ours


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and _TEXT.fullmatch(value) is not None


def _absolute(about: About, link: str) -> str | None:
    """A link on the checkpoint's card as an absolute URL; None if it has none."""
    try:
        if link and about.trunks and (url := about.trunks[0].url):
            link = urljoin(url, link)
        return link if urlsplit(link).scheme in ("https", "http") else None
    except ValueError:
        return None
