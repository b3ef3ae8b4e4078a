"""Rows of methods that run the models on samples; see `mipipe.graphs.merging.method_table.methods`."""

from __future__ import annotations

from mipipe.graphs.calibration.streams import Need, Who
from mipipe.graphs.merging.checkpoints.tensor_classes import TensorClass
from mipipe.graphs.merging.method_table.method_spec import Base, MethodSpec, Parameter, Params

_MAPS = frozenset({TensorClass.MATRIX, TensorClass.HEAD})
_SHARE = Parameter("weight", 1.0, "factor of each model", per_model=True, low=0.0, above=True)
_HOST = (Parameter("host", "task_arithmetic", "the method that merges", str, choices=("task_arithmetic", "ties")),
         Parameter("weight", 1.0, "factor of each model's task vector", per_model=True),
         Parameter("density", 1.0, "share of entries ties keeps", per_model=True, low=0.0, high=1.0, above=True),
         Parameter("lambda", 1.0, "factor of the merged task vector"),
         Parameter("normalize", False, "divide by the sum of weights", bool))


def _host_rounds(params: Params) -> int:
    density = params["density"]
    least = min(density) if isinstance(density, (list, tuple)) else density
    return 2 * (params["host"] == "ties" and least < 1.0)


def _gram(_params: Params) -> tuple[Need, ...]:
    return (Need("gram", Who.MODELS),)


def _fisher(_params: Params) -> tuple[Need, ...]:
    return (Need("fisher", Who.MODELS, gradients=True),)


def _saliency(_params: Params) -> tuple[Need, ...]:
    return (Need("mean_abs", Who.BASE),)


def _moments(_params: Params) -> tuple[Need, ...]:
    return (Need("moments", Who.PAIRS),)


def _sensitivity(_params: Params) -> tuple[Need, ...]:
    return (Need("sensitivity", Who.MODELS, gradients=True),)


def _routing(_params: Params) -> tuple[Need, ...]:
    return (Need("routing", Who.PAIRS),)


def _joint(params: Params) -> tuple[Need, ...]:
    wanted = params["least_squares"] or params["matching"] == "activations"
    return (Need("joint", Who.SAME),) if wanted else ()


def _cross(_params: Params) -> tuple[Need, ...]:
    return (Need("cross", Who.LAST),)


def _votes(params: Params) -> tuple[Need, ...]:
    return (Need(f"votes:{float(params['strength'])!r}", Who.TOGETHER, gradients=True),)


