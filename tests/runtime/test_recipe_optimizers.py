"""REG and Muon: closed forms, laws, matrices in parts, and the same weights under a plan with copies and ZeRO."""

import random
from dataclasses import replace

import kill_saves
import pytest
import runtime_cases as cases
import runtime_dags as dags
import test_copies as copies
import torch
import torch.distributed as dist

from mipipe.graphs.errors import InputError
from mipipe.graphs.operator_graph import Role
from mipipe.runtime.engine.engine import Engine
from mipipe.runtime.recipes.matrices import Along, ParameterShard, equilibrate, orthogonalise, with_rms
from mipipe.runtime.recipes.optimizers import SHARD, Muon, Reg
from mipipe.runtime.train.config import GroupConfig, OptimizerConfig, TrainConfig
from mipipe.runtime.train.optim import check_matches, make_optimizer, parameter_groups

KINDS = {"reg": Reg, "muon": Muon}


def matrix(*sizes, seed=0):
    return torch.randn(*sizes, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_reg_numbers():
    """[[3, 4], [0, 1]] by hand; with a root mean square of .2; a diagonal gives its signs."""
    made = equilibrate(torch.tensor([[3.0, 4.0], [0.0, 1.0]], dtype=torch.float64))
    assert made.flatten().tolist() == pytest.approx([0.774597, 0.880973, 0.0, 0.492479], abs=1e-6)
    assert with_rms(made, 0.2).flatten().tolist() == pytest.approx([0.243534, 0.276979, 0.0, 0.154836], abs=1e-6)
    assert equilibrate(torch.diag(torch.tensor([4.0, -9.0]))).tolist() == [[1.0, 0.0], [0.0, -1.0]]


def test_reg_laws():
    """Scale and signs, transposition, permutation, equal norms, zero rows, a better condition."""
    m = matrix(6, 5)
    made = equilibrate(m)
    assert torch.allclose(equilibrate(7.0 * m), made) and torch.equal(made.sign(), m.sign())
    assert torch.allclose(equilibrate(m.t()), made.t())
    order = torch.tensor([3, 1, 0, 5, 2, 4])
    assert torch.allclose(equilibrate(m[order]), made[order])
    signs = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    assert torch.allclose(equilibrate(signs) / signs, torch.full((2, 2), 2.0 ** -0.5))
    m[2] = 0
    assert torch.equal(equilibrate(m)[2], torch.zeros(5, dtype=torch.float64))
    uneven = matrix(64, 32) * torch.logspace(-2, 1, 64, dtype=torch.float64)[:, None]
    before, once, apart = (torch.linalg.cond(x) for x in (uneven, equilibrate(uneven),
                                                          equilibrate(uneven, sequential=True)))
    assert apart < once < before / 2


def test_orthogonal_updates_have_singular_values_near_one():
    for sizes in ((9, 4), (4, 9), (3, 5, 5)):
        values = torch.linalg.svdvals(orthogonalise(matrix(*sizes)))
        assert ((values > 0.6) & (values < 1.3)).all()


def parts(kind, dimension, sizes, bank):
    """A rank's part of a parameter after two steps, of gradients that all ranks know."""
    group = dist.group.WORLD
    whole = matrix(*sizes)
    rank, size = dist.get_rank(), dist.get_world_size()
    own = torch.nn.Parameter(whole.chunk(size, dimension)[rank].clone())
    setattr(own, SHARD, ParameterShard((Along(dimension, group),)))
    own.mipipe_bank = bank
    optimizer = KINDS[kind]([own], lr=0.1)
    for seed in (1, 2):
        own.grad = matrix(*sizes, seed=seed).chunk(size, dimension)[rank].clone()
        optimizer.step()
    return own.detach()


def test_matrices_in_parts_take_the_steps_of_whole_ones(pool):
    """Norms are summed over the ranks that have a row or column: REG and Muon, rows, columns, experts."""
    for kind, dimension, sizes, bank in (("reg", 0, (8, 6), False), ("reg", 1, (8, 6), False),
                                         ("muon", 1, (8, 6), False), ("reg", 2, (4, 3, 6), True),
                                         ("reg", 0, (4, 3, 6), True)):
        whole = torch.nn.Parameter(matrix(*sizes))
        whole.mipipe_bank = bank
        optimizer = KINDS[kind]([whole], lr=0.1)
        for seed in (1, 2):
            whole.grad = matrix(*sizes, seed=seed)
            optimizer.step()
        answers = pool.run(2, __file__, "parts", kind, dimension, sizes, bank)
        found = torch.cat(answers, dimension)
        assert torch.allclose(found, whole, rtol=1e-12, atol=1e-12), (kind, dimension, bank)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["reg", "muon"])
