"""``--objective period`` against the zero-bubble paper's printed bubbles, at its settings and twice 1F1B's activations.

    python benchmarks/period.py                      # six settings, 60 s each
    python benchmarks/period.py --seconds 0.25 --rows "8 x 24"

The paper's bubble is ``1 - m (F + B + W) / cost``, where a schedule's cost is the longest span of a rank from its first
action to its last (Qi et al., arXiv 2401.10241, section 4 and tables 3 to 6): steps follow each other without a
barrier, so what is planned is the period (`mipipe.planner.execution.steps`). All stages are equal, each of ``pieces``
equal layers (the models have 2 to 4), every boundary costs T_comm, one copy of the parameters, 2 p activations, each
held until its W (the paper's memory frees a part of it after B). ZB-H1 and ZB-H2 are simulated beside what is printed
for them, so that the two accountings can be seen to agree. No solve starts from a published schedule.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass

from mipipe.planner.execution.steps import period_of
from mipipe.planner.options import PlanOptions
from mipipe.planner.problem import PlanningProblem
from mipipe.planner.problems.uniform import in_units, uniform_problem
from mipipe.planner.schedules import BASELINES
from mipipe.planner.solve import plan
from mipipe.planner.warm import warm


@dataclass(frozen=True)
class Setting:
    """A row of the paper's tables: p stages, m microbatches, times in ms, printed bubbles."""

    model: str
    p: int
    m: int
    f: str
    i: str
    w: str
    comm: str
    zb_h1: float
    zb_h2: float
    zb_2p: float

    @property
    def name(self) -> str:
        return f"{self.model} {self.p} x {self.m}"

    @property
    def work(self) -> float:
        return self.m * (float(self.f) + float(self.i) + float(self.w))

    def problem(self, layers: int) -> PlanningProblem:
        """The setting with equal stages and twice 1F1B's activations."""
        return uniform_problem(ranks=self.p, microbatches=self.m, f=self.f, i=self.i, w=self.w, comm=self.comm,
                               layers=layers, copies=1, activations=2 * self.p)


SETTINGS = (
    Setting("1.5B", 8, 24, "18.522", "18.086", "9.337", "0.601", 0.1585, 0.1083, 0.0433),
    Setting("1.5B", 8, 64, "18.546", "18.097", "9.321", "0.762", 0.0674, 0.0444, 0.0026),
    Setting("6.2B", 8, 32, "29.802", "29.428", "19.53", "0.577", 0.1045, 0.0559, 0.0022),
    Setting("14.6B", 16, 48, "11.347", "11.248", "8.132", "0.377", 0.1397, 0.0672, 0.0066),
    Setting("14.6B", 16, 128, "11.325", "11.308", "8.109", "0.378", 0.0576, 0.0266, 0.0028),
    Setting("28.3B", 32, 128, "10.408", "10.204", "7.703", "0.408", 0.1106, 0.049, 0.0029),
)


def main() -> int:
    """Print the table; 1 where a period's bubble is above ZB-2p's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="", metavar="TEXT", help="only settings with this text in their names")
    parser.add_argument("--seconds", type=float, default=1.0, help="factor on the time limit of 60 s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pieces", type=int, help="layers of a stage (default: 4 on 8 ranks, else 2)")
    arguments = parser.parse_args()
    warm()
    print(f"{'setting':16} {'ZB-H1':>7} {'printed':>7} {'ZB-H2':>7} {'printed':>7} {'ZB-2p':>7} {'period':>7}"
          f" {'at least':>8} {'makespan':>8} {'pieces':>6} {'s':>6}  how", flush=True)
    above = 0
    for setting in SETTINGS:
        if arguments.rows not in setting.name:
            continue
        known = [_bubble(setting, setting.problem(setting.p), period_of(baseline.plan(setting.problem(setting.p),
                                                                                     split=True)))
                 for name in ("ZB-H1", "ZB-H2") for baseline in BASELINES if baseline.name == name]
        pieces = arguments.pieces or (4 if setting.p == 8 else 2)
        problem, began = setting.problem(pieces * setting.p), time.monotonic()
        result = plan(problem, PlanOptions(time_limit_s=60 * arguments.seconds, seed=arguments.seed, objective="period",
                                           use_baselines=False))
        seconds = time.monotonic() - began
        assert result.plan is not None and result.period_ns and result.period_bound_ns and result.makespan_ns
        ours, least, single = (_bubble(setting, problem, time_ns) for time_ns in
                               (result.period_ns, result.period_bound_ns, result.makespan_ns))
        missed = ours > setting.zb_2p
        above += missed
        print(f"{setting.name:16} {known[0]:7.4f} {setting.zb_h1:7.4f} {known[1]:7.4f} {setting.zb_h2:7.4f}"
              f" {setting.zb_2p:7.4f} {ours:7.4f} {least:8.4f} {single:8.4f} {pieces:6} {seconds:6.1f}"
              f"  {result.plan.placement.name}: {', '.join(result.how.order)}{'  ABOVE ZB-2p' if missed else ''}",
              flush=True)
    return int(above > 0)


def _bubble(setting: Setting, problem: PlanningProblem, time_ns: int) -> float:
    return 1 - setting.work / in_units(problem, time_ns)


if __name__ == "__main__":
    sys.exit(main())
