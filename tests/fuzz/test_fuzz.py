"""Mutants of every kind of file through every verb that reads it: one line or a result, and never a run of code.

`FUZZ_CASES` in the environment sets how many mutants the slow test makes (20,000 by default), `FUZZ_KINDS` which kinds.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fuzz_mutate as mutants
import fuzz_rule as rule
import fuzz_run as runs
import fuzz_seeds as seeds
import pytest

from mipipe.planner.devices.compiled import compile_kernels

CASES = int(os.environ.get("FUZZ_CASES", "20000"))
ONLY = os.environ.get("FUZZ_KINDS", "")
GROUPS: dict[str, Callable[[Path], list[seeds.Kind]]] = {
    "plans": seeds.plan_kinds, "experts": seeds.expert_kinds, "merges": seeds.merge_kinds, "graphs": seeds.graph_kinds}
PLANS = {("plan", "check"), ("fitting", "check"), ("fitting", "train")}
"""Where what `fuzz_rule` calls invalid must be refused."""
SHARES = {"plans": 0.4, "experts": 0.2, "merges": 0.15, "graphs": 0.25}


def encoded(kind: seeds.Kind, data: Any) -> bytes:
    """Data as a file of the kind."""
    writers = {"yaml": mutants.write_yaml, "jsonl": seeds.lines, "npy": seeds.numpy_file,
               "safetensors": lambda header: seeds.safetensors(header, seeds.model_header()[1])}
    return writers.get(kind.ending, mutants.write_json)(data)


def content(kind: seeds.Kind, chance: random.Random) -> tuple[bytes, Any]:
    """A mutant's bytes, and its data where only data were changed."""
    if chance.random() < 0.2:
        if kind.ending == "npy":
            good = bytearray(encoded(kind, kind.data))
            for _ in range(chance.choice((1, 2, 8))):
                good[chance.randrange(len(good))] = chance.randrange(256)
            return bytes(good[:chance.choice((len(good), chance.randrange(len(good))))]), None
        text = encoded(kind, kind.data).decode() if kind.ending in ("yaml", "jsonl") else json.dumps(kind.data)
        raw = mutants.damage(text, chance)
        return (struct.pack("<Q", len(raw)) + raw + bytes(seeds.model_header()[1]) if kind.ending == "safetensors"
                else raw), None
    data = mutants.mutate(kind.data, chance)
    return encoded(kind, data), data


def run_verb(arguments: list[Any], seconds: float = runs.SECONDS) -> runs.Outcome:
    """A verb; for those that would start workers or trace a model, the part that reads the file."""
    if arguments[0] == "JOB":
        return runs.run_function(read_job, *arguments[1:], seconds=seconds)
    if arguments[0] == "TAGS":
        return runs.run_function(read_tags, arguments[1], seconds=seconds)
    if arguments[0] == "CONFIG":
        return runs.run_function(read_model, arguments[1], seconds=seconds)
    return runs.run(arguments, seconds)


def read_job(plan: Path, graph: Path, config: Path) -> None:
    """What `mipipe train` does before it starts workers, and what a worker makes of the graph's text."""
    from mipipe.graphs.operator_graph import Phase
    from mipipe.graphs.tracing.trace import build_phase
    from mipipe.runtime.train.launching.prepare import check_saving
    from mipipe.runtime.train.launching.prepare import read_job as read

    job = read(plan, graph, config)
    check_saving(job.config, False)
    for trace in job.graph.traces:
        for phase in Phase:
            build_phase(trace, phase)


def read_tags(file: Path) -> None:
    """What `mipipe capture --tags` does with the file."""
    from mipipe.graphs.capture.annotate import load_patterns, tag

    patterns = load_patterns(file)
    for name in ("layers.0.first", "embed", "last"):
        tag(name, (patterns,))


def read_model(file: Path) -> None:
    """What `mipipe capture FOLDER` does before it builds the model."""
    from mipipe.graphs.models.configuration import read_model_config
    from mipipe.graphs.models.families import model_class

    model_class(read_model_config(file.parent, {}))