FACTORS: tuple[MethodSpec, ...] = (
    MethodSpec("evo", "Black-box Model Merging for Language-Model-as-a-Service", "2509.12951", (
        Parameter("weight", None, "signed factor of each adapter's factors; 1 / number if not given", per_model=True,
                  optional=True),
        Parameter("keep", 1.0, "share of the entries of A that stay, the largest", per_model=True, low=0.0, high=1.0)),
        factors=True, apply="low_rank.evo"),
)
"""Methods on the factors of LoRA adapters."""
CALIBRATED: tuple[MethodSpec, ...] = (
    MethodSpec("regmean", "Dataless Knowledge Fusion by Merging Weights of Language Models", "2212.09849", (
        _SHARE, Parameter("reduce", 0.9, "factor of the off-diagonal entries of each model's Gram matrix", low=0.0,
                          high=1.0),
        Parameter("ridge", 1e-6, "pull to the average, as a multiple of the mean diagonal", low=0.0, above=True)),
        Base.UNUSED, 1, whole=True, oriented=True, classes=_MAPS, needs=_gram,
        apply="closed_forms.regmean", elsewhere="closed_forms.plain_average"),
    MethodSpec("pleas", "PLeaS: Merging Models with Permutations and Least Squares", "2407.02447", (
        _SHARE, Parameter("matching", "activations", "how the second model's units are matched with the first's", str,
                          choices=("activations", "weights")),
        Parameter("least_squares", True, "solve for outputs on samples; false: average", bool),
        Parameter("ridge", 1e-6, "pull to the average, as a multiple of the mean diagonal", low=0.0, above=True),
        Parameter("separate", 0.0, "share of the hidden units of every MLP that both models keep apart", low=0.0,
                  high=1.0),
        Parameter("separate_heads", 0.0, "the same of the groups of heads", low=0.0, high=1.0),
        Parameter("budget", None, "work of the wider model in that of one: finds both shares", low=1.0, high=2.0,
                  optional=True),
        Parameter("worth_heads", 1.0, "what merging all heads loses, in what merging all MLP units loses", low=0.0)),
        Base.UNUSED, 2, 2, whole=True, classes=_MAPS, needs=_joint,
        apply="closed_forms.pleas", elsewhere="closed_forms.plain_average"),
    MethodSpec("fisher", "Merging Models with Fisher-Weighted Averaging", "2111.09832", (
        _SHARE, Parameter("floor", 1e-10, "smallest Fisher information that counts", low=0.0, above=True)), Base.UNUSED,
        apply="closed_forms.fisher", needs=_fisher),
    MethodSpec("aim", "Activation-Informed Merging of Large Language Models", "2502.02421", (
        *_HOST, Parameter("omega", 0.4, "share of the change kept at the most salient input", low=0.0, high=1.0)),
        oriented=True, needs=_saliency,
        apply="informed.aim", measure="informed.aim_rounds", rounds=_host_rounds),
    MethodSpec("acm", "Activation-Guided Consensus Merging for Large Language Models", "2505.14009", (
        *_HOST, Parameter("t", 1.0, "how fast the coefficient falls with the information", low=0.0, above=True),
        Parameter("scale", 2.0, "the coefficient without any information is half of it", low=0.0, above=True),
        Parameter("normalise_information", True, "divide an expert's information by its largest", bool)),
        needs=_moments, apply="informed.acm", measure="informed.acm_rounds", rounds=_host_rounds),
    MethodSpec("sens", "Sens-Merging: Sensitivity-Guided Parameter Balancing", "2502.12420", (
        Parameter("weight", 1.0, "factor of each model's task vector", per_model=True),
        Parameter("lambda", 1.0, "factor of the merged task vector"),
        Parameter("normalize", False, "divide by the sum of weights", bool),
        Parameter("alpha", 0.7, "the coefficient of an average layer"),
        Parameter("temperature", 2.0, "of the softmax over experts", low=0.0, above=True)),
        apply="informed.sens", needs=_sensitivity),
    MethodSpec("expert_merging", "Expert Merging: Unsupervised Expert Alignment and Importance-Guided Layer Chunking",
               "2509.25712", (
        Parameter("learning_rate", 0.5, "of AdamW", low=0.0, above=True),
        Parameter("epochs", 1, "how often every sample is seen", int, low=1),
        Parameter("accumulate", 8, "samples in a step", int, low=1),
        Parameter("start", 0.1, "where every coefficient begins", low=0.0, high=0.999, above=True),
        Parameter("hidden", 1.0, "weight of the distance of all layers' outputs", low=0.0),
        Parameter("temperature", 1.0, "of the distributions", low=0.0, above=True),
        Parameter("gamma", 5.0, "pull of the coefficients to their start", low=0.0),
        Parameter("exclude", "lm_head|embed|norm|bias", "tensors that stay the base's, by regular expression", str),
        Parameter("budget", 0.0, "Expert Merging++: coefficients in all, for each tensor (0.9 to 1.2; 0: without)",
                  low=0.0),
        Parameter("kappa", 1.0, "how much more important tensors get", low=0.0),
        Parameter("coefficients", None, "learned by the merge", list, optional=True)),
        whole=True, learned=True, apply="directed.expert_merging"),
    MethodSpec("arm", "Merging Beyond: Streaming LLM Updates via Activation-Guided Rotations", "2602.03237", (
        Parameter("eta", 0.7, "step towards the checkpoint"),
        Parameter("energy", 0.99, "share of the squared singular values that is turned", low=0.0, high=1.0,
                  above=True)),
        max_models=2, whole=True, oriented=True, needs=_cross, apply="directed.arm"),
    MethodSpec("router_calibration", "Routers of merged mixtures of experts, calibrated in closed form", "2606.03391", (
        Parameter("weight", 1.0, "how much each model's routing counts", per_model=True, low=0.0, above=True),
        Parameter("ridge", 1e-4, "pull to the merged router, as a multiple of the mean curvature", low=0.0, above=True),
        Parameter("hessian", True, "weigh logits by what they change in the shares of experts", bool)),
        whole=True, needs=_routing, apply="closed_forms.router_calibration"),
    MethodSpec("rcp", "RCP-Merging: Merging Long Chain-of-Thought Models with Domain-Specific Models", "2508.03140", (
        Parameter("strength", 1000.0, "weight of the prior that keeps reasoning", low=0.0),),
        min_models=2, max_models=2,
        apply="directed.rcp", needs=_votes),
)
