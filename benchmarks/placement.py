"""The placement benchmark's workloads: value, bound, gap, seconds and best value known, one line each.

    python benchmarks/placement.py DIR                     # all throughput files, 60 s each
    python benchmarks/placement.py DIR --match resnet50    # some
    python benchmarks/placement.py DIR --contiguous        # the throughput files, contiguous
    python benchmarks/placement.py DIR --judge DIR/evaluate.py

DIR holds files named ``<objective>.<granularity>.<model>.json`` in the format of
`mipipe.planner.devices.instances.instance`; they are read in place. With ``--judge`` a program that reads workload and
assignment, prints JSON and exits 0 for a feasible assignment checks every line. A value above the best known is marked,
never hidden, and so is a lost proof.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from mipipe.planner.devices.instances.instance import read_instance
from mipipe.planner.devices.place import PlaceResult, place

BEST_KNOWN = {  # value, contiguous value, whether a proof of the value is known
    "throughput.operator.bert_l-3_inference": (21.9084, 27.9186, True),
    "throughput.operator.bert_l-3_training": (54.2074, 65.3031, True),
    "throughput.operator.bert_l-6_inference": (28.3322, 29.5795, True),
    "throughput.layer.bert24_training": (39.7895, 41.7458, True),
    "throughput.layer.resnet50_inference": (33.3007, 33.7747, False),
}
SECONDS = 60.0


def main() -> int:
    """Print the table; 1 if a value is above the best known, a proof was lost or the judge objects."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--match", default="", help="only files whose name contains this")
    parser.add_argument("--contiguous", action="store_true")
    parser.add_argument("--seconds", type=float, default=1.0, help="factor on every time limit")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--judge", type=Path, help="program that checks an assignment")
    arguments = parser.parse_args()
    files = [path for path in sorted(arguments.folder.glob("throughput.*.json"), reverse=True)
             if arguments.match in path.name]
    print(f"{'workload':40} {'value':>9} {'bound':>9} {'gap':>7} {'best known':>10} {'s':>6}  found by", flush=True)
    missed = 0
    for path in files:
        result = place(read_instance(path), contiguous=arguments.contiguous, time_limit_s=SECONDS * arguments.seconds,
                       seed=arguments.seed, threads=arguments.threads)
        value, contiguous, proof = BEST_KNOWN.get(path.stem, (None, None, False))
        known = contiguous if arguments.contiguous else value
        notes = [result.method]
        if known is not None and round(result.objective, 4) > known:
            notes.append("ABOVE THE BEST KNOWN")
        if proof and result.gap != 0:
            notes.append("NOT PROVEN")
        missed += len(notes) > 1
        if arguments.judge is not None:
            told = judged(arguments.judge, path, result, "contig" if arguments.contiguous else "noncontig")
            notes.append(told)
            missed += told != "judge agrees"
        print(f"{path.stem:40} {result.objective:9.4f} {result.bound:9.4f}"
              f" {'-' if result.gap is None else f'{result.gap:.2%}':>7}"
              f" {'-' if known is None else known:>10} {result.seconds:6.1f}  {', '.join(notes)}", flush=True)
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")
    return int(missed > 0)


def judged(judge: Path, workload: Path, result: PlaceResult, mode: str) -> str:
    """What an independent program says of an assignment."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump({"assignment": result.assignment}, file)
        file.flush()
        ended = subprocess.run([sys.executable, str(judge), str(workload), file.name, "--brief", "--require", mode],
                               capture_output=True, text=True)
    data = json.loads(ended.stdout)
    value = data.get("max_load")
    if ended.returncode or value is None or abs(value - result.objective) > 1e-6 * result.objective:
        return f"JUDGE OBJECTS: {data.get('violations')}, value {value}"
    return "judge agrees"


if __name__ == "__main__":
    sys.exit(main())
