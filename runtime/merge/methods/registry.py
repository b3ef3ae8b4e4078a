"""The merge methods: for each name of `mipipe.graphs.merging.methods`, its functions and the laws it keeps."""

from __future__ import annotations

from typing import Any

from mipipe.graphs.merging.methods import BY_NAME, REBUILD, STORE
from mipipe.runtime.merge import parts
from mipipe.runtime.merge.methods import arithmetic, consensus, low_rank, one_bit, projective, spectral, spherical
from mipipe.runtime.merge.methods import disentangle as widen_module
from mipipe.runtime.merge.methods import task_vectors as tv
from mipipe.runtime.merge.methods.method import Invariants, Method


def _method(name: str, apply: Any, invariants: Invariants, **functions: Any) -> Method:
    return Method(BY_NAME[name], apply, invariants=invariants, **functions)


_ALWAYS: dict[str, Any] = {}
_HALF = {"lambda": 0.5}

METHODS: tuple[Method, ...] = (
    _method("linear", arithmetic.linear, Invariants(_ALWAYS, _ALWAYS)),
    _method("passthrough", arithmetic.passthrough, Invariants(_ALWAYS)),
    _method("slerp", spherical.slerp, Invariants(None, {"t": 0.3}, order=False), rounds=spherical.slerp_rounds),
    _method("nuslerp", spherical.nuslerp, Invariants(None, {"weight": 1.0}), rounds=spherical.nuslerp_rounds),
    _method("karcher", spherical.karcher, Invariants(_ALWAYS, _ALWAYS), rounds=spherical.karcher_rounds),
    _method("model_stock", spherical.model_stock, Invariants(_ALWAYS, _ALWAYS, linear=_ALWAYS),
            rounds=spherical.model_stock_rounds),
    _method("task_arithmetic", arithmetic.task_arithmetic, Invariants(_ALWAYS, {"normalize": True}, linear=_HALF)),
    _method("ties", tv.ties, Invariants(_ALWAYS, _ALWAYS, linear={"density": 0.4}), rounds=tv.ties_rounds,
            scope=tv.ties_scope),
    _method("dare_linear", tv.dare_linear, Invariants(_ALWAYS, {"normalize": True}, order=False,
                                                      linear={"density": 0.5}), rounds=tv.dare_rounds),
    _method("dare_ties", tv.dare_ties, Invariants(_ALWAYS, {"normalize": True}, order=False,
                                                  linear={"density": 0.5}), rounds=tv.dare_rounds),
    _method("della_linear", tv.della_linear, Invariants({"epsilon": 0.0}, {"normalize": True, "epsilon": 0.0},
                                                        order=False, linear={"density": 0.5})),
    _method("della", tv.della, Invariants({"epsilon": 0.0}, {"epsilon": 0.0}, order=False, linear={"density": 0.5})),
    _method("breadcrumbs", tv.breadcrumbs, Invariants({"gamma": 0.0}, {"gamma": 0.0, "normalize": True},
                                                      linear={"density": 0.5}), rounds=tv.breadcrumbs_rounds),
    _method("breadcrumbs_ties", tv.breadcrumbs_ties, Invariants({"gamma": 0.0}, {"gamma": 0.0, "normalize": True},
                                                                linear={"density": 0.5}),
            rounds=tv.breadcrumbs_rounds),
    _method("sce", consensus.sce, Invariants(_ALWAYS, _ALWAYS, linear={"select_topk": 0.5}),
            rounds=consensus.sce_rounds),
    _method("varm", consensus.varm, Invariants(_ALWAYS, _ALWAYS, linear=_ALWAYS), rounds=consensus.varm_rounds),
    _method("frank", consensus.frank, Invariants(_ALWAYS, _ALWAYS, linear=_ALWAYS), rounds=consensus.frank_rounds,
            scope=consensus.frank_scope),
    _method("layer_swapping", arithmetic.layer_swapping,
            Invariants(None, {"bottom": 2, "top": 1, "transition": 1}, order=False)),
    _method("widen", widen_module.widen, Invariants(_ALWAYS, None)),
    _method("lore", low_rank.lore, Invariants(None, _ALWAYS), elsewhere=arithmetic.plain_mean),
    _method("tsvm", spectral.tsvm, Invariants(_ALWAYS, None, linear=_HALF),
            elsewhere=arithmetic.scaled_mean_of_tasks),
    _method("rtsvm", spectral.rtsvm, Invariants(None, None, linear=_HALF),
            elsewhere=arithmetic.scaled_mean_of_tasks),
    _method("optmerge", projective.optmerge, Invariants(_ALWAYS, None, linear=_HALF),
            elsewhere=arithmetic.mean_of_tasks),
    _method("doge", projective.doge, Invariants(), rounds=projective.doge_rounds, scope=projective.doge_scope,
            elsewhere=arithmetic.base_value),
    _method("twin", low_rank.twin, Invariants({"density": 1.0}, {"density": 1.0}, linear={"density": 0.5}),
            elsewhere=low_rank.twin),
    _method("rmm", low_rank.rmm, Invariants({"num_basis": 1, "rank": 10**6}, {"num_basis": 1, "rank": 10**6}),
            elsewhere=low_rank.routed_mean),
    _method("onebit", one_bit.one_bit, Invariants({"route": 0, "full_precision": True},
                                                  {"route": 0, "full_precision": True}, order=False,
                                                  linear={"route": 0}), rounds=one_bit.one_bit_rounds),
)

INTERNAL = (Method(STORE, parts.compress), Method(REBUILD, parts.reconstruct))
"""What storing and rebuilding parts runs in place of a merge; see `mipipe.runtime.merge.store`."""

BY_METHOD = {method.spec.name: method for method in (*METHODS, *INTERNAL)}
