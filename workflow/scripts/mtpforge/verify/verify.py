"""Verification: check that a finished GGUF is what was requested, and that its head drafts.

A file with a wrong head loads without a warning. So its inventory, types, metadata and values are
compared with the checkpoint, llama-server must draft with it and accept drafts, and the text must
be the same without drafting. Every check gives a verdict; one failed check rejects the file.

Large trunk tensors are compared by sample (see `tensors`), which can miss a changed bit. Digests do
not: conversion, quantization and injection record them as they write the file, so later damage is
found. Earlier damage, such as bad memory while llama-quantize runs, shows only if it exceeds the
error limits. A bad sector stays hidden while the file is in the page cache.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from mtpforge.errors import VerificationError
from mtpforge.gguf import reader, split
from mtpforge.gguf.head import trunk_digests, types_of
from mtpforge.gguf.reader import Gguf
from mtpforge.io.ranges import digest_of
from mtpforge.io.text import read_json
from mtpforge.llama_cpp.programs import LlamaCpp
from mtpforge.quantize.recipe import NO_HEAD
from mtpforge.verify import base_layout, inventory, metadata, tensors
from mtpforge.verify.digests import check_digests, check_trunk
from mtpforge.verify.norms import check_norms
from mtpforge.verify.report import Acceptance, Check, Report, Shard, Trunk, raise_failed, some
from mtpforge.verify.request import Request
from mtpforge.verify.running import (
    check_drafting,
    check_programs,
    check_running,
    check_vision,
    reading_target,
    why_not_run,
)
from mtpforge.verify.source import Source, open_source
from mtpforge.verify.target import check_target
from mtpforge.verify.tensors import Comparisons, SourceRows

_FINE_TUNE = (
    "; if the base is a fine-tune, only the head is this source's: name it with `head_from` in "
    "config.yaml, or with --head-from in place of --checkpoint or --reference"
)


def verify(path: Path, request: Request, llama: LlamaCpp) -> Report:
    """Verify the GGUF at `path`; for a split one, that of its first file.

    Raises VerificationError, naming each failed check, if the file must not be published.
    """
    opened = split.read(path)
    checks = [check_digests(opened, request.digests)] if request.digests else []
    if request.target_note:
        checks.append(Check("model", True, request.target_note))
    if opened.is_vision:
        with reading_target(request):
            checks.append(check_vision(opened, request, llama))
        raise_failed(path.name, checks)
        return _report(opened, checks)
    _require_head(opened, request)
    checks.append(inventory.check_types(opened, request))
    checks += metadata.check_template_names(opened)
    against_source, compared = _check_against_source(opened, request, llama.processors)
    checks += against_source
    if opened.is_drafter:
        checks.append(check_target(opened, request))
    trunk = None
    if request.base or request.trunk:
        check, trunk = check_trunk(opened, _trunk_before(request))
        checks.append(check)
    raise_failed(path.name, checks)  # a file that is known to be wrong need not run
    acceptance = None
    if not_run := why_not_run(opened, request, llama):
        checks.append(Check("running", True, f"not run, so no acceptance is known: {not_run}"))
    else:
        with reading_target(request):
            running, acceptance = check_running(opened, request, llama)
        checks += running
    checks.append(check_programs(opened, llama))
    raise_failed(path.name, checks)
    report = _report(opened, checks, compared=compared, trunk=trunk, acceptance=acceptance)
    unquantized = Acceptance.read(request.unquantized) if request.unquantized else None
    bf16 = unquantized.acceptance if acceptance and unquantized else None
    return replace(report, not_run=not_run, bf16_acceptance=bf16)


def publish_split(
    path: Path, folder: Path, limit: int, request: Request, llama: LlamaCpp
) -> tuple[tuple[Shard, ...], list[Check]]:
    """Split a verified file into `folder`, in files of at most `limit` bytes, and verify those.

    Returns the files and the checks on them. Raises VerificationError; `folder` is then unchanged.
    """
    opened = split.read(path)
    with split.splitting(opened, folder, stem=folder.name, limit=limit) as files:
        checks = [_check_files(opened, files)]
        if len(files) > 1 and checks[0].passed:
            # The head was measured in the whole file, and the bytes are the same: all that is left
            # is whether llama.cpp finds them.
            shards = replace(opened, path=files[0])
            short = replace(request, prompts=request.prompts[:1], min_acceptance=0)
            if why_not_run(opened, request, llama) is None:
                check, _ = check_drafting(shards, short, llama)
                checks.append(replace(check, name="files load"))
            checks.append(check_programs(shards, llama, name="files open"))
        raise_failed(folder.name, checks)
        listed = tuple(map(_shard, files))
    return listed, checks


def _require_head(opened: Gguf, request: Request) -> None:
    blocks = opened.head_blocks
    if not blocks and not request.headless:
        raise VerificationError(f"{opened.path}: has no head: nextn_predict_layers is missing")
    if blocks and request.headless:
        raise VerificationError(
            f"{opened.path}: has a head (block {blocks[0]}), but --head none was requested"
        )


def _check_against_source(
    opened: Gguf, request: Request, threads: int
) -> tuple[list[Check], Comparisons]:
    """Compare inventory, metadata and values with the source; without one, look for NaN only.

    If the inventory is wrong, the rest is not compared.
    """
    source = open_source(request)
    checks: list[Check] = []
    rows: Mapping[str, SourceRows] = {}
    of_source: Mapping[str, SourceRows] = {}
    if source:
        checks.append(inventory.check_inventory(opened, source, request))
        if not checks[0].passed:
            return checks, Comparisons()
        checks += _check_metadata(opened, source, request)
        of_source = source.rows()
        rows = base_layout.rows_in_layout(opened, source.tensors, of_source)
    head = set() if request.headless else set(opened.head.tensors)
    # Another program can round the last bit differently.
    exact = set(opened.tensors) if request.ours else head
    read = opened if request.ours else _without_unreadable(opened)
    compared = tensors.compare_tensors(read, rows, whole=head, exact=exact, threads=threads)
    if source:
        worth = _worth_hashing(read, rows, compared)
        source.check(base_layout.names_in_source(worth, opened, of_source.keys()))
    checks += [
        _check_finite(opened, compared),
        *check_norms(read, compared, source.norm_note if source else ""),
    ]
    if source and rows:
        note = source.note or base_layout.not_compared(opened, source.tensors, rows)
        output = base_layout.foreign_output(read, rows)
        checks.append(_check_values(opened, compared, note=note, output=output))
        wrong = {each.name for each in compared.all if each.problem}
        if (output or wrong - head) and not (request.ours or request.head_from):
            checks[-1] = replace(checks[-1], detail=checks[-1].detail + _FINE_TUNE)
    return checks, compared


def _worth_hashing(
    opened: Gguf, rows: Mapping[str, SourceRows], compared: Comparisons
) -> list[str]:
    """The tensors whose source was read whole, or can be the one that is wrong."""
    infos = opened.tensors
    return [
        each.name
        for each in compared.compared
        if each.name in rows
        and (each.problem or each.rows * infos[each.name].shape[-1] == infos[each.name].elements)
    ]


def _check_metadata(opened: Gguf, source: Source, request: Request) -> list[Check]:
    if not request.ours:
        return [metadata.check_metadata_of_base(opened, source.metadata())]
    return [
        metadata.check_metadata(opened, source.metadata()),
        metadata.check_template(opened, source.templates()),
    ]


def _without_unreadable(opened: Gguf) -> Gguf:
    """The file without tensors of a base that only another program can read."""
    trunk = opened.trunk.tensors
    unreadable = reader.unreadable(opened)
    return reader.select_tensors(
        opened,
        [
            name
            for name, info in opened.tensors.items()
            if name not in trunk or info.type.name not in unreadable
        ],
    )


def _check_finite(opened: Gguf, compared: Comparisons) -> Check:
    bad = [f"{each.name} has NaN or infinite values" for each in compared.all if not each.finite]
    detail = f"no NaN or infinity in {len(compared.all)} tensors"
    if len(compared.all) < len(opened.tensors):
        unseen = [f"{count} at {name}" for name, count in reader.unreadable(opened).items()]
        detail += f"; not read: {' and '.join(unseen)}, unknown here"
    return Check("finite", not bad, some(bad) or detail)


def _check_values(opened: Gguf, compared: Comparisons, note: str, output: str) -> Check:
    problems = [*compared.problems, *filter(None, [output])]
    return Check("values", not problems, some(problems) or _coverage(opened, compared, note))


def _coverage(opened: Gguf, compared: Comparisons, note: str) -> str:
    """The share of a file that was compared, and its error nearest to the limit."""
    results = compared.compared
    weights = sum(each.rows * opened.tensors[each.name].shape[-1] for each in results)
    share = weights / sum(info.elements for info in opened.tensors.values())
    detail = f"{len(results)} tensors, {share:.1%} of all weights compared{note}; "
    worst = max(results, key=lambda each: (each.error or 0.0) / tensors.error_limit(each.type))
    if not worst.error:
        return f"{detail}all equal the source"
    limit = tensors.error_limit(worst.type)
    error = f"error {worst.error:.3f}, limit {limit:.3f}"
    return f"{detail}nearest to its limit: {worst.name} ({worst.type}, {error})"


def _trunk_before(request: Request) -> Mapping[str, str]:
    """Digests of the base's trunk, as injection recorded them or as the base has them."""
    if request.trunk:
        return read_json(request.trunk)
    assert request.base is not None
    return trunk_digests(split.read(request.base))


