"""What a recipe's loss may be, as data: names, options with their defaults, and what each asks of a batch.

Legend of batch inputs: B responses (rows) of a microbatch, S tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from mipipe.graphs.errors import InputError, shown
from mipipe.graphs.named_code import is_named_code
from mipipe.graphs.recipes.adapters import AdapterConfig
from mipipe.graphs.recipes.expansion import ExpandConfig
from mipipe.graphs.recipes.routers import RouterConfig
from mipipe.graphs.serialize import STRICT

Check = tuple[str, Callable[[Any], bool]]


def _real(low: float, high: float, text: str) -> Check:
    return text, lambda value: isinstance(value, (int, float)) and not isinstance(value, bool) \
        and math.isfinite(value) and low <= value <= high


def _one_of(*names: str) -> Check:
    return f"one of {', '.join(names)}", lambda value: value in names


_FLAG: Check = ("true or false", lambda value: isinstance(value, bool))
_ANY = math.inf
_GROUPS: dict[str, tuple[Any, Check]] = {
    "advantage_from": ("rewards", _one_of("rewards", "batch")),
    "deviation": (False, _FLAG),
}

OPTIONS: dict[str, dict[str, tuple[Any, Check]]] = {
    "rift": {
        "length_norm": (False, _FLAG),
        "means": ("union", _one_of("union", "separate")),
        "negatives": ("bounded", _one_of("bounded", "linear")),
    },
    "asympo": {**_GROUPS, "floor": (1e-3, _real(1e-12, 1.0, "a number from 1e-12 to 1"))},
    "spo": {**_GROUPS, "negative_scale": (0.5, _real(0.0, 1.0, "a number from 0 to 1"))},
    "grpo": {
        **_GROUPS,
        "low": (0.2, _real(0.0, 1.0, "a number from 0 to 1")),
        "high": (0.28, _real(0.0, _ANY, "a number of at least 0")),
        "old_from": ("batch", _one_of("batch", "current")),
        "average": ("response", _one_of("response", "token")),
        "kl": (0.0, _real(0.0, _ANY, "a number of at least 0")),
        "distill": (0.0, _real(0.0, _ANY, "a number of at least 0")),
        "bound": (5.0, _real(1e-6, _ANY, "a number above 0")),
    },
    "cross_entropy": {},
    "dpo": {"beta": (0.1, _real(1e-12, _ANY, "a number above 0"))},
    "fuse": {
        "labels": (0.9, _real(0.0, 1.0, "a number from 0 to 1")),
        "top": (10, ("a whole number of at least 1", lambda value: type(value) is int and value >= 1)),
    },
    "distill": {
        "temperature": (1.0, _real(1e-6, _ANY, "a number above 0")),
        "labels": (0.0, _real(0.0, 1.0, "a number from 0 to 1")),
    },
}
"""For each loss its options: default, and what a value must be.

``rift`` (arXiv 2601.09253): ``length_norm``: the probability of a response is that of its mean token; ``means``: over
all responses, or over the positive and the negative ones apart; ``negatives: linear`` is reward weighting without the
bound, for comparison.
``asympo``, ``spo`` (arXiv 2606.03070): ``floor`` under the mean token loss that divides; ``negative_scale`` of negative
advantages (1: the plain group-relative loss). ``grpo``: clipped ratios; ``old_from``: log probabilities of the policy
that sampled, from the batch or the current ones; ``average`` over responses of a group, or over tokens; ``kl`` to the
reference; ``distill`` and ``bound``: strength and bound of the token advantages towards a teacher (arXiv 2604.27083).
Of all three: ``advantage_from`` rewards and groups, or the batch; ``deviation``: divided by the group's standard
deviation too. ``dpo`` (arXiv 2305.18290): rows 2k and 2k + 1 are the chosen and the rejected response of a pair.
``cross_entropy``: of the labels, as the model's own. ``distill``: KL(teacher || student) per token; ``labels``: weight
of the labels' cross-entropy beside it. ``fuse`` (arXiv 2408.07990): cross-entropy to ``top`` entries of a distribution
that the batch has for every token, beside the labels'.
"""

GROUPED = ("asympo", "spo", "grpo")
"""Losses whose responses come in groups, one for each prompt."""


@dataclass(frozen=True, slots=True)
class LossConfig:
    """A loss by ``name``, or ``package.module:function``, with its ``options``.

    ``chunk``: entries of the vocabulary whose logits are there at once (0: all). ``mask``: the batch has
    ``response_mask`` [B,S], beside labels of -100 where a token is no response.
    """

    __pydantic_config__: ClassVar = STRICT
    name: str
    options: dict[str, Any] = field(default_factory=dict)
    chunk: int = 0
    mask: bool = False

    def __post_init__(self) -> None:
        if self.chunk < 0:
            raise InputError(f"loss {self.name}: chunk is {self.chunk}; expected 0 (whole logits) or more")
        if is_named_code(self.name):
            return
        if self.name not in OPTIONS:
            raise InputError(f"loss: found {shown(self.name)}, expected one of {', '.join(OPTIONS)}, or"
                             " package.module:function")
        known = OPTIONS[self.name]
        for key, value in self.options.items():
            if key not in known:
                raise InputError(f"loss {self.name}: has no option {shown(key)}; expected {', '.join(known)}")
            text, fits = known[key][1]
            if not fits(value):
                raise InputError(f"loss {self.name}: {key}: found {shown(value)}, expected {text}")

    @property
    def values(self) -> dict[str, Any]:
        """All options, given or by default."""
        return {**{key: item[0] for key, item in OPTIONS.get(self.name, {}).items()}, **self.options}


@dataclass(frozen=True, slots=True)
class ReferenceConfig:
    """A frozen model beside the trained one, forward only: the reference of a loss, or its teacher.

    ``model``: ``self`` (the same architecture with the weights that training starts from), or a folder with another
    configuration of the same vocabulary. ``weights``: its folder of weights; None: that of ``model``, if it has any.
    """

    __pydantic_config__: ClassVar = STRICT
    model: str = "self"
    weights: str | None = None


@dataclass(frozen=True, slots=True)
class RecipeConfig:
    """What training adds to a model at capture."""

    __pydantic_config__: ClassVar = STRICT
    loss: LossConfig | None = None
    reference: ReferenceConfig | None = None
    adapters: AdapterConfig | None = None
    router: RouterConfig | None = None
    expand: ExpandConfig | None = None

    def __post_init__(self) -> None:
        if self.expand is not None and self.adapters is not None:
            raise InputError("expand: does not go with adapters, for each freezes what the other trains; leave one of"
                             " them out")
        if self.reference is not None and (self.loss is None or self.loss.name not in ("dpo", "distill", "grpo")):
            raise InputError("reference: a frozen model is of use to the losses dpo, distill and grpo (kl) alone; name"
                             " one of them, or leave it out")

    def __bool__(self) -> bool:
        return self != RecipeConfig()


def loss_config(given: str | LossConfig | Mapping[str, Any]) -> LossConfig:
    """A loss from its bare name, or as it is."""
    if isinstance(given, LossConfig):
        return given
    return LossConfig(given) if isinstance(given, str) else LossConfig(**given)
