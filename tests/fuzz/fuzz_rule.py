"""When is a plan invalid? A rule of its own on the file's plain data, which shares no code with the planner.

It knows: every group in one stage, ranks and routes that exist, every action of every microbatch once and on its
route's rank, and an order in which all actions can run (values of earlier groups first, gradients after). It does not
know memory.
"""

from __future__ import annotations

import re
from typing import Any

ACTION = re.compile(r"(\d+)(F|I|W|B|R)(\d+)|\((\d+)F(\d+);(\d+)B(\d+)\)OVERLAP_F_B", re.ASCII)
Part = tuple[int, str, int]


def invalid(plan: Any) -> str:
    """Why a plan's data is no valid plan; empty where this rule finds nothing."""
    try:
        return _invalid(plan)
    except (KeyError, TypeError, IndexError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        return f"not a plan at all: {error!r}"[:100]


def _invalid(plan: Any) -> str:
    problem, stages, routes = plan["problem"], plan["placement"]["stages"], plan["placement"]["routes"]
    groups, ranks, count = problem["groups"], len(problem["topology"]["devices"]), int(problem["num_microbatches"])
    placed = [int(group) for stage in stages for group in stage["groups"]]
    if sorted(placed) != list(range(len(groups))):
        return "groups are not each in one stage"
    if len(routes) != len(stages) or any(len(row) != count for row in routes):
        return "routes do not fit"
    for stage, row in zip(stages, routes, strict=True):
        held = set(map(int, stage["ranks"]))
        if not set(map(int, row)) <= held or not held <= set(range(ranks)):
            return "a route or rank that is not there"
    orders = plan["schedule"]["ranks"]
    if len(orders) != ranks:
        return "not one order for each rank"
    phases = [_phases(problem, stage) for stage in stages]
    at: dict[Part, tuple[int, str, int]] = {}
    queues: dict[tuple[int, str], list[list[Part]]] = {}
    for rank, order in enumerate(orders):
        for stream in ("compute", "collective"):
            queue = queues.setdefault((rank, stream), [])
            for text in (order.get(stream) or "").split():
                parts = _parts(text)
                for part in parts:
                    if part in at:
                        return f"{part} twice"
                    stage, _, microbatch = part
                    if stage >= len(stages) or microbatch >= count or int(routes[stage][microbatch]) != rank:
                        return f"{part} on the wrong rank"
                    at[part] = (rank, stream, len(queue))
                queue.append(parts)
    wanted = {(stage, kind, microbatch) for stage in range(len(stages)) for kind in phases[stage]
              for microbatch in range(count)}
    found = {part for part in at if part[1] != "R"}
    loose = {part for part in found ^ wanted if part[1] in "IW"}  # B stands for whatever of I and W there is
    if (found ^ wanted) - loose:
        return "actions are missing, or too many"
    if any(part not in at and not _covered(part, at) for part in wanted):
        return "a gradient is missing"
    return _stuck(problem, stages, queues)


def _phases(problem: Any, stage: Any) -> str:
    times = [next(iter(problem["groups"][int(group)]["times"].values())) for group in stage["groups"]]
    return "F" + "".join(kind for kind, key in (("I", "i_ns"), ("W", "w_ns"))
                         if any(item[key] is not None for item in times))


def _parts(text: str) -> list[Part]:
    match = ACTION.fullmatch(text)
    if match is None:
        raise ValueError(text)
    if match[1] is None:
        stage, microbatch = int(match[6]), int(match[7])
        return [(int(match[4]), "F", int(match[5])), (stage, "I", microbatch), (stage, "W", microbatch)]
    stage, kind, microbatch = int(match[1]), match[2], int(match[3])
    return [(stage, "I", microbatch), (stage, "W", microbatch)] if kind == "B" else [(stage, kind, microbatch)]


def _covered(part: Part, at: dict[Part, Any]) -> bool:
    stage, kind, microbatch = part
    return kind in "IW" and (stage, "W" if kind == "I" else "I", microbatch) in at


def _stuck(problem: Any, stages: Any, queues: dict[tuple[int, str], list[list[Part]]]) -> str:
    """Run all queues as far as their actions' needs allow."""
    home = {int(group): number for number, stage in enumerate(stages) for group in stage["groups"]}
    feeds: list[set[int]] = [set() for _ in stages]
    gives: list[set[int]] = [set() for _ in stages]
    for edge in problem["edges"]:
        for target in edge["targets"]:
            source, reader = home[int(edge["source"])], home[int(target)]
            if source != reader:
                feeds[reader].add(source)
                if edge["grad_bytes"] is not None:
                    gives[source].add(reader)
    done: set[Part] = set()
    next_of = dict.fromkeys(queues, 0)
    present = {part for queue in queues.values() for parts in queue for part in parts}

    def ready(part: Part, together: list[Part]) -> bool:
        stage, kind, microbatch = part
        def had(wanted: Part) -> bool:
            return wanted in done or wanted in together or wanted not in present
        if kind == "F":
            return all((source, "F", microbatch) in done for source in feeds[stage])
        if kind == "R":
            return (stage, "F", microbatch) in done
        if (stage, "F", microbatch) not in done:
            return False
        if kind == "W" and (stage, "I", microbatch) in present:
            return had((stage, "I", microbatch))
        return all(had((reader, "I", microbatch)) for reader in gives[stage])

    moved = True
    while moved:
        moved = False
        for key, queue in queues.items():
            while next_of[key] < len(queue) and all(ready(part, queue[next_of[key]]) for part in queue[next_of[key]]):
                done.update(queue[next_of[key]])
                next_of[key] += 1
                moved = True
    return "" if all(next_of[key] == len(queue) for key, queue in queues.items()) else "the order deadlocks"