def test_two_copies_of_two_ranks_with_shared_state_equal_one_process(pool, kind):
    """Embedding and head by AdamW, with torch's own arithmetic; matrices by REG or Muon, written out again here."""
    module, graph = copies.frozen_and_tied()
    config = TrainConfig(copies.STEPS, optimizer=OptimizerConfig(kind, 1e-2, shard=True))
    plan = dags.random_plan(random.Random(3), graph, 2, copies.COUNT)
    answers = pool.run(4, copies.__file__, "train", plan, graph, copies.state_of(module), config)
    initial = {name: item.clone() for name, item in module.state_dict().items()}
    named = [(name, item) for name, item in module.named_parameters() if item.requires_grad]
    rest = [item for name, item in named if item.dim() < 2 or "embed" in name or "head" in name]
    others = torch.optim.AdamW(rest, lr=1e-2)
    momentum = {name: 0.0 for name, _ in named}
    losses = []
    for _, batch in zip(range(copies.STEPS), copies.whole_batches(), strict=False):
        pieces = copies.models.chunked(batch, copies.COUNT * copies.COPIES)
        losses.append(copies.models.eager(module, pieces, copies.equal.valid_labels(False, pieces))[0])
        others.step()
        with torch.no_grad():
            for name, item in named:
                if not any(item is other for other in rest):
                    momentum[name] = 0.95 * momentum[name] + item.grad
                    item.copy_((1 - 1e-2 * 0.01) * item - 1e-2 * written_out(kind, momentum[name], item.grad))
    final = {name: item.detach().clone() for name, item in module.named_parameters()}
    module.load_state_dict(initial)
    for own, weights, _, _ in answers:
        assert own == pytest.approx(losses, rel=1e-9)
        for name, tensor in weights.items():
            assert torch.linalg.vector_norm(tensor - final[name]) <= 1e-8 * torch.linalg.vector_norm(final[name]), name


def written_out(kind, momentum, gradient):
    if kind == "reg":
        made = momentum / torch.outer(momentum.norm(dim=1), momentum.norm(dim=0)).sqrt()
        return made * 0.2 * made.numel() ** 0.5 / made.norm()
    x = gradient + 0.95 * momentum
    x = x / x.norm()
    for _ in range(5):
        u, s, v = torch.linalg.svd(x, full_matrices=False)
        x = u @ torch.diag(3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5) @ v
    return x * 0.2 * max(x.shape) ** 0.5


def test_groups_by_role_and_name():
    named = [(name, torch.nn.Parameter(torch.zeros(2))) for name in ("a.norm", "a.q", "b.norm")]
    roles = {"a.norm": Role.NORM, "a.q": Role.ATTENTION, "b.norm": Role.NORM}
    groups = (GroupConfig("^a", {"lr": 1.0}, Role.NORM), GroupConfig(None, {"lr": 2.0}, Role.NORM))
    made = parameter_groups(named, groups, roles)
    assert [(group.get("lr"), len(group["params"])) for group in made] == [(1.0, 1), (2.0, 1), (None, 1)]


def test_what_is_no_group_is_one_line():
    with pytest.raises(InputError, match="a group has neither match nor role"):
        GroupConfig(options={"lr": 1.0})


@pytest.mark.parametrize("name, options, message", [
    ("adamw", {"weight_decey": 0.0}, "unknown option 'weight_decey'; expected amsgrad, betas"),
    ("adamw", {"params": 3}, "unknown option 'params'"), ("sgd", {"betas": [0.9, 0.9]}, "unknown option 'betas'"),
    ("adamw", {"lr": -5}, "Invalid learning rate: -5"), ("adamw", {"lr": "a"}, "not supported between"),
    ("adamw", {"betas": 1}, "subscriptable"), ("muon", {"momentun": 1}, "unknown option 'momentun'"),
])
def test_options_of_a_group_are_the_optimizers(name, options, message):
    """torch looks at none of them; a mistyped one was left out without a word, a wrong one ended the first step."""
    made = Engine(kill_saves.one_rank(), cases.chain_graph(), cases.chain_state())
    with pytest.raises(InputError, match=r"^optimizer adamw: Invalid learning rate: -1"):  # not the group's fault
        make_optimizer("adamw", made, {"lr": -1.0}, groups=[GroupConfig(".", {"lr": 0.2})])
    for group in (GroupConfig(".", options), GroupConfig("nothing fits", options)):
        with pytest.raises(InputError, match=f"optimizer {name}, group '.*': .*{message}"):
            make_optimizer(name, made, {"lr": 0.1}, groups=[group])
    make_optimizer(name, made, {"lr": 0.1}, groups=[GroupConfig(".", {"lr": 0.2})])


def test_a_group_that_fits_no_parameter_is_mistyped():
    graph = cases.chain_graph()
    check_matches([GroupConfig("layer"), GroupConfig(None, role=Role.EXPERTS)], graph)
    with pytest.raises(InputError, match=r"optimizer\.groups: 'laier' matches no trainable parameter of the graph"):
        check_matches([GroupConfig("layer"), GroupConfig("laier")], graph)
    first, *others = graph.parameters
    for change in ({"trainable": False}, {"tied_to": others[0].fqn}, {"buffer": True}):
        beside = replace(graph, parameters=(replace(first, fqn="apart", **change), *others))
        with pytest.raises(InputError, match=f"'apart' matches no trainable .* whose first is {others[0].fqn}"):
            check_matches([GroupConfig("apart")], beside)
