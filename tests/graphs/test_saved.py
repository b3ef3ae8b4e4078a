"""Saved bytes of groups against what their functions really keep: storages counted on real tensors after F and I."""

import pytest
import torch
from torch import nn

from mipipe.graphs.capture.model import capture_module
from mipipe.graphs.coarse.coarsen import coarsen
from mipipe.graphs.coarse.graph_index import index_graph
from mipipe.graphs.operator_graph import Phase
from mipipe.graphs.profiling.rehearse import rehearse

WIDTH, TOKENS, VOCAB = 16, 12, 32


class Block(nn.Module):
    """A norm, attention with rotated halves, a gated MLP: saves inputs, views, masks and products."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (2, -1)).transpose(1, 2).chunk(3, dim=-1)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(-2))
        gate, value = self.up(self.norm2(x)).chunk(2, dim=-1)
        return x + self.down(nn.functional.silu(gate) * value)


class Model(nn.Module):
    """Tied embedding and head around two equal blocks and a skip connection from the embedding to the end."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCAB, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids, labels):
        first = x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return nn.functional.cross_entropy(self.head(self.norm(x + first)).flatten(0, 1), labels.flatten())


@pytest.fixture(scope="module")
def graph():
    ids = torch.zeros(2, TOKENS, dtype=torch.int64)
    return capture_module(Model(), {"ids": ids, "labels": ids.clone()}, granularity="module")


def kept_bytes(run, phases, made):
    """Bytes of the storages that calls of ``phases`` read and that exist in ``made``, weights left out."""
    weights = {tensor.untyped_storage().data_ptr() for name, tensor in made.items() if name.startswith("weight")}
    read = {name for phase in phases for call in run.calls[phase] for name in call.reads}
    found = {}
    for name in read & set(made):
        storage = made[name].untyped_storage()
        if storage.data_ptr() not in weights and not name.startswith(("incoming", "grad", "part")):
            found[storage.data_ptr()] = storage.nbytes()
    return found


@pytest.mark.parametrize("options", [{"granularity": "operator"}, {"granularity": "layer"}, {"num_groups": 3},
                                     {"num_groups": 1}])
def test_saved_bytes_are_the_storages_that_the_functions_keep(graph, options):
    coarse = coarsen(graph, **options)
    index = index_graph(graph)
    number_of = {segment.name: number for number, segment in enumerate(graph.segments)}
    groups = [[number_of[name] for name in group.segments] for group in coarse.groups]
    everything = set(range(len(groups)))
    with torch.no_grad():
        for number, run in rehearse(index, groups, [group.structure for group in coarse.groups], everything,
                                    torch.device("cpu")):
            group = coarse.groups[number]
            made = dict(run.slots)
            both = kept_bytes(run, (Phase.I, Phase.W), made)
            late = kept_bytes(run, (Phase.W,), made)
            assert group.saved_fw_bytes == sum(late.values()), group.name
            assert group.saved_fi_bytes == sum(size for key, size in both.items() if key not in late), group.name


def test_what_input_gradients_leave_for_weight_gradients_is_counted(graph):
    coarse = coarsen(graph, granularity="layer")
    index = index_graph(graph)
    number_of = {segment.name: number for number, segment in enumerate(graph.segments)}
    groups = [[number_of[name] for name in group.segments] for group in coarse.groups]
    with torch.no_grad():
        for number, run in rehearse(index, groups, [group.structure for group in coarse.groups], {1, 2},
                                    torch.device("cpu")):
            before = {tensor.untyped_storage().data_ptr() for tensor in run.slots.values()}
            before -= {run.slots[name].untyped_storage().data_ptr() for name in run.gradients}
            run.run(Phase.I)
            read = {name for call in run.calls[Phase.W] for name in call.reads}
            kept = {run.slots[name].untyped_storage().data_ptr(): run.slots[name].untyped_storage().nbytes()
                    for name in read if run.slots[name].untyped_storage().data_ptr() not in before}
            assert coarse.groups[number].saved_iw_bytes == sum(kept.values()) > 0
