"""``mipipe calibrate links``: latency and bandwidth between the devices of a cluster, measured by their processes."""

from __future__ import annotations

import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from mipipe.cli.output import emit, stdout
from mipipe.graphs.cluster import load_cluster
from mipipe.graphs.errors import InputError, RunError
from mipipe.graphs.serialize import to_data
from mipipe.runtime.train.launch import running


def measure_links(cluster: Path | None, output: Path | None, torchrun: str, json_output: bool) -> None:
    """Measure the links of a cluster: one process for each device, started here unless ``torchrun`` says where."""
    if cluster is None or output is None:
        raise InputError("calibrate links: expected --cluster CLUSTER.yaml, whose devices take part, and --output, the"
                         " cluster file to write")
    count = load_cluster(cluster).topology.num_devices
    flags = shlex.split(torchrun) or ["--standalone", "--nproc-per-node", str(count)]
    with tempfile.TemporaryDirectory(prefix="mipipe-links-", ignore_cleanup_errors=True) as logs:
        command = [sys.executable, "-m", "torch.distributed.run", "--log-dir", logs, *flags, "-m",
                   "mipipe.runtime.train.links", str(cluster), "-o", str(output)]
        with running(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            out, errors = process.communicate()
    if process.returncode:
        lines = [line for line in errors.splitlines() if line.startswith("mipipe: error: ")] or ["mipipe: error:"
                 " calibrate links: " + " / ".join(errors.strip().splitlines()[-2:])]
        raise RunError(lines[0].removeprefix("mipipe: error: "))
    if json_output:
        topology = load_cluster(output).topology
        emit({"output": str(output), "within_host": to_data(topology.within_host),
              "between_hosts": to_data(topology.between_hosts)})
    else:
        stdout().print(out.strip(), f"wrote {output}", sep="\n")
