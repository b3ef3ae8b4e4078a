"""Collectives against their closed forms, on one level and on two."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mipipe.graphs.cluster import shipped_kinds, uniform_cluster
from mipipe.graphs.costs.collectives import MESSAGE_NS, Fabric, Level, collective_ns, fabric_of
from mipipe.graphs.efficiency import Achieved, phase_seconds
from mipipe.graphs.errors import InputError
from mipipe.graphs.modes import CollectiveKind, PhaseWork, Product
from mipipe.graphs.topology import Link

ONE = Fabric((Level("host", 8, Link(1000, 10**9)),))
TWO = Fabric((Level("host", 8, Link(1000, 10**11)), Level("network", 64, Link(10_000, 10**10))))
REDUCE, GATHER, SCATTER, EXCHANGE = CollectiveKind


@pytest.mark.parametrize("kind, expected", [
    (GATHER, 7 * 1000 + 7 / 8 * 8_000_000), (EXCHANGE, 7 / 8 * 8_000_000 + 1000 + 7 * MESSAGE_NS),
    (REDUCE, min(14 * 1000 + 14 / 8 * 8_000_000, 2 * 3 * 1000 + 2 * 8_000_000))])
def test_one_level(kind, expected):
    """8 MB at 1 GB/s: a ring of eight sends 7/8 of it, an all-reduce twice that; its tree is three deep."""
    bytes_of = {REDUCE: 8_000_000, GATHER: 8_000_000, EXCHANGE: 8_000_000}
    assert collective_ns(ONE, kind, bytes_of[kind], 8) == pytest.approx(expected, abs=1)


def test_small_all_reduces_take_the_tree():
    assert collective_ns(ONE, REDUCE, 8, 8) == pytest.approx(2 * 3 * 1000, abs=20)


def test_members_of_a_host_share_its_adapters():
    """16 members, 8 on each of two hosts: eight adapters of 10 GB/s carry the ring; one on each host: one adapter."""
    together, apart = (collective_ns(TWO, GATHER, 16 * 10**6, members, stride) for members, stride in ((16, 1), (2, 8)))
    assert together == pytest.approx(15 * 10_000 + 15 / 16 * 16e6 / 80, rel=1e-6)
    assert apart == pytest.approx(10_000 + 16e6 / 2 / 10, rel=1e-6)


def test_a_row_crosses_to_a_host_once():
    """With many experts per token most rows that go to a host go there together."""
    plain, eight = (collective_ns(TWO, EXCHANGE, 64 * 10**6, 64, fanout=fanout) for fanout in (1, 8))
    wire = 64e6 * 56 / 64 / 10
    rest = 10_000 + 63 * MESSAGE_NS
    assert plain == pytest.approx(wire + rest, rel=1e-6)
    assert eight == pytest.approx(8 * (1 - (7 / 8) ** 8) / 8 * wire + rest, rel=1e-6)


@given(st.sampled_from(list(CollectiveKind)), st.integers(1, 10**9), st.integers(1, 64), st.sampled_from([1, 2, 8]))
def test_more_bytes_never_take_less_and_one_member_nothing(kind, size, members, stride):
    now, more = (collective_ns(TWO, kind, number, members, stride) for number in (size, 2 * size))
    assert (now == more == 0) if members == 1 else 0 < now <= more


def test_levels_of_a_cluster():
    found = fabric_of(uniform_cluster("h100", 64).topology)
    assert [(level.name, level.size) for level in found.levels] == [("host", 8), ("network", 64)]
    share = shipped_kinds()["h100"].achieved.link
    assert found.levels[1].link.bytes_per_s == pytest.approx(share * 50e9)
    assert [count for _, count in found.counts(64, 1)] == [8, 8]
    assert [(level.name, count) for level, count in found.counts(8, 8)] == [("network", 8)]
    assert len(fabric_of(uniform_cluster("h100", 8).topology).levels) == 1


@pytest.mark.parametrize("arguments, message", [
    (("h101", 8), "'h101': unknown device kind; known are"), (("cpu", 8), "its links and memory are not known"),
    (("h100", 12), "a multiple of those on a host"), (("h100", 0), "expected 1 to")])
def test_clusters_that_are_none(arguments, message):
    with pytest.raises(InputError, match=message):
        uniform_cluster(*arguments)


def test_products_take_the_longest_of_work_bytes_and_launch():
    """Narrow products reach n / (n + half) of their share; the other kernels their bytes, or their launches."""
    shares = Achieved(product=0.5, half=100.0, attention=0.25, memory=0.5)
    assert shares.share("aten.mm", 100) == 0.25
    products = Product("aten.mm", 10**9, 1000, 100, 2), Product("mipipe.attention", 10**9, 0, 1)
    work = PhaseWork(3 * 10**9, 5000, 4, 0, products)
    found = phase_seconds(work, shares, flops=10**12, bytes_per_s=10**9, launch_ns=1000)
    assert found == pytest.approx(2 * 10**9 / 0.25e12 + 10**9 / 0.25e12 + 3000 / 0.5e9)
    assert phase_seconds(work, shares, flops=10**12, low="float8", low_flops=2 * 10**12, bytes_per_s=10**9,
                         launch_ns=10**10) == pytest.approx(40.0)
