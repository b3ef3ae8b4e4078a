"""Clocks of a measured step: the events of a device beside the host's, behind one interface."""

from __future__ import annotations

import dataclasses
import json
import time

import pytest
import torch
from runtime_cases import chain_batch, chain_graph, chain_state, plan_of, problem_of

from mipipe.graphs.costs.table import CostTable
from mipipe.graphs.errors import TimelineError
from mipipe.planner.calibrate import calibrate
from mipipe.planner.timeline import Timeline
from mipipe.runtime.checkpoints.checkpoint_folder import complete
from mipipe.runtime.engine import engine as engines
from mipipe.runtime.engine.clock import EventClock, HostClock, clock_for
from mipipe.runtime.engine.engine import Engine
from mipipe.runtime.train import step_reports, training
from mipipe.runtime.train.config import CheckpointConfig, TrainConfig
from mipipe.runtime.train.data import Batches
from mipipe.runtime.train.trace import measured_timeline


class Device:
    """A device whose queue runs behind the host: what is launched takes ``cost_ns`` there, and nothing here."""

    def __init__(self, cost_ns: int) -> None:
        self.cost_ns, self.now_ns, self.recorded = cost_ns, 0, 0

    def event(self):
        device = self

        class Event:
            def record(self):
                device.recorded += 1
                device.now_ns += device.cost_ns
                self.at_ns = device.now_ns

            def elapsed_time(self, later):
                return (later.at_ns - self.at_ns) / 1e6

        return Event()


def one_rank(count=2):
    graph = chain_graph(2)
    problem = problem_of(graph, count, 1)
    order = " ".join(f"0F{m} 0B{m}" for m in range(count))
    return plan_of(problem, [([0, 1, 2], [0])], [[0] * count], [order]), graph


@pytest.fixture
def on_device(monkeypatch):
    """The engine's measured step on a device of the test's, and what that device saw."""
    def build(cost_ns):
        device = Device(cost_ns)
        monkeypatch.setattr(engines, "clock_for", lambda given, measuring:
                            EventClock(device.event, lambda: None) if measuring else HostClock())
        plan, graph = one_rank()
        return Engine(plan, graph, chain_state(2)), plan, device
    return build


def test_spans_are_the_devices(on_device):
    """Every action lasts as long as the device took between its marks, in the host's nanoseconds after the anchor."""
    cost = 3_000_000
    engine, _, device = on_device(cost)
    engine.measuring = True
    before = time.perf_counter_ns()
    engine.step(chain_batch(2))
    assert engine.record.clock == "events"
    assert [end - start for _, start, end in engine.record.events] == [cost] * 4
    assert all(start >= before for _, start, _ in engine.record.events)
    assert device.recorded == 1 + 2 * 4
    timeline = measured_timeline(engine)
    assert timeline.notes["clock"] == "events" and timeline.in_device_time
    assert timeline.makespan_ns == 7 * cost
    assert timeline.bubble_ratio == pytest.approx(3 / 7)


def test_other_steps_cost_no_event(on_device):
    engine, _, device = on_device(10**6)
    engine.step(chain_batch(2))
    engine.evaluate(chain_batch(2))
    assert engine.record.clock == "host" and not device.recorded


def test_which_device_has_which_clock():
    """Only a measured step, and only where the host does not wait for the device."""
    for name, measuring, kind in (("cpu", True, "host"), ("cpu", False, "host"), ("cuda", False, "host"),
                                  ("cuda", True, "events")):
        assert clock_for(torch.device(name), measuring).kind == kind


def test_a_timeline_of_launches_is_refused(on_device):
    """By `calibrate`; the same times taken by events, or on a CPU, are not refused for it."""
    engine, plan, _ = on_device(10**6)
    engine.step(chain_batch(2))
    timeline = measured_timeline(engine)
    costs = CostTable(plan.problem.graph_digest, (), "test")
    launched = dataclasses.replace(timeline, notes={**timeline.notes, "device": "cuda"})
    assert not launched.in_device_time
    with pytest.raises(TimelineError, match="run on cuda was taken by the host's clock, which says when work was"):
        calibrate(plan, launched, costs)
    taken = dataclasses.replace(launched, notes={**launched.notes, "clock": "events"})
    assert taken.in_device_time and timeline.in_device_time
    assert Timeline("measured", 1, ()).in_device_time


def endless():
    while True:
        yield chain_batch(2)


@pytest.mark.parametrize("fault", [None, RuntimeError("the peer has gone"), OSError(28, "No space left on device")])
def test_the_timeline_comes_after_the_checkpoint_and_ends_no_run(on_device, monkeypatch, tmp_path, fault):
    """The last checkpoint is complete when clocks are compared; where that fails, the run has its losses, and its last
    record, and says so."""
    engine, _, _ = on_device(10**6)
    config = TrainConfig(2, metrics=str(tmp_path / "metrics.jsonl"), timeline=str(tmp_path / "timeline.json"),
                         checkpoint=CheckpointConfig(str(tmp_path / "saved")))
    seen, said = [], []

    def taken(given):
        seen.append(complete(tmp_path / "saved"))
        if fault is not None:
            raise fault
        return measured_timeline(given)

    monkeypatch.setattr(step_reports, "measured_timeline", taken)
    losses = training.Trainer(engine, config, Batches(endless()), say=said.append).run()
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 2 and [record["step"] for record in records] == [1, 2]
    assert [len(folders) for folders in seen] == [1]
    if fault is None:
        assert records[1]["bubble_ratio/measured"] > 0 and not said and (tmp_path / "timeline.json").exists()
    else:
        assert "bubble_ratio/measured" not in records[1]
        assert said == [f"the timeline of the last step could not be taken: {fault}"]


def test_who_wants_no_times_is_not_measured(on_device, monkeypatch):
    engine, _, device = on_device(10**6)
    monkeypatch.setattr(step_reports, "measured_timeline", lambda given: pytest.fail("measured"))
    assert len(training.Trainer(engine, TrainConfig(2), Batches(endless())).run()) == 2
    assert not device.recorded
