"""The HTML report: one file, no network, all data inside, safe against what names contain."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from mipipe.cli.printing import html, panels
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


EVIL = ("%DATA%", "%TITLE%%EXTRA%%FACTS%", "<!--<script>", "-->", "</script>", "<script>alert(1)</script>", "]]>",
        "&lt;", "\u2028", "</title><b>", "\\u003c", "<img src=x onerror=alert(1)>", "$&", "\\1", "\\g<0>", "${x}", "`")


@pytest.mark.parametrize("evil", EVIL)
def test_no_text_leaves_its_place(evil: str) -> None:
    """A title, a fact, a panel's title, a label, a table's cell: each comes out as it went in, wherever it stands."""
    timeline = Timeline("simulated", 1, (Span(0, Stream.COMPUTE, ActionKind.F, evil, 0, 1, 0, 0),))
    page = html.page(evil, [html.Panel(evil, timeline)], [(evil, evil)], html.html_table([evil], [[evil]]))
    plain = html.page("t", [html.Panel("t", TIMELINE)], [("t", "t")], html.html_table(["t"], [["t"]]))

    class Reader(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.tags: list[str] = []
            self.texts: list[str] = []

        def handle_starttag(self, tag: str, attributes: object) -> None:
            self.tags.append(tag)

        def handle_data(self, data: str) -> None:
            self.texts.append(data)

    found, expected = Reader(), Reader()
    found.feed(page)
    expected.feed(plain)
    assert found.tags == expected.tags  # no element more, none less
    assert found.texts.count(evil) == 6  # title, heading, fact's name and value, table's head and cell
    assert page.count('<script id="data"') == 1
    panel = data_of(page)["panels"][0]
    assert panel["labels"] == [evil] and panel["title"] == evil
    script = re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.S)
    assert script is not None and not re.search("[<>&]", script[1])


def test_a_browser_shows_it(tmp_path: Path) -> None:
    """Where there is a Chromium: the script runs to its end on hostile labels, and nothing else runs."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium here")
    spans = tuple(Span(0, Stream.COMPUTE, ActionKind.F, evil, number, number + 1, 0, number)
                  for number, evil in enumerate(EVIL))
    title = "<script>document.title='RAN'</script>%DATA%"
    html.write(tmp_path / "page.html", title, [html.Panel("%DATA%<!--<script>", Timeline("simulated", 1, spans))],
               [("<b>", "<i>")])
    done = subprocess.run([browser, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=2000",
                           f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", f"file://{tmp_path / 'page.html'}"],
                          capture_output=True, text=True, timeout=120)
    text = done.stdout
    assert "<canvas" in text and "idle (bubble)" in text  # made by the script, at its start and its end
    assert "%DATA%&lt;!--&lt;script&gt;<small>simulated: makespan" in text
    assert "<title>&lt;script&gt;" in text and "RAN</title>" not in text


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