def _check_files(opened: Gguf, files: list[Path]) -> Check:
    problems = split.check(opened, files)
    detail = f"all {len(opened.tensors)} tensors, in {len(files)} file{'s' * (len(files) > 1)}"
    return Check("files", not problems, some(problems) or detail)


def _report(
    opened: Gguf,
    checks: list[Check],
    compared: Comparisons | None = None,
    trunk: Trunk | None = None,
    acceptance: Acceptance | None = None,
) -> Report:
    infos = opened.tensors.values()
    types = [info.type.name for info in infos]
    bits = 8 * sum(info.size for info in infos)
    files = split.files_of(opened)
    return Report(
        file=opened.path.name if len(files) == 1 else opened.path.absolute().parent.name,
        bytes=sum(file.stat().st_size for file in files),
        sha256=digest_of(*files),
        bits_per_weight=round(bits / sum(info.elements for info in infos), 3),
        head="/".join(sorted(types_of(opened.head))) if opened.head_blocks else NO_HEAD,
        types={name: types.count(name) for name in sorted(set(types))},
        errors=compared.errors if compared else None,
        errors_by_type=compared.errors_by_type if compared else None,
        trunk=trunk,
        drafts=acceptance.drafts if acceptance else None,
        accepted=acceptance.accepted if acceptance else None,
        acceptance=acceptance.acceptance if acceptance else None,
        checks=tuple(checks),
        files=tuple(map(_shard, files)) if len(files) > 1 else None,
    )


def _shard(file: Path) -> Shard:
    return Shard(file.name, file.stat().st_size, digest_of(file))
