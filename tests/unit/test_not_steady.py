"""Speeds that are not steady: card, summary and figures say so, and claim no speedup."""

import re
from dataclasses import replace

from example_records import measurement, report, total
from mtpforge.measure.measurement import KindSpeed, Measurement
from mtpforge.publish import serving, tables
from mtpforge.publish.result import Result
from mtpforge.report import figures, summary
from mtpforge.report.svg import Svg
from test_card import gguf

KIND = KindSpeed(
    kind="code",
    form="raw",
    n_max=6,
    p_min=0.75,
    tokens_per_second=141.0,
    without=100.0,
    speedup=1.41,
    acceptance=0.9,
)


def measured(*, steady: bool) -> Measurement:
    """1.41 times as fast with n_max 6 and p_min 0.75, if that can be said."""
    best = replace(total(6, 141.0, 100.0), p_min=0.75)
    found = measurement(
        by_n_max=(total(0, 100.0), total(2, 123.0, 100.0), best),
        by_kind=(KIND,),
        recommended_n_max=6,
        recommended_p_min=0.75,
        verdict="1.41 times as fast as without drafting",
    )
    if steady:
        return found
    return replace(
        found,
        steady=False,
        recommended_n_max=None,
        recommended_p_min=None,
        by_n_max=tuple(replace(each, speedup=None) for each in found.by_n_max),
        by_kind=(replace(KIND, speedup=None),),
        verdict="not steady: 60.0 to 102.0 tokens/s without drafting",
    )


def result(*, steady: bool) -> Result:
    return Result(report("x.gguf"), measured(steady=steady), gguf("x.gguf"))


def words(svg: Svg) -> str:
    return " ".join(re.findall(r">([^<>]+)<", svg.render()))


def cells(table: str) -> dict[str, str]:
    head, _, row, *_ = ([cell.strip() for cell in line.split("|")] for line in table.splitlines())
    return dict(zip(head, row, strict=True))


def test_tables_of_the_card() -> None:
    found = cells(tables.files([result(steady=True)], "x"))
    assert (found["tokens/s"], found["draft"], found["p_min"]) == ("100 → 140", "6", "0.75")
    found = cells(tables.files([result(steady=False)], "x"))
    assert not {"tokens/s", "draft", "p_min"} & found.keys()
    both = [result(steady=False), result(steady=True)]
    assert cells(tables.files(both, "x"))["tokens/s"] == "not steady"
    assert cells(tables.details(both))["tok/s"] == "not steady"
    for steady in (True, False):
        both = tables.sweep(measured(steady=steady)) + tables.kinds(measured(steady=steady))
        assert ("1.41" in both, both.count("speedup")) == (steady, 2 * steady)
        assert ("tok/s" in both) == ("range" in both) == steady and "acceptance" in both


def test_the_summary() -> None:
    assert summary.speed(measured(steady=True)) == "100 → 141"
    assert summary.drafting(measured(steady=True)) == "6, p_min 0.75"
    assert summary.speed(measured(steady=False)) == "not steady"
    assert summary.drafting(measured(steady=False)) == "-"


def test_the_figure_of_speed() -> None:
    text = words(figures.speed([measured(steady=True)]))
    assert "1.41×" in text and "recommended: n_max 6, p_min 0.75" in text
    assert "by kind of prompt, n_max 6, p_min 0.75: code 1.41×" in text
    text = words(figures.speed([measured(steady=False)]))
    assert "×" not in text and "not steady" in text and "recommended" not in text


def with_a_lucky_round() -> Measurement:
    """Another p_min and another n_max were faster in their one round than the confirmed pair."""
    found = measured(steady=True)
    lucky = [replace(total(n_max, 184.0 + n_max, 100.0), repeats=1) for n_max in (6, 8)]
    return replace(found, by_n_max=(*found.by_n_max, *lucky))


def test_the_figures_are_those_of_the_confirmed_pair() -> None:
    found = with_a_lucky_round()
    assert summary.speed(found) == "100 → 141"
    assert found.confirmed is not None and found.confirmed.p_min == 0.75
    assert replace(found, by_kind=()).confirmed == found.by_n_max[-1]
    unlucky = replace(found, by_n_max=(*found.by_n_max[:3], *found.by_n_max[4:]))
    assert figures.drafting([found]).render() == figures.drafting([unlucky]).render()


def test_a_search_that_was_cut_short_is_said() -> None:
    found = replace(measured(steady=True), cut_short=True)
    assert summary.drafting(found) == "6, p_min 0.75 (search cut short)"
    assert "search cut short" in words(figures.speed([found]))
    assert "search cut short" not in words(figures.speed([measured(steady=True)]))
    assert found.as_json()["cut_short"] and "cut_short" not in measured(steady=True).as_json()
    unknown = replace(measured(steady=False), cut_short=True)
    assert summary.drafting(unknown) == "-"


def test_the_figure_by_draft_length_leaves_it_out() -> None:
    both = [measured(steady=True), replace(measured(steady=False), file="y.gguf")]
    assert "y" not in words(figures.FIGURES["drafting"](both)).split()
    assert "Speed was not steady." in words(figures.FIGURES["drafting"](both[1:]))


def test_the_commands_draft_as_in_verification() -> None:
    steady = serving.server_options(result(steady=True))
    assert steady[-4:] == ["--spec-draft-n-max", "6", "--spec-draft-p-min", "0.75"]
    unsteady = serving.server_options(result(steady=False))
    assert unsteady[-2:] == ["--spec-draft-n-max", "1"]
