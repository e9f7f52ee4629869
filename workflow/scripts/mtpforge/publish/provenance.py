"""What a published file is made of, as an in-toto statement with the SLSA provenance predicate.

The same configuration gives the same bytes: no time and no path of a machine is in it.
See https://in-toto.io/Statement/v1 and https://slsa.dev/provenance/v1.
"""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mtpforge.errors import VerificationError
from mtpforge.io.ranges import digest_of
from mtpforge.io.text import read_json

FOLDER = "provenance"
STATEMENT, PREDICATE = "https://in-toto.io/Statement/v1", "https://slsa.dev/provenance/v1"
BUILD_TYPE, BUILDER = "urn:mtpforge:build:v1", "urn:mtpforge:snakemake:v1"

Resource = dict[str, Any]
"""An in-toto ResourceDescriptor: name, digest, and what else is known."""


def statement(
    files: Iterable[tuple[str, int, str]], parameters: Mapping[str, Any], dependencies: list[Resource]
) -> dict[str, Any]:  # fmt: skip
    """The statement on `files` (path, bytes, sha256), which a part of the configuration and the dependencies made."""
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
    """Name -> sha256 of what a statement is about. Raises VerificationError, CheckpointError where it is none of ours."""
    try:
        value = read_json(path)
        if (value["_type"], value["predicateType"]) != (STATEMENT, PREDICATE):
            raise ValueError(f"{value['_type']!r}, {value['predicateType']!r}")
        return {
            str(subject["name"]): str(subject["digest"]["sha256"]) for subject in value["subject"]
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise VerificationError(f"is no in-toto statement of SLSA provenance ({error})") from None


def materials(source: Mapping[str, Any], evidence: Iterable[Path]) -> list[Resource]:
    """What was taken from `source`, as the configuration names it: local files, which are hashed, or records of fetched ones.

    Of a head that was fetched by itself there is an entry for each tensor, which says how far it is to be trusted.
    """
    if "path" in source:
        return [{"name": path.name, "digest": {"sha256": digest_of(path)}} for path in evidence]
    uri = f"pkg:huggingface/{source['repo']}@{source['revision']}"
    found: list[Resource] = [
        {"name": source["repo"], "uri": uri, "digest": {"gitCommit": source["revision"]}}
    ]
    for path in evidence:
        record = read_json(path)
        if "tensors" not in record:
            found.append(
                {
                    "name": record["name"],
                    "uri": f"{uri}#{record['name']}",
                    "digest": {"sha256": record["sha256"]},
                }
            )
            continue
        for name, tensor in record["tensors"].items():
            place = {"uri": f"{uri}#{tensor['shard']}", "digest": {"sha256": tensor["sha256"]}}
            found.append({"name": name, **place, "annotations": {"standing": tensor["standing"]}})
    return found


def trunk(report: Mapping[str, Any]) -> list[Resource]:
    """What is known of the trunk that a head was injected into, from the report on the file; nothing of another file."""
    if "trunk" not in report:
        return []
    what = "the sha256 of a line for each of its tensors, sorted by name: sha256, two spaces, name"
    return [
        {
            "name": "trunk of the base",
            "digest": {"sha256": report["trunk"]["sha256_before"]},
            "annotations": {"digest": what},
        }
    ]


def toolchain(stamp: Path) -> list[Resource]:
    """The programs of llama.cpp that were used, with what is known of their build; and its source, where it was built here."""
    known = read_json(stamp)
    about = {
        key: value for key, value in known.items() if key not in ("archive_sha256", "programs")
    }
    digests = {
        **({"llama.cpp": known["archive_sha256"]} if "archive_sha256" in known else {}),
        **known["programs"],
    }
    return [
        {"name": name, "digest": {"sha256": digest}, "annotations": about}
        for name, digest in digests.items()
    ]


def locks(paths: Iterable[Path]) -> list[Resource]:
    """Locked requirements."""
    return [{"name": path.as_posix(), "digest": {"sha256": digest_of(path)}} for path in paths]


def pipeline(code: Iterable[Path]) -> Resource:
    """The programs of this pipeline that made the file, with all modules that they import."""
    lines = "".join(f"{digest_of(path)}  {path.as_posix()}\n" for path in sorted(set(code)))
    what = "the sha256 of the lines that sha256sum prints of these files"
    return {
        "name": "mtpforge",
        "digest": {"sha256": hashlib.sha256(lines.encode()).hexdigest()},
        "annotations": {"digest": what, "files": sorted({path.as_posix() for path in code})},
    }
