"""The HTML report: one file, no network, all data inside, safe against what names contain."""

from __future__ import annotations

import dataclasses
import json
import re
from html.parser import HTMLParser

from mipipe.cli import html, panels
from mipipe.planner.actions import ActionKind, Stream
from mipipe.planner.execution.lower import lower
from mipipe.planner.execution.simulate import simulate
from mipipe.planner.problems.uniform import uniform_problem
from mipipe.planner.schedules import BASELINES
from mipipe.planner.timeline import Span, Timeline

TIMELINE = Timeline("measured", 2, (
    Span(0, Stream.COMPUTE, ActionKind.F, "0F0", 0, 10, 0, 0),
    Span(0, Stream.CHANNEL, ActionKind.SEND, "0⇒1:0", 10, 14, 0, 0, peer=1),
    Span(1, Stream.COMPUTE, ActionKind.B, "1B0", 14, 30, 1, 0)),
    memory=(((0, 5), (10, 8)), ((0, 5),)), resident_bytes=(5, 5))


def data_of(page: str) -> dict:
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.S)
    assert found is not None
    return json.loads(found[1])


def test_the_page_needs_nothing_else() -> None:
    page = html.page("a plan", [html.Panel("measured", TIMELINE)])
    assert not re.search(r"(src|href)\s*=|@import|url\(|https?://|fetch\(|XMLHttpRequest", page)
    parser = HTMLParser()
    parser.feed(page)
    parser.close()


def test_the_page_holds_the_timeline() -> None:
    panel = data_of(html.page("a plan", [html.Panel("measured", TIMELINE, (20, None))]))["panels"][0]
    assert panel["makespan"] == 30 and panel["origin"] == "measured"
    first, second = panel["ranks"]
    assert [panel["labels"][span[3]] for span in first["compute"]] == ["0F0"]
    assert first["compute"][0][:2] == [0, 10]
    assert first["channel"][0][6] == 1
    assert first["bubble"] == 20 and second["bubble"] == 14
    assert first["memory"] == [[0, 5], [10, 8]] and first["capacity"] == 20
    assert "capacity" not in second


def test_names_cannot_break_the_page() -> None:
    evil = Timeline("simulated", 1, (Span(0, Stream.COMPUTE, ActionKind.F, "</script><b>", 0, 1, 0, 0),))
    page = html.page("<b>&", [html.Panel("</h2>", evil)], [("<i>", "</dd>")])
    assert "<b>&" not in page and "</script><b>" not in page
    assert data_of(page)["panels"][0]["labels"] == ["</script><b>"]


def test_lines_without_memory_or_spans() -> None:
    panel = data_of(html.page("empty", [html.Panel("nothing", Timeline("simulated", 1, ()))]))["panels"][0]
    assert panel["ranks"][0]["compute"] == [] and "memory" not in panel["ranks"][0]


def test_no_bytes_where_the_problem_counts_none() -> None:
    """A problem in people's own units has shares of a model, not bytes; one in bytes keeps them."""
    problem = uniform_problem(ranks=2, microbatches=2, f=1, i=1, w=1)
    plan = BASELINES[1].plan(problem, split=True)
    timeline = simulate(plan, lower(plan))
    panel = data_of(html.page("units", [panels.panel_of("simulated", timeline, plan)]))["panels"][0]
    assert [rank["peak_text"] for rank in panel["ranks"]] == ["1 copy, 2 activations", "1 copy, 1 activation"]
    assert panel["size_unit"] > 0 and all("capacity" not in rank for rank in panel["ranks"])
    sized = dataclasses.replace(plan, problem=problem.replace(unit_ns=1))
    panel = data_of(html.page("bytes", [panels.panel_of("simulated", timeline, sized)]))["panels"][0]
    assert panel["size_unit"] == 0 and panel["ranks"][0]["peak_text"].endswith("B")
    assert "kB" not in html.frontier([(3, 0.1, 0.0, "v")], lambda size: f"{size} activations")


def test_stages_have_names_and_pale_ones_a_legend() -> None:
    problem = uniform_problem(ranks=2, microbatches=2, f=1, i=1, w=1)
    plan = next(row for row in BASELINES if row.name == "ZB-V").plan(problem, split=True)
    page = html.page("names", [panels.panel_of("simulated", simulate(plan, lower(plan)), plan)])
    panel = data_of(page)["panels"][0]
    assert panel["stages"] == ["layer0", "layer1", "layer2", "layer3"]
    spans = [span for rank in panel["ranks"] for span in rank["compute"]]
    assert {(span[7], span[5]) for span in spans} == {(0, 0), (3, 1), (1, 0), (2, 1)}  # the second of a rank is pale
    assert "pale: every second stage of its rank" in page
