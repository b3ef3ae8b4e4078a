"""A recipe's loss beside a language model: what capture calls, and which inputs it adds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mipipe.graphs.errors import GraphError, InputError
from mipipe.graphs.models import loss as normalised
from mipipe.graphs.named_code import import_named, is_named_code
from mipipe.graphs.operators import vocabulary
from mipipe.graphs.recipes import losses
from mipipe.graphs.recipes.options import GROUPED, LossConfig

REFERENCE = "reference"
"""The name of the frozen model among the modules of the trained one."""


class HiddenHead(nn.Linear):
    """A head that hands on what it is given; the loss calls it again with labels, or with a teacher's head, for what
    it wants to know of the logits, which are made in blocks of the vocabulary."""

    def forward(self, hidden: Tensor, labels: Tensor | None = None, teacher: _Head | None = None, block: int = 0,
                temperature: float = 1.0) -> Tensor:
        if labels is not None:
            return torch.ops.mipipe.label_log_probs(hidden, self.weight, self.bias, labels, block)[0]
        if teacher is not None:
            assert teacher.head is not None
            return torch.ops.mipipe.teacher_distance(hidden, self.weight, self.bias, teacher.rows, teacher.head.weight,
                                                     teacher.head.bias, temperature, block)[0]
        hidden.mipipe_hidden = True  # type: ignore[attr-defined]  # what is computed from it is another tensor
        return hidden


@dataclass(frozen=True)
class RecipeLoss:
    """The loss of a recipe on a model's output object, for `mipipe.graphs.capture.model`.

    ``shift``: position t predicts label t + 1. ``coefficient`` of a router's auxiliary loss, ``sharpness`` of its own
    (`mipipe.graphs.models.tasks.TaskLoss`), ``z`` of the z-loss. ``reference``: the module has a frozen model of that
    name. ``real``: the dtype of what a batch gives for each response.
    """

    config: LossConfig
    shift: bool
    rows: int
    tokens: int
    coefficient: float = 0.0
    sharpness: float = 0.0
    z: float = 0.0
    constants: Mapping[str, Any] = field(default_factory=dict)
    reference: bool = False
    real: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        name = self.config.name
        if name == "distill" and not self.reference:
            raise InputError("loss distill: needs a teacher; give 'reference' (a folder, or self) in the config")
        if name == "dpo" and self.rows % 2:
            raise InputError(f"loss dpo: a microbatch has {self.rows} rows, but a pair is two of them, chosen and"
                             " rejected; capture with an even --batch")

    def extra_inputs(self, device: str) -> dict[str, Tensor]:
        """Example tensors of what the loss takes beside the model's own inputs."""
        def of(*names: str) -> dict[str, Tensor]:
            return {name: torch.zeros(self.rows, dtype=self.real, device=device) for name in names}

        def by_token(*names: str) -> dict[str, Tensor]:
            return {name: torch.zeros(self.rows, self.tokens, dtype=self.real, device=device) for name in names}

        name, values = self.config.name, self.config.values
        made: dict[str, Tensor] = {}
        if is_named_code(name):
            given = getattr(self.function, "inputs", None)
            tensors = {} if given is None else given(self.rows, self.tokens)
            made |= {key: item.to(device) for key, item in tensors.items()}
        elif name == "rift":
            made |= of("rewards", "scales")
        elif name in GROUPED:
            made |= of("advantages", "scales")
        if name == "grpo":
            made |= by_token("old_log_probs") if values["old_from"] == "batch" else {}
            made |= by_token("reference_log_probs") if values["kl"] and not self.reference else {}
            made |= {**by_token("teacher_log_probs"), **of("foreign")} if values["distill"] else {}
        if name == "dpo" and not self.reference:
            made |= of("reference_log_probs")
        if name == "fuse":
            sizes = self.rows, self.tokens, values["top"]
            made |= {"fused_ids": torch.zeros(sizes, dtype=torch.int64, device=device),
                     "fused_probs": torch.zeros(sizes, dtype=self.real, device=device)}
        if self.config.mask:
            made["response_mask"] = torch.zeros(self.rows, self.tokens, dtype=torch.int64, device=device)
        return made

    @property
    def withheld(self) -> frozenset[str]:
        return frozenset({"labels", *self.extra_inputs("meta")})

    @property
    def function(self) -> Any:
        """The function of a loss that code names."""
        found = import_named(self.config.name)
        if not callable(found):
            raise InputError(f"loss {self.config.name}: is no function; expected function(output, inputs, **options)")
        return found

    @property
    def info(self) -> dict[str, Any]:
        """How the loss is normalised: see `mipipe.graphs.recipes.rows`, or as the function says (``info``)."""
        name, values = self.config.name, self.config.values
        named = {"name": name, "options": values, "chunk": self.config.chunk, "mask": self.config.mask}
        if is_named_code(name):
            return {**getattr(self.function, "info", normalised.MEAN), **named}
        spec = {"reduction": "rows", "labels": "labels", "ignore_index": vocabulary.IGNORED, "shift": self.shift,
                **named}
        rows, real = [self.rows], str(self.real).removeprefix("torch.")
        derived = [key for key in ("scales", "advantages") if key in self.extra_inputs("meta")]
        batch: dict[str, Any] = {key: [list(item.shape), str(item.dtype).removeprefix("torch.")]
                                 for key, item in self.extra_inputs("meta").items() if key not in derived}
        if name in GROUPED:
            batch |= {"rewards": [rows, real], "group_ids": [rows, "int64"]}
            if values["advantage_from"] == "batch":
                derived.remove("advantages")
                batch["advantages"] = batch.pop("rewards")
        return {**spec, "derived": derived, "batch": batch}

    def prepare(self, module: nn.Module) -> nn.Module:
        """The module with a head that leaves the product to the loss, where that is made in blocks.

        Raises:
            InputError: the module has no plain head.
        """
        if self.config.chunk and self.config.name == "fuse":
            raise InputError("loss fuse: chunk does not go with it, for it reads many logits of every token; leave it"
                             " out")
        if self.config.chunk:
            parts = [module, *([getattr(module, REFERENCE)] if self.reference else [])]
            for part in parts:
                head = part.get_output_embeddings() if hasattr(part, "get_output_embeddings") else None
                if type(head) is not nn.Linear:
                    raise InputError(f"loss {self.config.name}: chunk needs a model whose logits are made by one linear"
                                     f" layer; the head of {type(part).__name__} is a {type(head).__name__}")
                head.__class__ = HiddenHead
        return module

    def before(self, inputs: Mapping[str, Tensor], module: nn.Module) -> Any:
        """The output of the frozen model on the same inputs; None where there is none."""
        if not self.reference:
            return None
        own = {key: item for key, item in inputs.items() if key not in self.withheld}
        fixed = {key: item for key, item in self.constants.items() if key != "output_router_logits"}
        return getattr(module, REFERENCE)(**own, **fixed)

    def on_module(self, output: Any, inputs: Mapping[str, Tensor], module: nn.Module, frozen: Any) -> Tensor:
        """The loss of a module's ``output``; ``frozen``: what `before` gave."""
        if is_named_code(self.config.name):
            return self.function(output, inputs, **self.config.options)
        labels = inputs["labels"]
        mask = labels != vocabulary.IGNORED
        if self.config.mask:
            mask = mask & (inputs["response_mask"] != 0)
            labels = torch.where(mask, labels, vocabulary.IGNORED)
        labels, mask = self._predicted(labels, vocabulary.IGNORED), self._predicted(mask, False)
        head = _Head.of(module, output, labels, self)
        other = None if frozen is None else _Head.of(getattr(module, REFERENCE), frozen, labels, self)
        total, share = self._terms(head, mask, inputs, other)
        auxiliary = getattr(output, "aux_loss", None)
        if self.coefficient and isinstance(auxiliary, Tensor):
            total = total + self.coefficient * auxiliary.to(total.dtype) * share
        if self.sharpness:
            total = total + self.sharpness * output.router_loss.to(total.dtype) * share
        if self.z:
            total = total + self.z * output.z_loss.to(total.dtype) * share
        return total

    def __call__(self, output: Any, inputs: Mapping[str, Tensor]) -> Tensor:
        raise GraphError(f"loss {self.config.name}: needs the module beside its output; capture calls it so")

    def _predicted(self, x: Tensor, last: float = 0.0) -> Tensor:
        """What is given for each token, where it is predicted [B,T,..]; ``last``: where no token is."""
        return normalised.shifted(x, last) if self.shift else x

    def _terms(self, head: _Head, mask: Tensor, inputs: Mapping[str, Tensor],
               other: _Head | None) -> tuple[Tensor, Tensor | float]:
        """The sum, and the microbatch's share in what it is divided by."""
        name, values = self.config.name, self.config.values
        if name == "distill":
            assert other is not None
            distances = head.distances(other, values["temperature"])
            log_probs = head.log_probs() if values["labels"] else None
            return losses.distill(distances, log_probs, mask, **values), mask.sum()
        frozen = None if other is None else other.log_probs()  # first, so that the sum is with the model that trains
        log_probs = head.log_probs()
        if name == "cross_entropy":
            return -log_probs.sum(), mask.sum()
        if name == "fuse":
            ids, probs = (self._predicted(inputs[key]) for key in ("fused_ids", "fused_probs"))
            return losses.fuse(log_probs, head.log_probs_of(ids), probs, mask, **values), mask.sum()
        if name == "rift":
            return losses.rift(log_probs, mask, inputs["rewards"], inputs["scales"], **values), float(self.rows)
        if name == "dpo":
            known = inputs["reference_log_probs"] if frozen is None else frozen.sum(-1)
            return losses.dpo(log_probs, known, **values), self.rows / 2
        advantages, scales = inputs["advantages"], inputs["scales"]
        if name == "grpo":
            def by_token(key: str) -> Tensor | None:
                return None if key not in inputs else self._predicted(inputs[key])

            reference = by_token("reference_log_probs") if frozen is None else frozen
            old = by_token("old_log_probs")
            total = losses.grpo(log_probs, mask, advantages, scales, log_probs.detach() if old is None else old,
                                reference, by_token("teacher_log_probs"), inputs.get("foreign"), **values)
            return total, mask.sum() if values["average"] == "token" else scales.sum()
        made = losses.asympo if name == "asympo" else losses.spo
        return made(log_probs, mask, advantages, scales, **values), scales.sum()