def attack(folder: Path, kinds: list[seeds.Kind], count: int, seed: int) -> tuple[int, list[str]]:
    """Run ``count`` mutants; how many ran, and what was wrong with any, with the mutant kept beside."""
    chance = random.Random(seed)
    pairs = [(kind, name) for kind in kinds for name in kind.verbs]
    weights = [kind.weight / len(kind.verbs) for kind, _ in pairs]
    wrong: list[str] = []
    codes: dict[tuple[str, int], int] = {}
    runs.watch()
    for number in range(count):
        kind, verb = chance.choices(pairs, weights)[0]
        raw, data = content(kind, chance)
        path = folder / (kind.place or f"mutant.{kind.ending}")
        kept = path.read_bytes() if path.exists() else None
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(raw)
        try:
            outcome = run_verb(kind.verbs[verb](path))
        finally:
            if kept is not None:
                path.write_bytes(kept)
        fault = outcome.wrong
        codes[kind.name, outcome.code] = codes.get((kind.name, outcome.code), 0) + 1
        if not fault and (kind.name, verb) in PLANS and data is not None and outcome.code == 0:
            why = rule.invalid(data)
            fault = f"check accepts a plan that is invalid: {why}" if why else ""
        if fault:
            shutil.copy(path, folder / f"wrong-{number}.{kind.ending}") if kept is None else \
                (folder / f"wrong-{number}.{kind.ending}").write_bytes(raw)
            wrong.append(f"{kind.name} {verb} {folder}/wrong-{number}.{kind.ending}: {fault}")
    print(", ".join(f"{name} ended {times} times with {code}" for (name, code), times in sorted(codes.items())))
    return count, wrong


def prepare(folder: Path, group: str) -> list[seeds.Kind]:
    kinds = [kind for kind in GROUPS[group](folder) if not ONLY or kind.name in ONLY.split(",")]
    for kind in kinds:
        path = folder / (kind.place or f"mutant.{kind.ending}")
        path.parent.mkdir(exist_ok=True)
        raw = encoded(kind, kind.data)
        kept = path.read_bytes() if path.exists() else None
        path.write_bytes(raw)
        for name, verb in kind.verbs.items():  # the seed itself must pass, or its mutants would test nothing
            outcome = run_verb(verb(path), 200)  # the first of each imports and compiles
            assert not outcome.wrong and outcome.code == 0, f"{kind.name} {name}: {outcome}"
        if kept is not None:
            path.write_bytes(kept)
    return kinds


def report(wrong: list[str]) -> str:
    """The faults, those alike once."""
    kinds: dict[str, list[str]] = {}
    for line in wrong:
        place = line.rpartition(" at ")[2] if " at " in line else line.partition(": ")[2][:60]
        kinds.setdefault(line.partition(" ")[0] + place, []).append(line)
    return "\n".join(f"{len(lines)} x {lines[0]}" for lines in sorted(kinds.values(), key=len, reverse=True))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("group", GROUPS)
def test_no_mutant_breaks_a_verb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: str) -> None:
    monkeypatch.chdir(tmp_path)
    compile_kernels()  # else `place` starts a process to do so, and what mutants start is what is looked for
    kinds = prepare(tmp_path, group)
    count, wrong = attack(tmp_path, kinds, int(CASES * SHARES[group]), int(os.environ.get("FUZZ_SEED", "1")))
    assert not wrong, f"{len(wrong)} of {count}:\n{report(wrong)}"


def test_the_rule_knows_good_plans_from_bad(tmp_path: Path) -> None:
    """Else no mutant could show that the check is wrong."""
    plan = next(kind.data for kind in seeds.plan_kinds(tmp_path) if kind.name == "plan")
    assert rule.invalid(plan) == ""
    first = plan["schedule"]["ranks"][0]
    order = first["compute"].split()
    found = set()
    for changed in (order[1:], [*order, order[0]], order[::-1], [*order[:-1], "7F0"], [*order[:-1], "0F99"],
                    [order[-1], *order[:-1]], [action.replace("0F0", "1F0") for action in order], []):
        first["compute"] = " ".join(changed)
        why = rule.invalid(plan)
        assert why, changed
        found.add(why)
    assert len(found) >= 4
    first["compute"] = " ".join(order)
    for place, value in (("stages", plan["placement"]["stages"][:1]), ("routes", [[0, 0, 0, 5]] * 2)):
        kept, plan["placement"][place] = plan["placement"][place], value
        assert rule.invalid(plan)
        plan["placement"][place] = kept
    assert rule.invalid(plan) == ""


def test_a_count_of_layers_may_be_anything(tmp_path: Path) -> None:
    """In a configuration that a merge reads for other things, too."""
    kind = next(kind for kind in seeds.merge_kinds(tmp_path) if kind.name == "config")
    for value in ("x" * 5000, "2", [], {"a": 1}, -1, 1e308, True, None):
        (tmp_path / kind.place).write_bytes(mutants.write_json({**kind.data, "num_hidden_layers": value}))
        for verb in kind.verbs.values():
            outcome = run_verb(verb(tmp_path), 200)
            assert not outcome.wrong and outcome.code in (0, 1), f"{value!r:.20}: {outcome}"


def test_a_few_mutants_of_plans_and_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The quick part of the above, with verbs that take milliseconds."""
    monkeypatch.chdir(tmp_path)
    kinds = [kind for kind in prepare(tmp_path, "plans") if kind.name != "problem"]
    count, wrong = attack(tmp_path, kinds, 300, 7)
    assert not wrong, f"{len(wrong)} of {count}:\n{report(wrong)}"
