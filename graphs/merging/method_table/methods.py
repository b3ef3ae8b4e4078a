"""The table of merge methods: recipe keys, what a method needs and costs, its paper, and which functions compute it.

Functions are named as ``module.function`` of `mipipe.runtime.merge.methods`, so that recipes are read and planned
without torch. Names and parameters follow mergekit's vocabulary where it has the method; formulas and defaults are in
the papers given.
"""

from __future__ import annotations

from mipipe.graphs.errors import InputError
from mipipe.graphs.merging.checkpoints.tensor_classes import TensorClass
from mipipe.graphs.merging.method_table.calibrated_methods import CALIBRATED, FACTORS
from mipipe.graphs.merging.method_table.method_spec import Base, MethodSpec, Parameter, Params, Scope


def _of_layer(_params: Params) -> Scope:
    return Scope.LAYER


def _of_model(_params: Params) -> Scope:
    return Scope.MODEL


def _ties_scope(params: Params) -> Scope:
    return Scope.MODEL if params.get("scope") == "model" else Scope.PIECE


def _trims(params: Params) -> bool:
    density = params["density"]
    return (min(density) if isinstance(density, (list, tuple)) else density) < 1.0


def _ties_rounds(params: Params) -> int:
    return (2 + bool(params["rescale"])) * _trims(params) + (params["zero_sum"] == "majority")


def _breadcrumbs_rounds(params: Params) -> int:
    return 2 + bool(params["rescale"])


def _dare_rounds(params: Params) -> int:
    return int(params["rescale"] and params["rescale_norm"] == "l1" and _trims(params))


def _della_fits(params: Params) -> str:
    for density, epsilon in zip(params["density"], params["epsilon"], strict=True):
        if 0 < density < 1 and epsilon >= min(density, 1 - density):
            return (f"epsilon: found {epsilon:g} at density {density:g}, expected density -+ epsilon inside (0, 1), so"
                    f" less than {min(density, 1 - density):g}")
    return ""


def _something_left(params: Params) -> str:
    """An average by weights that add up to 0 is divided by it, or is a model of zeros."""
    weights = params["weight"]
    normalised = params.get("normalize", params.get("normalize_weights", True))
    if abs(sum(weights)) < 1e-8 if normalised else not any(weights):
        return f"weight: found {', '.join(f'{item:g}' for item in weights)}, which add up to 0, so no model is left"
    return ""


def _routed(params: Params) -> str:
    count = len(params["full_precision"])
    return (f"route: found {params['route']}, expected less than {count}, the number of models"
            if params["route"] >= count else "")


def _once(_params: Params) -> int:
    return 1


def _twice(_params: Params) -> int:
    return 2


_MATRIX = frozenset({TensorClass.MATRIX})
_TABLES = frozenset({TensorClass.MATRIX, TensorClass.EMBEDDING, TensorClass.HEAD})

_SHARE = Parameter("weight", 1.0, "factor of each model", per_model=True)
_WEIGHT = Parameter("weight", 1.0, "factor of each model's task vector", per_model=True)
_LAMBDA = Parameter("lambda", 1.0, "factor of the merged task vector")
_DENSITY = Parameter("density", 1.0, "share of entries kept", per_model=True, low=0.0, high=1.0, above=True)
_RESCALE = Parameter("rescale", True, "make up for what was dropped", bool)
_RESTORE = Parameter("rescale", False, "scale what stays to the L1 norm before trimming", bool)
_SUM = Parameter("normalize", False, "divide by the sum of weights", bool)
_MEAN = Parameter("normalize", True, "divide by the sum of weights", bool)
_INT8 = Parameter("int8_mask", False, "accepted for mergekit's recipes; masks here are always one byte", bool)
_EPSILON = Parameter("epsilon", 0.15, "keep probabilities of a row are density -+ epsilon (as in mergekit)",
                     per_model=True, low=0.0, high=1.0)
_GAMMA = Parameter("gamma", 0.01, "share of the largest entries dropped", per_model=True, low=0.0, high=1.0)
_CHANGE = Parameter("epsilon", 1e-5, "entries that change no more are taken as unchanged", low=0.0)
_ROUTE = Parameter("route", None, "the router's weight of each expert; equal ones if not given", per_model=True,
                   optional=True)

