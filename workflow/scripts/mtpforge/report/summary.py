"""The table of all verified files."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from mtpforge.measure.measurement import Measurement, Other
from mtpforge.measure.recommendation import AGAIN
from mtpforge.quantize.coverage import Coverage
from mtpforge.report.distance_tables import distances
from mtpforge.report.scores import scores
from mtpforge.search.compared import Compared
from mtpforge.table import markdown, size
from mtpforge.verify.report import Report

REMOVE = """`rm $(grep -l '"steady": false' results/*/measure/*.json)`"""
"""The command that removes the measurements whose speeds were not steady."""
IMPORTANCE = "Importance matrices"
COLUMNS = ("file", "size", "bits/weight", "head", "acceptance", "tokens/s", "n_max")


def summary(
    reports: Iterable[Path],
    measurements: Iterable[Path],
    compared: Iterable[Path] = (),
    others: Iterable[Path] = (),
    coverages: Iterable[Path] = (),
) -> str:
    """A Markdown table with a row for each report, and its speed if it was measured.

    Below are the verdicts on files whose types were found, tables of distances from BF16 and of
    scores, and what importance matrices cover.

    Paths are `reports/...`, `measure/...`, `work/compared/...`, `work/others/...` and
    `work/coverage/...` in the folder of a model, which tells files of the same name apart.
    """
    read = {path: Measurement.read(path) for path in measurements}
    measured = {(path.parent.parent, found.file): found for path, found in read.items()}
    found = [(path.parent.parent, Report.read(path)) for path in reports]
    names = Counter(report.file for _, report in found)
    folders = {folder for folder, _ in found}

    def label(folder: Path, file: str) -> str:
        return f"{folder.name}/{file}" if names[file] > 1 else file

    rows: list[tuple[str, ...]] = [COLUMNS]
    rows += [row(report, measured.get((folder, report.file))) for folder, report in found]
    if any(not _names(folder, report.file) for folder, report in found) and len(folders) > 1:
        models = ["model", *(folder.name for folder, _ in found)]
        rows = [(model, *cells) for model, cells in zip(models, rows, strict=True)]
    judged = [(path.parents[2], Compared.read(path)) for path in compared]
    verdicts = [f"- {label(folder, each.file)}: {each.verdict}\n" for folder, each in judged]
    if not all(each.steady for each in read.values()):
        verdicts.append(f"- not steady: {AGAIN}: {REMOVE}, then `make`\n")
    below = [
        "".join(verdicts),
        distances(read, {path: Other.read(path) for path in others}),
        scores(read),
        _importance(coverages),
    ]
    return "\n".join([markdown(rows), *filter(None, below)])


def _names(folder: Path, file: str) -> bool:
    """Whether a file's name begins with that of its model's folder."""
    return file.removeprefix("mtp-").lower().startswith(folder.name.lower())


def _importance(coverages: Iterable[Path]) -> str:
    """What importance matrices cover; paths are `<folder of a model>/work/coverage/...`."""
    lines = [
        f"- {path.parents[2].name}: {sentence}\n"
        for path in coverages
        for sentence in Coverage.read(path).sentences
    ]
    return "".join([f"{IMPORTANCE}\n\n", *lines]) if lines else ""


def row(report: Report, measured: Measurement | None) -> tuple[str, str, str, str, str, str, str]:
    """The cells of one file."""
    return (
        report.file,
        size(report.bytes),
        f"{report.bits_per_weight:.2f}",
        report.head or "-",
        acceptance(report),
        speed(measured) if measured else "-",
        drafting(measured) if measured else "-",
    )


def acceptance(report: Report) -> str:
    """The share and number of accepted drafts. The report says why a head cannot draft."""
    if report.drafts:
        share = (report.accepted or 0) / report.drafts
        return f"{share:.1%} ({report.accepted}/{report.drafts})"
    if report.not_run:
        return "not run"
    return "-" if report.head in ("none", "") else "not possible"


def drafting(measured: Measurement) -> str:
    """The recommended n_max, with p_min if that is not 0."""
    if measured.recommended_n_max is None:
        return "-"
    stop = f", p_min {measured.recommended_p_min:g}" if measured.recommended_p_min else ""
    cut = " (search cut short)" if measured.cut_short else ""
    return f"{measured.recommended_n_max or 'off'}{stop}{cut}"


def speed(measured: Measurement) -> str:
    """Tokens per second without drafting and with the confirmed pair, even if that is slower."""
    if not measured.by_n_max:
        return "not run"
    if not measured.steady:
        return "not steady"
    speeds = [measured.by_n_max[0], *filter(None, [measured.confirmed])]
    return " → ".join(f"{total.tokens_per_second:.0f}" for total in speeds)
