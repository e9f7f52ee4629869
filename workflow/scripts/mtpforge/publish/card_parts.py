"""What both pages of a model card share: templates, and sentences."""

import re
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import ModelCard, ModelCardData

from mtpforge.errors import ConfigError
from mtpforge.io.text import ANYWHERE, TEMPLATE_LIMIT, read_text
from mtpforge.llama_cpp.stamp import Stamp
from mtpforge.measure.measurement import Measurement
from mtpforge.publish.markdown import code, escape
from mtpforge.publish.result import Result

_FAULTS = (
    jinja2.TemplateError,
    ArithmeticError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)
"""What a template can raise."""


def filled(template: Path, values: Mapping[str, Any], data: ModelCardData | None = None) -> str:
    """A template with its values, and with front matter if there is any.

    Raises ConfigError if the template cannot be read or filled in.
    """
    content = _read(template)
    try:
        if data is None:
            text = jinja2.Template(content).render(values)
        else:
            text = str(ModelCard.from_template(data, template_str=content, **values))
    except _FAULTS as error:
        raise ConfigError(f"{template}: cannot be filled in ({error})") from None
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _read(path: Path) -> str:
    return read_text(path, ConfigError, most=TEMPLATE_LIMIT, within=ANYWHERE)


def any_drafts(results: Iterable[Result]) -> bool:
    """Whether llama-server drafted with any file."""
    return any(result.drafts and not result.report.not_run for result in results)


def of_bf16(results: Iterable[Result]) -> str:
    """The acceptance of the BF16 file, if it is known and in no row of the table."""
    reports = [result.report for result in results if result.is_model]
    if any(each.bits_per_weight >= 16 and each.acceptance is not None for each in reports):
        return ""
    known = (each.bf16_acceptance for each in reports)
    found = next((each for each in known if each is not None), None)
    return "" if found is None else f" (BF16: {found:.0%})"


def sentences(found: Iterable[str]) -> str:
    """Sentences in alphabetical order, without repeats."""
    return " ".join(sorted(set(found)))


def machine(measured: Measurement) -> str:
    """The llama.cpp, options and machine of a measurement."""
    threads = f"{measured.threads} thread{'s' * (measured.threads != 1)}"
    options = [code(shlex.join(measured.options))] if measured.options else []
    setup = ", ".join([f"llama.cpp {escape(measured.llama_cpp)}", threads, *options])
    names = [measured.machine.processor, *measured.machine.devices]
    machine = ", ".join(escape(name) for name in names if name)
    return f"Measured with {setup}{' on ' * bool(machine)}{machine}."


def toolchain(stamp: Stamp) -> str:
    """Version, build and commit of llama.cpp, as far as they are known."""
    build = f"b{stamp.build}" if stamp.build not in (None, "0") else ""
    known = dict.fromkeys([stamp.llama_cpp, build, stamp.commit])
    return escape(" ".join(part for part in known if part and part != "0"))
