"""A random model is made once on each host, and every process there gets what it holds of it, to the last bit."""

from __future__ import annotations

import os
from functools import partial
from unittest import mock

import pytest
import torch
from runtime_cases import chain_graph, chain_state, plan_of, problem_of

from mipipe.graphs.errors import InputError
from mipipe.runtime.engine.engine import Engine
from mipipe.runtime.ranks.processes import rank
from mipipe.runtime.weights.host_weights import HostWeights
from mipipe.runtime.weights.pieces import Piece
from mipipe.runtime.weights.weights import _find_any

pytestmark = pytest.mark.distributed

PIECES = {"wide": Piece((4, 6), {1: ((2, 4), (5, 6))})}
WANTED = {1: ["mask", "wide", "scale", "bank[1:2]"], 2: ["spectrum", "none", "absent"], 3: ["half", "wide"]}


def on_hosts(count):
    """Within: this process is one of so many on its host, as torchrun says it."""
    return mock.patch.dict(os.environ, GROUP_RANK=str(rank() // count), LOCAL_RANK=str(rank() % count))


def make(seed):
    """A model of every kind of tensor."""
    torch.manual_seed(seed)
    return {"mask": torch.tensor([True, False, True]), "wide": torch.randn(4, 6).t().contiguous().t(),
            "scale": torch.randn(()), "spectrum": torch.randn(3, dtype=torch.cfloat), "none": torch.empty(0, 4),
            "half": torch.randn(2, 3).bfloat16(), "bank": torch.randn(3, 2, 2, dtype=torch.float64)}


def handed(count):
    """How often this process made the model, what it was handed, and its generator's next number."""
    made = []

    def counted():
        made.append(rank())
        return make(7)

    with on_hosts(count):
        source = HostWeights(counted, 30.0)
    names = WANTED.get(rank(), [])
    state = source.hand_out(names, partial(_find_any, PIECES))
    found = {name: _find_any(PIECES, state, name) for name in names}
    return len(made), found, torch.rand(1).item()


@pytest.mark.parametrize("count, makers", [(4, [1, 0, 0, 0]), (2, [1, 0, 1, 0]), (1, [1, 1, 1, 1])])
def test_one_process_of_a_host_makes_the_model(pool, count, makers):
    answers = pool.run(4, __file__, "handed", count)
    assert [made for made, _, _ in answers] == makers
    state = make(7)
    assert {number for _, _, number in answers} == {torch.rand(1).item()}
    for number, names in WANTED.items():
        found = answers[number][1]
        assert list(found) == names
        for name in names:
            whole = state.get(name.partition("[")[0])
            wanted = whole if name not in ("wide", "bank[1:2]") else whole[1:2] if "bank" in name else \
                torch.cat([whole[:, 2:4], whole[:, 5:6]], 1)
            assert (found[name] is wanted is None) or torch.equal(found[name], wanted), name
            assert wanted is None or found[name].dtype is wanted.dtype


def refused():
    def fail():
        raise InputError(f"graph of m: captured from a module in memory (asked on {rank()})")

    with on_hosts(2), pytest.raises(InputError) as caught:
        HostWeights(fail, 30.0)
    return str(caught.value)


def test_why_it_cannot_be_made_is_said_on_all_processes(pool):
    texts = pool.run(4, __file__, "refused")
    assert [text[-11:] for text in texts] == ["asked on 0)", "asked on 0)", "asked on 2)", "asked on 0)"]


def engine_of_host():
    """Names and weights of this rank's part, and how often the model was made here."""
    graph, made = chain_graph(2), []
    plan = plan_of(problem_of(graph, 2, 2), [([0], [0]), ([1, 2], [1])], [[0, 0], [1, 1]],
                   ["0F0 0F1 0B0 0B1", "1F0 1B0 1F1 1B1"])

    def counted():
        made.append(0)
        return chain_state(2)

    with on_hosts(2):
        engine = Engine(plan, graph, HostWeights(counted, 30.0))
    return len(made), {name: item.detach() for name, item in engine.weights.parameters.items()}


def test_an_engine_takes_its_part(pool):
    """Two copies of two ranks on two hosts."""
    answers = pool.run(4, __file__, "engine_of_host")
    state = chain_state(2)
    assert [made for made, _ in answers] == [1, 0, 1, 0]
    assert {name for _, found in answers for name in found} == set(state)
    for _, found in answers:
        assert len(found) == 1 and all(torch.equal(item, state[name].to(item.dtype)) for name, item in found.items())