TIES = (_WEIGHT, _DENSITY, _LAMBDA, _MEAN, _INT8, _RESTORE,
        Parameter("combine", "mean", "how agreeing entries join", str, choices=("mean", "max")),
        Parameter("scope", "tensor", "trim within each tensor or over the whole model", str,
                  choices=("tensor", "model")),
        Parameter("zero_sum", "plus", "sign where the weighted sum is zero", str, choices=("plus", "majority")))
DARE = (_WEIGHT, _DENSITY, _LAMBDA, _SUM, _INT8, _RESCALE,
        Parameter("rescale_norm", "expected", "by 1/density, or to the L1 norm before dropping", str,
                  choices=("expected", "l1")))
DELLA = (_WEIGHT, _DENSITY, _EPSILON, _LAMBDA, _RESCALE, _INT8,
         Parameter("rescale_norm", "l1", "to the L1 norm before dropping (mergekit), or by each entry's probability"
                   " (the paper)", str, choices=("l1", "expected")))
BREADCRUMBS = (_WEIGHT, _DENSITY, _GAMMA, _LAMBDA, _SUM, _INT8, _RESTORE)

METHODS: tuple[MethodSpec, ...] = (
    MethodSpec("linear", "Model soups: averaging weights of multiple fine-tuned models", "2203.05482",
               (_SHARE, _MEAN), Base.UNUSED, base_last="weighted", check=_something_left,
        apply="arithmetic.linear"),
    MethodSpec("passthrough", "copying layers of one model", "", (
        Parameter("scale", 1.0, "factor of the weights", per_model=True),), Base.UNUSED, max_models=1,
        apply="arithmetic.passthrough"),
    MethodSpec("slerp", "Animating rotation with quaternion curves (Shoemake 1985)", "", (
        Parameter("t", None, "position on the arc from the base (0) to the other model (1)"),), Base.UNUSED, 2, 2,
        base_first=True,
        apply="spherical.slerp", measure="spherical.slerp_rounds", rounds=_once),
    MethodSpec("nuslerp", "SLERP with weights, of task vectors when a base is given", "", (
        Parameter("weight", None, "the position is w2 / (w1 + w2)", per_model=True),
        Parameter("nuslerp_flatten", True, "one arc for the tensor, not one per row", bool),
        Parameter("nuslerp_row_wise", False, "not flattened: one arc per column (mergekit's meaning)", bool)),
        Base.OPTIONAL, 2, 2,
        apply="spherical.nuslerp", measure="spherical.nuslerp_rounds",
        rounds=_once),
    MethodSpec("karcher", "Riemannian center of mass and mollifier smoothing (Karcher 1977)", "", (
        _SHARE, Parameter("max_iter", 10, "iterations", int, low=1), Parameter("tol", 1e-5, "step that ends them",
                                                                                low=0.0)), Base.UNUSED,
        base_last="always", check=_something_left,
        apply="spherical.karcher", measure="spherical.karcher_rounds", rounds=_once),
    MethodSpec("multislerp", "Multi-SLERP, the barycentre on a sphere (Goddard 2025)", "", (
        _SHARE, Parameter("normalize_weights", True, "divide by the sum of weights", bool),
        Parameter("eps", 1e-8, "norms below it count as zero", low=0.0, above=True)), Base.OPTIONAL,
        check=_something_left,
        apply="spherical.multislerp", measure="spherical.multislerp_rounds", rounds=_once),
    MethodSpec("model_stock", "Model Stock: All we need is just a few fine-tuned models", "2403.19522", (
        Parameter("filter_wise", False, "a ratio per row, and one for a vector", bool),),
        apply="spherical.model_stock", measure="spherical.model_stock_rounds",
        rounds=_once),
    MethodSpec("task_arithmetic", "Editing Models with Task Arithmetic", "2212.04089", (_WEIGHT, _LAMBDA, _SUM),
        apply="arithmetic.task_arithmetic"),
    MethodSpec("ties", "TIES-Merging: Resolving Interference When Merging Models", "2306.01708", TIES,
        apply="task_vectors.ties", measure="task_vectors.ties_rounds", rounds=_ties_rounds, scope=_ties_scope),
    MethodSpec("dare_linear", "Language Models are Super Mario", "2311.03099", DARE,
        apply="task_vectors.dare_linear", measure="task_vectors.dare_rounds", rounds=_dare_rounds),
    MethodSpec("dare_ties", "Language Models are Super Mario", "2311.03099", DARE,
        apply="task_vectors.dare_ties", measure="task_vectors.dare_rounds", rounds=_dare_rounds),
    MethodSpec("della_linear", "DELLA-Merging: Reducing Interference through Magnitude-Based Sampling", "2406.11617",
               (*DELLA, _SUM), check=_della_fits,
        apply="task_vectors.della_linear", measure="task_vectors.della_rounds", rounds=_dare_rounds),
    MethodSpec("della", "DELLA-Merging: Reducing Interference through Magnitude-Based Sampling", "2406.11617",
               (*DELLA, _MEAN), check=_della_fits,
        apply="task_vectors.della", measure="task_vectors.della_rounds", rounds=_dare_rounds),
    MethodSpec("breadcrumbs", "Model Breadcrumbs", "2312.06795", BREADCRUMBS,
        apply="task_vectors.breadcrumbs", measure="task_vectors.breadcrumbs_rounds", rounds=_breadcrumbs_rounds),
    MethodSpec("breadcrumbs_ties", "Model Breadcrumbs, with TIES' vote", "2312.06795", BREADCRUMBS,
        apply="task_vectors.breadcrumbs_ties", measure="task_vectors.breadcrumbs_rounds", rounds=_breadcrumbs_rounds),
    MethodSpec("arcee_fusion", "Arcee Fusion, importance by divergence of softmaxes (Arcee AI)", "", max_models=1,
        apply="selective.arcee_fusion", measure="selective.arcee_fusion_rounds", rounds=_twice),
    MethodSpec("nearswap", "NearSwap (alchemonaut 2024)", "", (
        Parameter("t", None, "how far an entry may go towards the model", low=0.0),), max_models=1,
        apply="selective.nearswap"),
    MethodSpec("ram", "Reinforced Agent Merging", "2601.13572", (_CHANGE,),
        apply="selective.ram"),
    MethodSpec("ramplus_tl", "Reinforced Agent Merging Plus, tensor by tensor", "2601.13572", (
        Parameter("r", 0.1, "how much unique changes grow with the shared share", low=0.0),
        Parameter("alpha", 0.2, "largest shared share that counts", low=0.0), _CHANGE),
        apply="selective.ramplus_tl", measure="selective.ramplus_rounds", rounds=_once),
    MethodSpec("sce", "FuseChat: Knowledge Fusion of Chat Models", "2408.07990", (
        Parameter("select_topk", 1.0, "share of entries with the largest variance", low=0.0, high=1.0, above=True),
        Parameter("mask_deltas", True, "drop unselected entries (mergekit); false: use them (FuseChat's code)", bool),
        _INT8),
        apply="consensus.sce", measure="consensus.sce_rounds",
        rounds=lambda params: 1 + 2 * (params["select_topk"] < 1.0)),
    MethodSpec("varm", "FuseChat (weights by mean squared variation)", "2408.07990",
        apply="consensus.varm", measure="consensus.varm_rounds", rounds=_once),
    MethodSpec("frank", "Training-Free Reasoning and Reflection in MLLMs", "2505.16151", (
        Parameter("weight", 1.0, "prior weight of each model, by layer if a gradient", per_model=True, low=0.0),
        Parameter("prior_alpha", None, "decay of visual attention over layers, measured on images", optional=True),
        Parameter("prior_norm", "sum", "scale of the prior", str, choices=("sum", "max"))),
        apply="consensus.frank", measure="consensus.frank_rounds", rounds=_once, scope=_of_layer),
    MethodSpec("layer_swapping", "Layer Swapping for Zero-Shot Cross-Lingual Transfer in LLMs", "2410.01335", (
        Parameter("bottom", None, "first layers from the language model", int, low=0),
        Parameter("top", None, "last layers from the language model", int, low=0),
        Parameter("transition", 0, "layers blended at each border", int, low=0),
        Parameter("beta", 0.5, "the task model's share in them", low=0.0, high=1.0)), Base.UNUSED, 2, 2,
        apply="arithmetic.layer_swapping"),
    MethodSpec("widen", "Extend Model Merging from Fine-Tuned to Pre-Trained LLMs via Weight Disentanglement",
               "2408.03092", (
                   Parameter("above_average_ratio", 1.0, "columns above this multiple of the mean are calibrated"),
                   Parameter("calibrated_score", 1.0, "their score")), whole=True, oriented=True,
        apply="disentangle.widen"),
    MethodSpec("lore", "LoRE-Merging: Exploring Low-Rank Estimation", "2502.10749", (
        Parameter("mu", 0.01, "soft threshold of singular values", low=0.0), _LAMBDA,
        Parameter("iterations", 20, "rounds of block descent", int, low=1),
        Parameter("combine", "mean", "how the estimated task vectors join", str, choices=("mean", "ties")), _DENSITY),
        Base.OPTIONAL, 2, whole=True, classes=_MATRIX, decompositions=20,
        apply="low_rank.lore", elsewhere="arithmetic.plain_mean"),
    MethodSpec("tsvm", "Task Singular Vectors: Reducing Task Interference in Model Merging", "2412.00081",
               (_LAMBDA,), whole=True, classes=_TABLES, decompositions=2,
        apply="spectral.tsvm", elsewhere="arithmetic.scaled_mean_of_tasks"),
    MethodSpec("rtsvm", "Mix Data or Merge Models? Balancing Helpfulness, Honesty, and Harmlessness", "2502.06876", (
        _LAMBDA, Parameter("clip_outliers", False, "clip entries at mean + 3 std first", bool)),
        whole=True, classes=_TABLES, decompositions=2,
        apply="spectral.rtsvm", elsewhere="arithmetic.scaled_mean_of_tasks"),
    MethodSpec("iso_c", "No Task Left Behind: Isotropic Model Merging (common subspace)", "2502.04959", (_LAMBDA,),
        whole=True, classes=_MATRIX, decompositions=1,
        apply="spectral.iso_c", elsewhere="arithmetic.scaled_mean_of_tasks"),
    MethodSpec("iso_cts", "No Task Left Behind: Isotropic Model Merging (common and task-specific subspaces)",
               "2502.04959", (_LAMBDA, Parameter("common_space_fraction", 0.8, "share of directions that are common",
                                                 low=0.0, high=1.0)),
        whole=True, classes=_MATRIX, decompositions=2,
        apply="spectral.iso_cts", elsewhere="arithmetic.scaled_mean_of_tasks"),
    MethodSpec("optmerge", "OptMerge: Unifying Multimodal LLM Capabilities and Modalities", "2505.19892", (
        Parameter("lambda", 1.0, "factor of the optimised task vector"),
        Parameter("solver", "ridge", "the minimiser that stays near the start, the authors' descent, or the plain"
                  " minimiser (far off for full-rank task vectors)", str,
                  choices=("ridge", "adam", "sgd", "closed_form")),
        Parameter("ridge", 1.0, "pull to the start, as a multiple of the mean curvature", low=0.0, above=True),
        Parameter("centred", True, "denoise about the mean (full fine-tuning); false for LoRA", bool),
        Parameter("start", "sum", "where the descent starts", str, choices=("sum", "mean")),
        Parameter("learning_rate", 1e-5, "of the descent", low=0.0, above=True),
        Parameter("steps", 300, "of the descent", int, low=1)),
        whole=True, oriented=True, classes=_MATRIX, decompositions=3,
        apply="projective.optmerge", elsewhere="arithmetic.mean_of_tasks"),
    MethodSpec("wudi", "Whoever Started the Interference Should End It", "2503.08099", (
        Parameter("lambda", 1.0, "factor of the optimised task vector"),
        Parameter("solver", "adam", "the authors' descent, or the minimiser, near the start or plain", str,
                  choices=("adam", "ridge", "closed_form")),
        Parameter("ridge", 1.0, "pull to the start, as a multiple of the mean curvature", low=0.0, above=True),
        Parameter("learning_rate", 1e-5, "of the descent", low=0.0, above=True),
        Parameter("steps", 300, "of the descent", int, low=1)),
        whole=True, oriented=True, classes=_MATRIX, decompositions=3,
        apply="projective.wudi", elsewhere="arithmetic.mean_of_tasks"),
    MethodSpec("doge", "Modeling Multi-Task Model Merging as Adaptive Projective Gradient Descent", "2501.01230", (
        Parameter("eta", 0.07, "lambda_i = eta / ||tau_i||", low=0.0, above=True),
        Parameter("divisor", 6, "the shared subspace has rank / divisor directions", int, low=1),
        Parameter("density", 0.3, "share of entries kept over the whole model", low=0.0, high=1.0, above=True),
        Parameter("learning_rate", 1e-4, "of Adam", low=0.0, above=True),
        Parameter("steps", 400, "of Adam", int, low=1),
        Parameter("reproject", False, "keep the shift out of the shared subspace exactly", bool)),
        whole=True, oriented=True, classes=_MATRIX, decompositions=8,
        apply="projective.doge", measure="projective.doge_rounds", elsewhere="arithmetic.base_value",
        rounds=_twice, scope=_of_model),
    MethodSpec("twin", "Twin-Merging: Dynamic Integration of Modular Expertise in Model Merging", "2406.15479", (
        Parameter("shared_scale", 0.29, "task arithmetic's factor in the shared part"),
        Parameter("density", 0.1, "rank of the exclusive parts relative to full", low=0.0, high=1.0, above=True),
        _ROUTE), whole=True, classes=_TABLES, decompositions=1,
        apply="low_rank.twin", elsewhere="low_rank.twin"),
    MethodSpec("rmm", "Towards Reversible Model Merging for Low-rank Weights", "2510.14163", (
        Parameter("num_basis", None, "stored directions per vector", int, low=1),
        Parameter("rank", 16, "rank of the task vectors", int, low=1), _ROUTE),
        whole=True, oriented=True, classes=_MATRIX, decompositions=3,
        apply="low_rank.rmm", elsewhere="low_rank.routed_mean"),
    MethodSpec("onebit", "1bit-Merging: Dynamic Quantized Merging for Large Language Models", "2502.10743", (
        Parameter("route", None, "index of the expert a prompt is routed to", int, low=0),
        Parameter("full_precision", False, "keep this model's tensor unquantised (by filter)", bool, per_model=True),
        Parameter("others_weight", 0.0, "factor of the merged other experts"),
        Parameter("others", "linear", "how they are merged", str, choices=("linear", "ties"))), check=_routed,
        apply="one_bit.one_bit", measure="one_bit.one_bit_rounds", rounds=_once),
    *FACTORS,
    *CALIBRATED,
)
"""Every merge method. To add one: a row here, and its functions in a module of `mipipe.runtime.merge.methods`."""

STORE = MethodSpec("store", "task vectors stored apart, compressed", "", (
    Parameter("of", None, "the method whose parts are stored", str),
    Parameter("values", None, "that method's parameters")), whole=True)
REBUILD = MethodSpec("rebuild", "a model rebuilt from stored parts", "", (
    Parameter("folder", None, "the parts", str), Parameter("route", None, "each expert's weight"),
    Parameter("turned", False, "the parts are of the transposed matrix", bool)), min_models=0, whole=True)
"""What `mipipe.runtime.merge.launching.store` plans and runs like merges, and no recipe can ask for."""

BY_NAME = {spec.name: spec for spec in (*METHODS, STORE, REBUILD)}
RECIPE_NAMES = [spec.name for spec in METHODS]


def register(spec: MethodSpec) -> None:
    """Let recipes name a further method (`mipipe.runtime.merge.methods.own.method` gives it its functions).

    Raises:
        InputError: there is a method of that name.
    """
    if spec.name in BY_NAME:
        raise InputError(f"method {spec.name}: there is one of that name already; give another")
    BY_NAME[spec.name] = spec
    RECIPE_NAMES.append(spec.name)
