"""Links are measured between real processes and written as a cluster file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from mipipe.cli.main import app
from mipipe.graphs.cluster import load_cluster
from mipipe.graphs.topology import Link, Topology
from mipipe.runtime.train.links import SIZES, MeasuredLink, _summary, measure_links, write_cluster

CLUSTER = """format: mipipe.cluster
version: 1
hosts: [{name: here, devices: 2, kind: cpu, memory: 1GB}]
links: {within_host: {latency: 1us, bandwidth: 1GB/s}}
"""


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    path = tmp_path / "cluster.yaml"
    path.write_text(CLUSTER)
    return path


def test_a_class_of_links_has_the_median_of_its_pairs(cluster: Path) -> None:
    link = _summary([(100.0, 1e9), (300.0, 2e9), (200.0, 3e9)])
    assert link == MeasuredLink(200, 2 * 10**9, 3, 0.5)
    write_cluster(cluster, cluster, {"within_host": link})
    assert load_cluster(cluster).topology.within_host == Link(200, 2 * 10**9)


def test_what_is_missing_is_named(cluster: Path) -> None:
    result = CliRunner().invoke(app, ["calibrate", "links", "--cluster", str(cluster)])
    assert result.exit_code == 1 and "expected --cluster CLUSTER.yaml" in result.output
    result = CliRunner().invoke(app, ["calibrate", "measured.json"])
    assert result.exit_code == 1 and "needs --plan and --costs" in result.output


def measured(sizes, together):
    """What two ranks measure of their link; all ranks get the same."""
    return measure_links(Topology.uniform(2), torch.device("cpu"), 5, sizes, together)


@pytest.mark.distributed
def test_messages_of_several_sizes_and_several_for_each_wait(pool):
    """As a GPU's are: the rate is what the largest message adds to the one before it."""
    assert SIZES["cuda"][-2] >= 64 << 20
    first, second = pool.run(2, __file__, "measured", (8, 1 << 16, 1 << 20), 3)
    assert first == second and set(first) == {"within_host"}
    assert 10**3 < first["within_host"].latency_ns < 10**9 and first["within_host"].bytes_per_s > 10**6


@pytest.mark.distributed
@pytest.mark.slow
def test_two_ranks_on_one_host(cluster: Path, tmp_path: Path) -> None:
    made = tmp_path / "measured.yaml"
    result = CliRunner().invoke(app, ["calibrate", "links", "--cluster", str(cluster), "-o", str(made)])
    assert result.exit_code == 0, result.output
    link = load_cluster(made).topology.within_host
    assert 1_000 < link.latency_ns < 10**9 and link.bytes_per_s is not None and link.bytes_per_s > 10**6
