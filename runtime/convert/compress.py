"""MC-SMoE: merged experts as low rank plus whole rows (arXiv 2310.01334, after LoSparse).

A merged matrix W (m x n) of rank q = ceil(rho m n / (m + n)) becomes L R + S with L = U_q sqrt(s_q), R = sqrt(s_q)
V_q^T and S the rest: exact, until rows of S go. A row's importance is the running average (0.85) of the mean of |S
dL/dS| over its entries; with ``steps``, L, R and S train by the model's own logits meanwhile, and the share of rows
that are left follows a cubic schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mipipe.graphs.converting.decisions import kept_fraction, low_rank
from mipipe.graphs.converting.recipe import CompressExperts
from mipipe.graphs.models import mipipe_moe
from mipipe.runtime.calibration.tokens import Samples
from mipipe.runtime.convert import collect
from mipipe.runtime.convert.merge_experts import Grouping, SeeRouting, group_layers, grouping_figures, make_group
from mipipe.runtime.convert.output import Conversion, OutputTensor, Unit, converted_config, copied, written_dtype
from mipipe.runtime.convert.source import PARTS, MoeLayer, Source, is_bank, is_expert, module_name, moe_layers

AVERAGE, TEMPERATURE, DISTILLED = 0.85, 2.0, 0.2
"""The paper's: of the importance, of the distillation, its weight beside the task's loss."""

State = dict[str, Tensor]


def factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """L [m, rank], R [rank, n] and the rest S [m, n]; L R + S is the matrix."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    root = values[:rank].sqrt()
    one, two = left[:, :rank] * root, root[:, None] * right[:rank]
    return one, two, matrix - one @ two


def plan_compress(recipe: CompressExperts, source: Source, samples: Samples, see: SeeRouting,
                  model: Callable[[], Any]) -> Conversion:
    """The conversion: merged, factorised, trained and pruned here, since the training has them all in memory; ``model``
    loads the model as a whole."""
    layers = moe_layers(source)
    inner, hidden = layers[0].sizes
    grouping, teacher = group_layers(recipe, source, layers, see), model()
    shapes = {part: (hidden, inner) if part == "down_proj" else (inner, hidden) for part in PARTS}
    ranks = {part: low_rank(*shape, recipe.rank_ratio) for part, shape in shapes.items()}
    kept = {part: round(recipe.kept * shape[0]) for part, shape in shapes.items()}
    settings = {"experts": "compressed", "num_experts": len(layers[0].experts), "inner": inner, "ranks": ranks,
                "layers": {str(number): {"slots": item.slots} for number, item in grouping.items()}}
    whole = {**settings, "rows": {part: shape[0] for part, shape in shapes.items()}}
    student = _student(source, teacher, whole, {layer.number: _state(source, layer, grouping[layer.number], ranks,
                                                                     recipe.align) for layer in layers})
    importance, losses = _train(recipe, student, teacher, samples, kept)
    figures = {**grouping_figures(grouping), "ranks": ranks, "rows": kept, "loss": losses}
    made = {layer.number: _pruned(student, layer.number, importance, kept) for layer in layers}
    units = [_unit(layer, made[layer.number], recipe.out_dtype) for layer in layers]
    units += copied(source, lambda name: is_expert(name) or is_bank(name), module_name, recipe.out_dtype)
    settings["rows"] = kept
    return Conversion(converted_config(source, settings), tuple(units), figures, True, _describe)


def _describe(record: Mapping[str, Any]) -> str:
    sizes = [len(groups) for groups in record["groups"].values()]
    return (f"Merged into {sum(sizes) / len(sizes):.3g} experts a layer, of rank {record['ranks']['gate_proj']} with"
            f" {record['rows']['gate_proj']} rows; loss {record['loss']['start']:.4f} -> {record['loss']['end']:.4f}"
            f" (the model's own: {record['loss']['model']:.4f}).")


def _state(source: Source, layer: MoeLayer, grouping: Grouping, ranks: Mapping[str, int], align: bool) -> State:
    """A layer's factors with all rows, by the names of `CompressedExperts`."""
    experts = [make_group(source, layer, grouping, group, align) for group in grouping.groups]
    found: State = {}
    for part in PARTS:
        triples = [factors(expert[part], ranks[part]) for expert in experts]
        for name, items in zip(("left", "right", "sparse"), zip(*triples, strict=True), strict=True):
            found[f"{part}_{name}"] = torch.stack(list(items))
    return found


