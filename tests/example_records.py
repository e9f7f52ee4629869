"""Reports, measurements and stamps with plausible values; keyword arguments replace some."""

from dataclasses import replace
from typing import Any

from mtpforge.llama_cpp.stamp import Stamp
from mtpforge.measure.measurement import KlDivergence, Machine, Measurement, Run, Text, Total
from mtpforge.verify.report import Report

KINDS = ("code", "prose")
TEXT = Text(name="held-out.txt", sha256="ab" * 32, chunks=16)
DIVERGENCE = KlDivergence(mean=0.01234, p99_9=0.5678, same_top=0.951)
MACHINE = Machine(processor="A <fast> one", processors=4, devices=())
STAMP = Stamp(llama_cpp="0.5.0-dev", commit="0c1e57098", compiler="GNU 12.2.0", programs={})
_REPORT = Report(
    file="x.gguf",
    bytes=1,
    sha256="0" * 64,
    bits_per_weight=4.61,
    head="Q8_0",
    types={"Q4_0": 1},
    checks=(),
)


def report(file: str, **values: Any) -> Report:
    return replace(_REPORT, file=file, **values)


def run(n_max: int, kind: str, state: str = "warm", accepted: int = 0) -> Run:
    """100 drafts, or none without drafting."""
    drafts = 100 if n_max else 0
    return Run(
        n_max=n_max,
        p_min=0.0,
        kind=kind,
        form="raw",
        state=state,
        repeats=1,
        tokens_per_second=(1.0,),
        median=1.0,
        spread=(1.0, 1.0),
        drafts=drafts,
        accepted=accepted if n_max else 0,
        acceptance=accepted / drafts if drafts else None,
        by_position=(),
    )


def total(n_max: int, speed: float, off: float = 0, acceptance: float = 0.65) -> Total:
    """The speed of all prompts; `off` is that without drafting. Half as fast when cold."""
    return Total(
        n_max=n_max,
        p_min=0.0,
        repeats=3,
        tokens_per_second=speed,
        spread=(speed - 1, speed + 1),
        cold_tokens_per_second=speed / 2,
        drafts=100 if n_max else 0,
        accepted=round(100 * acceptance) if n_max else 0,
        acceptance=acceptance if n_max else None,
        by_position=(0.8, 0.5, 0.3, 0.2)[:n_max],
        speedup=speed / (off or speed),
        memory_bytes=None,
    )


def measurement(file: str = "x.gguf", **values: Any) -> Measurement:
    """Measured without drafting only, unless `by_n_max` and `runs` say otherwise."""
    known: dict[str, Any] = {
        "file": file,
        "bytes": 1,
        "threads": 4,
        "options": (),
        "llama_cpp": "0.5.0-dev 0c1e57098",
        "machine": MACHINE,
        "prompts": dict.fromkeys(KINDS, "c" * 64),
        "repeats": 3,
        "n_predict": 200,
        "runs": tuple(run(0, kind) for kind in KINDS),
        "by_n_max": (total(0, 50.0),),
        "by_kind": (),
        "steady": True,
        "waiting": 0.01,
        "recommended_n_max": 0,
        "recommended_p_min": 0.0,
        "verdict": "no head",
        "memory_bytes": None,
        "perplexity": None,
        "kl_divergence": None,
    }
    return Measurement(**{**known, **values})
