"""Cluster files: sizes, kinds, links, and one clear line for each kind of mistake."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mipipe.graphs.cluster import load_cluster, read_cluster, shipped_kinds
from mipipe.graphs.errors import InputError
from mipipe.graphs.topology import Device, Link, Topology
from mipipe.graphs.units import parse_bytes, parse_flops, parse_ns, parse_rate

GOOD = """
format: mipipe.cluster
version: 1
device_kinds:
  h200x8: {base: h200, count: 8, efficiency: 0.5}
  mine: {flops: {float32: 10TFLOPS}, memory: 16GiB, bandwidth: 1TB/s, launch_overhead: 0us, source: my own bench}
hosts:
  - {name: alpha, devices: 2, kind: h200x8}
  - {name: beta, devices: 1, kind: mine, memory: 8GB}
links:
  within_host: {latency: 2us, bandwidth: 900GB/s}
  between_hosts: {latency: 5us, bandwidth: 50GB/s}
  overrides: {"0->2": {latency: 1ms, bandwidth: 1GB/s}}
"""


def changed(**changes):
    data = yaml.safe_load(GOOD)
    for path, value in changes.items():
        *parents, last = path.split("__")
        place = data
        for part in parents:
            place = place[int(part) if part.isdigit() else part]
        if value is None:
            del place[last]
        else:
            place[last] = value
    return data


def test_a_file_becomes_devices_links_and_kinds(tmp_path):
    path = tmp_path / "cluster.yaml"
    path.write_text(GOOD)
    cluster = load_cluster(path)
    topology = cluster.topology
    assert [device.name for device in topology.devices] == ["alpha/0", "alpha/1", "beta/0"]
    assert [device.local_rank for device in topology.devices] == [0, 1, 0]
    assert topology.devices[0].memory_bytes == 8 * 141 * 10**9
    assert topology.devices[2].memory_bytes == 8 * 10**9
    assert topology.transfer_ns(0, 1, 900_000) == 2_000 + 1_000
    assert topology.occupied_ns(0, 1, 900_000) == 1_000  # latency passes for several transfers at once
    assert topology.transfer_ns(2, 0, 50_000) == 5_000 + 1_000
    assert topology.transfer_ns(0, 2, 1_000) == 1_000_000 + 1_000
    assert set(cluster.kinds) == {"h200x8", "mine"}
    assert cluster.kinds["h200x8"].peak("bfloat16") == 4 * 989 * 10**12
    assert cluster.kinds["h200x8"].bytes_per_s == 4 * 4_800 * 10**9
    assert cluster.kinds["mine"].memory_bytes == 16 * 2**30


def test_shipped_kinds_name_their_source_and_only_cpu_lacks_peaks():
    kinds = shipped_kinds()
    assert set(kinds) == {"h100", "h100_hbm2e", "h200", "h800", "gh200", "a100", "a100_40", "v100", "b200", "b300",
                          "gb200", "gb300", "mi300x", "cpu"}
    assert all(kind.source for kind in kinds.values())
    assert [name for name, kind in kinds.items() if not kind.has_peaks] == ["cpu"]
    # Two public figures as an anchor: arithmetic intensity at which an H100 and an A100 turn compute-bound in bfloat16.
    assert round(kinds["h100"].peak("bfloat16") / kinds["h100"].bytes_per_s) == 295
    assert round(kinds["a100"].peak("bfloat16") / kinds["a100"].bytes_per_s) == 153


def test_the_cpu_kind_has_no_peak_and_needs_its_memory_stated():
    hosts = [{"name": "here", "devices": 4, "kind": "cpu"}]
    with pytest.raises(InputError, match=r"hosts\[0\].*no memory size.*add memory"):
        read_cluster(changed(hosts=hosts, links__overrides={}), "c.yaml")
    cluster = read_cluster(changed(hosts=[{**hosts[0], "memory": "2GiB"}], links__overrides={}), "c.yaml")
    assert cluster.topology.devices[3].memory_bytes == 2 * 2**30
    with pytest.raises(InputError, match="always profiled"):
        cluster.kinds["cpu"].peak("float32")


@pytest.mark.parametrize(("change", "message"), [
    ({"hosts__0__colour": "red"}, r"c.yaml: hosts\[0\]\.colour: unknown key"),
    ({"hosts": [{"name": "alpha", "device": 8, "kind": "h100"}]},
     r"c.yaml: hosts\[0\]\.device: unknown key \(found 8\); missing: hosts\[0\]\.devices$"),
    ({"hosts__0__kind": "h300"}, r"hosts\[0\]\.kind: unknown device kind 'h300'; known are a100"),
    ({"hosts__0__devices": 0}, r"hosts\[0\]\.devices: found 0, expected at least 1"),
    ({"hosts__1__name": "alpha"}, r"hosts\[1\]\.name: two hosts are named 'alpha'"),
    ({"hosts__1__memory": "much"}, r"hosts\[1\]\.memory: found 'much', expected a size"),
    ({"hosts": []}, "no devices"),
    ({"device_kinds__h200x8__base": "h20"}, r"device_kinds\.h200x8\.base: unknown device kind 'h20'"),
    ({"device_kinds__h200x8__efficiency": 1.5}, r"h200x8\.efficiency: found 1.5, expected a share"),
    ({"device_kinds__h200x8__count": 0}, r"h200x8\.count: found 0"),
    ({"device_kinds__mine__achieved": {"product": 0}}, r"c.yaml: achieved: product is 0; expected a share above 0"),
    ({"device_kinds__mine__achieved": {"hidden": 2}}, r"c.yaml: achieved: .* hidden 2, .* a share up to 1"),
    ({"device_kinds__mine__bandwidth": None}, r"device_kinds\.mine: has flops but no bandwidth"),
    ({"device_kinds__mine__launch_overhead": None}, r"device_kinds\.mine: has flops but no launch_overhead"),
    ({"device_kinds__mine__flops": None}, r"device_kinds\.mine: expected base: .* or flops:"),
    ({"links__within_host__bandwidth": "fast"}, r"links\.within_host\.bandwidth: found 'fast'"),
    ({"links__within_host__bandwidth": "0GB/s"}, "expected a rate above 0"),
    ({"links__within_host__latency": None}, r"links\.within_host\.latency"),
    ({"links__within_host": None}, r"links\.within_host: missing, but a host has several devices"),
    ({"links__between_hosts": None}, r"links\.between_hosts: missing, but there are 2 hosts"),
    ({"links__overrides": {"0->7": {"latency": 0, "bandwidth": "1B/s"}}},
     "c.yaml: link '0->7': expected 'a->b' with two device indices below 3"),
    ({"links__overrides": {"00->1": {"latency": 0, "bandwidth": "1B/s"}}}, "link '00->1': expected"),
    ({"links__overrides": {"1->1": {"latency": 0, "bandwidth": "1B/s"}}}, "link '1->1': expected"),
    ({"links__overrides": {"²->1": {"latency": 0, "bandwidth": "1B/s"}}}, "link '²->1': expected"),
    ({"links__within_host__bandwidth": 450}, r"within_host\.bandwidth: found 450, a number without a unit; expected"),
    ({"links__within_host__bandwidth": "450"}, r"bandwidth: found '450', a number without a unit"),
    ({"links__within_host__bandwidth": "450GB"}, "an amount and no amount per second; expected a bandwidth such as"),
    ({"links__within_host__bandwidth": "-1GB/s"}, "found '-1GB/s', which is negative"),
    ({"links__within_host__bandwidth": float("nan")}, "bandwidth: found nan, expected a bandwidth"),
    ({"links__within_host__bandwidth": float("inf")}, "bandwidth: found inf, expected a bandwidth"),
    ({"links__within_host__bandwidth": True}, "bandwidth"),
    ({"links__within_host__latency": 5}, r"within_host\.latency: found 5, a number without a unit; expected a time"),
    ({"links__within_host__latency": 2.5}, "latency: found 2.5, a number without a unit"),
    ({"links__overrides": {"0->2": {"latency": "1ms", "bandwidth": 7}}}, r"overrides\.0->2\.bandwidth: found 7, a"),
    ({"hosts__1__memory": 80}, r"hosts\[1\]\.memory: found 80, a number without a unit; expected a size such as 80GB"),
    ({"hosts__1__memory": "80Gb"}, r"found '80Gb', where Gb is bits \(8 to a byte\)"),
    ({"hosts__1__memory": "80gb"}, "found '80gb', where gb is written in other letters"),
    ({"hosts__1__memory": "1e400GB"}, "which is too large"),
    ({"hosts__1__memory": "9" * 5000}, r"memory: found '9{40,60}\.\.\., expected a size such as 80GB or 16GiB$"),
    ({"hosts__1__memory": "0GB"}, r"hosts\[1\]\.memory: found '0GB', expected more than 0"),
    ({"hosts__1__devices": 10**9}, r"hosts\[1\]\.devices: found 1000000000, expected at most 16384"),
    ({"device_kinds__mine__flops": {"float32": 10}}, r"flops\.float32: found 10, a number without a unit"),
    ({"device_kinds__mine__memory": 16}, r"device_kinds\.mine\.memory: found 16, a number without a unit"),
    ({"device_kinds__mine__bandwidth": "1"}, r"device_kinds\.mine\.bandwidth: found '1', a number without a unit"),
    ({"device_kinds__mine__launch_overhead": 5}, r"launch_overhead: found 5, a number without a unit"),
    ({"device_kinds__mine__efficiency": float("nan")}, "efficiency: found nan, expected a share"),
    ({"device_kinds__mine__efficiency": 1e-300}, "count 1 and efficiency 1e-300 make a rate below 1"),
    ({"device_kinds__mine__flops": {"float32": "1FLOPS"}, "device_kinds__mine__efficiency": 0.1}, "a rate below 1"),
    ({"device_kinds__mine__bandwidth": "1B/s", "device_kinds__mine__efficiency": 0.1}, "make a rate below 1"),
    ({"device_kinds__mine__memory": "4e18B", "device_kinds__mine__count": 16384}, "size too large"),
    ({"format": "other"}, "expected a file of format 'mipipe.cluster'"),
    ({"version": 2}, "reads version 1"),
])
def test_a_mistake_is_named_with_its_place(change, message):
    with pytest.raises(InputError, match=message):
        read_cluster(changed(**change), "c.yaml")


@pytest.mark.parametrize(("text", "bytes_per_s"), [
    ("400Gb/s", 50 * 10**9), ("400Gbps", 50 * 10**9), ("400 Gbit/s", 50 * 10**9), ("50GB/s", 50 * 10**9),
    ("50GBps", 50 * 10**9), ("1GiB/s", 2**30), ("8b/s", 1)])
def test_bits_and_bytes_per_second(text, bytes_per_s):
    """A network card's 400Gb/s is 50 GB/s."""
    cluster = read_cluster(changed(links__between_hosts__bandwidth=text, links__between_hosts__latency=0), "c.yaml")
    assert cluster.topology.between_hosts == Link(0, bytes_per_s)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: Link(-1), "latency_ns -1, expected none below 0"),
    (lambda: Link(0, 0), "bytes_per_s 0, expected a rate above 0"),
    (lambda: Link(0, -5), "bytes_per_s -5, expected a rate above 0"),
    (lambda: Device("a", "cpu", -1), "device 'a': found memory_bytes -1"),
    (lambda: Topology((Device("a", "cpu", 1), Device("a", "cpu", 1)), Link(), Link()), "two devices are named 'a'"),
])
def test_a_topology_in_any_file_is_one_that_can_be(make, message):
    """Problems and plans carry topologies too, without the cluster file's words."""
    with pytest.raises(InputError, match=message):
        make()


@given(st.one_of(st.text(max_size=40), st.integers(), st.floats(), st.booleans(), st.from_regex(
    r"[-+]?[0-9]{1,40}([.][0-9]{0,40})?(e[0-9]{1,4})?[ ]?[kMGT]?i?[bB]?(it)?(/s|ps)?", fullmatch=True)))
def test_a_quantity_is_an_integer_or_one_line(written):
    for parse in (parse_bytes, parse_rate, parse_ns, parse_flops):
        try:
            value = parse(written, "here")
        except InputError as error:
            assert str(error).startswith("here: found ") and "expected a" in str(error)
            assert "\n" not in str(error) and len(str(error)) < 220
        else:
            assert isinstance(value, int) and 0 <= value < 2**62
            assert value == 0 or str(written).strip()[-1].isalpha()


def test_an_absent_file_is_one_line():
    with pytest.raises(InputError, match=r"cannot be read: No such file"):
        load_cluster(Path("absent.yaml"))
