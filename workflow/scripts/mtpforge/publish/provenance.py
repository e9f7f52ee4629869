"""Provenance of a published file: an in-toto statement with the SLSA provenance predicate.

It contains no time and no local path, so the same configuration gives the same bytes.
See https://in-toto.io/Statement/v1 and https://slsa.dev/provenance/v1.
"""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mtpforge import local_files
from mtpforge.errors import VerificationError
from mtpforge.hub.fetch_records import HeadRecord, read_record
from mtpforge.io.ranges import digest_of
from mtpforge.io.text import read_json
from mtpforge.llama_cpp.stamp import Stamp
from mtpforge.verify.report import Report

FOLDER = "provenance"
STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "urn:mtpforge:build:v1"
BUILDER = "urn:mtpforge:snakemake:v1"

Resource = dict[str, Any]
"""An in-toto ResourceDescriptor: name, digest, and annotations."""


def statement(
    files: Iterable[tuple[str, int, str]],
    parameters: Mapping[str, Any],
    dependencies: list[Resource],
) -> dict[str, Any]:
    """The statement that `files` (path, bytes, sha256) were built from these dependencies.

    `parameters` are the relevant part of the configuration.
    """
    return {
        "_type": STATEMENT,
        "subject": [{"name": name, "digest": {"sha256": digest}} for name, _, digest in files],
        "predicateType": PREDICATE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": dict(parameters),
                "resolvedDependencies": dependencies,
            },
            "runDetails": {"builder": {"id": BUILDER}},
        },
    }


def subjects(path: Path) -> dict[str, str]:
    """Name -> sha256 of the files that a statement covers.

    Raises VerificationError or CheckpointError if the file is not a statement of ours.
    """
    try:
        value = read_json(path)
        if (value["_type"], value["predicateType"]) != (STATEMENT, PREDICATE):
            raise ValueError(f"{value['_type']!r}, {value['predicateType']!r}")
        found = [(subject["name"], subject["digest"]["sha256"]) for subject in value["subject"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise VerificationError(f"not an in-toto statement of SLSA provenance ({error})") from None
    return {str(name): str(digest) for name, digest in found}


def materials(
    source: Mapping[str, Any], tracked: Iterable[Path], recorded: Path | None = None
) -> list[Resource]:
    """The files of a source: local files, which are hashed, or records of downloaded ones.

    `source` is as in the configuration, with a `role` if it is not the checkpoint: the base, or
    the checkpoint of the head. A head that was downloaded alone has one entry per tensor, with its
    standing: verified, or trusted on first use. With `recorded`, the list of the local files, only
    those with other times than recorded are hashed. Raises DamagedError if one has changed.
    """
    role = {"role": source["role"]} if "role" in source else {}
    found = _local(list(tracked), recorded) if "path" in source else _fetched(source, tracked)
    annotated = [{**each, "annotations": each.get("annotations", {}) | role} for each in found]
    return annotated if role else found


def _local(files: list[Path], recorded: Path | None) -> list[Resource]:
    known = local_files.records(recorded) if recorded else {}
    # Some can lie in a folder of the one that has the others.
    folder = min((path.parent for path in files), key=lambda folder: len(folder.parts))
    digests = {
        path: local_files.checked_digest(path, record) if record else digest_of(path)
        for path in files
        for record in [known.get(path.relative_to(folder).as_posix())]
    }
    return [{"name": path.name, "digest": {"sha256": digest}} for path, digest in digests.items()]


def _fetched(source: Mapping[str, Any], tracked: Iterable[Path]) -> list[Resource]:
    uri = f"pkg:huggingface/{source['repo']}@{source['revision']}"
    repository = {"name": source["repo"], "uri": uri, "digest": {"gitCommit": source["revision"]}}
    found: list[Resource] = [repository]
    for path in tracked:
        record = read_record(path)
        if isinstance(record, HeadRecord):
            found += _head_tensors(record, uri)
        else:
            files = record.parts or {record.name: record.sha256}
            found += [
                {"name": name, "uri": f"{uri}#{name}", "digest": {"sha256": digest}}
                for name, digest in files.items()
            ]
    return found


def _head_tensors(record: HeadRecord, uri: str) -> list[Resource]:
    return [
        {
            "name": name,
            "uri": f"{uri}#{tensor.shard}",
            "digest": {"sha256": tensor.sha256},
            "annotations": {"standing": tensor.standing},
        }
        for name, tensor in record.tensors.items()
    ]


def trunk(report: Report) -> list[Resource]:
    """The trunk that a head was injected into, from the report on the file; empty without one."""
    if report.trunk is None:
        return []
    what = "the sha256 of a line for each of its tensors, sorted by name: sha256, two spaces, name"
    digest = {"sha256": report.trunk.sha256_before}
    return [{"name": "trunk of the base", "digest": digest, "annotations": {"digest": what}}]


_DIGESTS = ("archive_sha256", "programs", "libraries")


def toolchain(stamp: Stamp) -> list[Resource]:
    """The llama.cpp programs, with their build; and the source archive if they were built here."""
    archive = {"llama.cpp": stamp.archive_sha256} if stamp.archive_sha256 else {}
    known = stamp.as_json()
    about = {key: known[key] for key in known if key not in _DIGESTS}
    return [
        {"name": name, "digest": {"sha256": digest}, "annotations": about}
        for name, digest in {**archive, **stamp.programs, **(stamp.libraries or {})}.items()
    ]


def locks(paths: Iterable[Path]) -> list[Resource]:
    """The locked requirements."""
    return [{"name": path.as_posix(), "digest": {"sha256": digest_of(path)}} for path in paths]


def pipeline(code: Iterable[Path]) -> Resource:
    """The programs of this pipeline that made the file, with every module that they import."""
    paths = sorted(set(code))
    lines = "".join(f"{digest_of(path)}  {path.as_posix()}\n" for path in paths)
    what = "the sha256 of the lines that sha256sum prints of these files"
    return {
        "name": "mtpforge",
        "digest": {"sha256": hashlib.sha256(lines.encode()).hexdigest()},
        "annotations": {"digest": what, "files": sorted(path.as_posix() for path in paths)},
    }