def _student(source: Source, teacher: Any, settings: Mapping[str, Any], states: Mapping[int, State]) -> Any:
    """The converted model with all rows, in float32; only experts train."""
    kind, model = mipipe_moe.classes(f"mipipe_{source.host}")
    config = kind.from_dict({key: value for key, value in converted_config(source, settings).items()
                             if key not in ("auto_map", "dtype", "torch_dtype")})
    student = model(config).float().eval()
    shared = {name: item for name, item in teacher.state_dict().items() if ".mlp.experts." not in name}
    own = {f"model.layers.{number}.mlp.experts.{name}": item.float()
           for number, state in states.items() for name, item in state.items()}
    places = {name: item for name, item in student.state_dict().items() if name.endswith((".slots", "_rows"))}
    student.load_state_dict({**shared, **own, **places})
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(name in own)
    return student


def _sparse(student: Any) -> dict[str, nn.Parameter]:
    return {name: item for name, item in student.named_parameters() if name.endswith("_sparse")}


def _train(recipe: CompressExperts, student: Any, teacher: Any, samples: Samples,
           kept: Mapping[str, int]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The importance of all rows after training (or one pass without), and losses before and after."""
    sparse = _sparse(student)
    importance = {name: torch.zeros(item.shape[:2]) for name, item in sparse.items()}
    trained = [item for item in student.parameters() if item.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=recipe.lr, weight_decay=0.0)
    batches = collect.batches(samples, recipe.batch)
    steps = recipe.steps or len(batches)
    first, last = steps // 5, max(steps // 5 + 1, steps * 4 // 5)
    losses = {"model": collect.mean_loss(teacher, samples), "start": collect.mean_loss(student, samples)}
    for step in range(steps):
        student.zero_grad()
        _loss(student, teacher, *batches[step % len(batches)]).backward()
        for name, item in sparse.items():
            assert item.grad is not None
            importance[name] = AVERAGE * importance[name] + (1 - AVERAGE) * (item * item.grad).abs().mean(-1).detach()
        if recipe.steps:
            optimizer.step()
            share = kept_fraction(step, first, last, recipe.kept)
            for name, item in sparse.items():
                with torch.no_grad():
                    item.mul_(_mask(importance[name], max(kept[_part(name)], round(share * item.shape[1])))[..., None])
    for name, item in sparse.items():
        with torch.no_grad():
            item.mul_(_mask(importance[name], kept[_part(name)])[..., None])
    losses["end"] = collect.mean_loss(student, samples)
    return importance, losses


def _part(name: str) -> str:
    return name.rpartition(".")[2].removesuffix("_sparse")


def _loss(student: Any, teacher: Any, ids: Tensor, labels: Tensor) -> Tensor:
    """The task's loss plus 0.2 of the distillation's, at temperature two."""
    valid = labels[:, 1:] >= 0
    own = student(input_ids=ids, use_cache=False).logits[:, :-1][valid]
    with torch.no_grad():
        theirs = teacher(input_ids=ids, use_cache=False).logits[:, :-1][valid]
    task = nn.functional.cross_entropy(own, labels[:, 1:][valid])
    distance = nn.functional.kl_div((own / TEMPERATURE).log_softmax(-1), (theirs / TEMPERATURE).log_softmax(-1),
                                    reduction="batchmean", log_target=True)
    return task + DISTILLED * TEMPERATURE ** 2 * distance


def _mask(importance: Tensor, count: int) -> Tensor:
    """Ones at the ``count`` most important rows of every slot."""
    return torch.zeros_like(importance).scatter_(1, importance.topk(count, dim=1).indices, 1.0)


def _pruned(student: Any, number: int, importance: Mapping[str, Tensor], kept: Mapping[str, int]) -> State:
    """A layer's tensors as they are stored: the rows that are left, and where they are."""
    experts = student.model.layers[number].mlp.experts
    found: State = {"slots": experts.slots}
    for part in PARTS:
        places = importance[f"model.layers.{number}.mlp.experts.{part}_sparse"].topk(kept[part], dim=1).indices
        places = places.sort(dim=1).values
        sparse = getattr(experts, f"{part}_sparse").detach()
        found |= {f"{part}_left": getattr(experts, f"{part}_left").detach(), f"{part}_rows": places,
                  f"{part}_right": getattr(experts, f"{part}_right").detach(),
                  f"{part}_sparse": sparse.gather(1, places[..., None].expand(*places.shape, sparse.shape[2]))}
    return found


def _unit(layer: MoeLayer, state: State, out_dtype: str | None) -> Unit:
    dtype = written_dtype(layer.experts[0]["gate_proj"], out_dtype)
    named = {f"{module_name(layer.block)}.experts.{name}": item for name, item in state.items()}
    pieces = tuple(OutputTensor(name, dtype if item.is_floating_point() else "I64", tuple(item.shape))
                   for name, item in named.items())
    return Unit(pieces, lambda: (named, {}))
