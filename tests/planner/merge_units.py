"""Small merge graphs for the planner's tests."""

from mipipe.graphs.merging.checkpoints.files import StoredTensor
from mipipe.graphs.merging.checkpoints.tensor_classes import TensorClass
from mipipe.graphs.merging.graph import Input, MergeGraph, MergeModel, MergeUnit
from mipipe.planner.merging.costs import MergeRates

RATES = MergeRates(1e9, 1e9, 4e9, 1e10, cores=8)


def unit(name, rows, method="linear", columns=64, models=2):
    tensor = StoredTensor(name, "F32", (rows, columns), "f", 0, rows * columns * 4)
    inputs = tuple(Input(model, "folder", tensor) for model in range(models))
    parameters = {"weight": [1.0] * models, "normalize": True}
    return MergeUnit(name, method, (rows, columns), "F32", TensorClass.MATRIX, None, inputs, parameters)


def graph(sizes, method="linear"):
    units = tuple(unit(f"t{index:03d}", rows, method) for index, rows in enumerate(sizes))
    models = tuple(MergeModel(label, "folder", label, "mit", 0) for label in "ab")
    return MergeGraph(units, models, {}, {}, "folder", {"merge_method": method})