@dataclass(frozen=True)
class _Head:
    """The end of a model: logits [N,V], or the hidden states [N,D] and the head that makes logits of them."""

    rows: Tensor
    labels: Tensor
    head: HiddenHead | None
    block: int

    @classmethod
    def of(cls, module: nn.Module, output: Any, labels: Tensor, loss: RecipeLoss) -> _Head:
        """The head of a model that gave ``output``; ``labels`` [B,T]."""
        found = output.logits
        rows = found.reshape(-1, found.shape[-1])
        if not loss.config.chunk:
            wide = rows if rows.dtype in (torch.float32, torch.float64) else rows.float()
            return cls(wide, labels, None, 0)
        head: Any = module.get_output_embeddings()  # type: ignore[operator]
        if not getattr(found, "mipipe_hidden", False):
            raise GraphError(f"loss {loss.config.name}: chunk needs a model whose head is its last layer; leave it out")
        return cls(rows, labels, head, loss.config.chunk)

    def log_probs(self) -> Tensor:
        """Log probabilities of the labels [B,T], 0 where a label is -100."""
        flat = self.labels.reshape(-1)
        if self.head is None:
            found = -nn.functional.cross_entropy(self.rows, flat, reduction="none", ignore_index=vocabulary.IGNORED)
        else:
            found = self.head(self.rows, labels=flat, block=self.block)
        return found.reshape(self.labels.shape)

    def log_probs_of(self, ids: Tensor) -> Tensor:
        """Log probabilities of several entries of the vocabulary at every place [B,T,K]."""
        found = self.rows.log_softmax(-1).gather(-1, ids.reshape(len(self.rows), -1))
        return found.reshape(ids.shape)

    def distances(self, teacher: _Head, temperature: float) -> Tensor:
        """KL(teacher || student) [B,T] at a temperature."""
        if self.head is None:
            own, other = (item.rows.div(temperature).log_softmax(-1) for item in (self, teacher))
            if own.shape != other.shape:
                raise GraphError(f"loss distill: the teacher has {other.shape[-1]} tokens in its vocabulary, the"
                                 f" student {own.shape[-1]}; they must share one tokenizer")
            found = (other.exp() * (other - own)).sum(-1)
        else:
            found = self.head(self.rows, teacher=teacher, block=self.block, temperature=temperature)
        return found.reshape(self.labels.shape)
