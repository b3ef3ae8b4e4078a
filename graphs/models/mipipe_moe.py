"""Converted mixtures of experts: models of transformers whose experts mipipe has factorised, merged, compressed or
made.

This file stands alone: `mipipe convert` copies it into a converted model's folder, from where transformers loads it
with ``trust_remote_code=True``. A class ``Mipipe<Host>ForCausalLM`` is the host's own class (attention, norms, router,
shared experts, loss) with other experts; of a dense host, whose MLPs became mixtures, the router is made here too. The
config is the host's with the entry ``mipipe_moe``:

    experts         banks (one matrix per expert), latent (MoLAE) or compressed (MC-SMoE)
    num_experts     what the router chooses among
    layers          by layer number, as text: what differs, such as slots (of merged experts) or the inner size

Legend: T tokens, k experts per token, N rows (tokens times k), E experts, S slots, H hidden, M inner size, h latent
size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CONFIG_MAPPING
from transformers.activations import ACT2FN
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

HOSTS = {"Llama": "llama", "Mistral": "mistral", "Qwen2": "qwen2", "Qwen3": "qwen3", "Mixtral": "mixtral",
         "Qwen2Moe": "qwen2_moe", "Qwen3Moe": "qwen3_moe", "Olmoe": "olmoe", "DeepseekV2": "deepseek_v2",
         "DeepseekV3": "deepseek_v3", "Glm4Moe": "glm4_moe", "Dots1": "dots1"}
"""Model types by their part in class names."""
PREFIX = "mipipe_"


def grouped_loop(rows: Tensor, bank: Tensor, ends: Tensor) -> Tensor:
    """``rows[first:last] @ bank[e]`` for every e, whose rows end at ``ends[e]``: [N,I], [E,I,O] -> [N,O]."""
    parts, first = [], 0
    for number, last in enumerate(ends.tolist()):
        if last > first:
            parts.append(rows[first:last] @ bank[number])
        first = last
    return torch.cat(parts) if parts else rows.new_zeros(0, bank.shape[-1])


def of(bank: Tensor, part: slice | None) -> Tensor:
    """Some slots of a bank; None: the bank itself."""
    return bank if part is None else bank[part]


def scaled(rows: Tensor, scale: Tensor | None) -> Tensor:
    """Rows [N,M] times their scales [N,1]; None: the rows."""
    return rows if scale is None else rows * scale


class Experts(nn.Module):
    """What the kinds of experts share: rows are sorted by slot, each slot works on its own, the results are weighted.

    ``slots``: the slot of every expert that the router knows, where several share one (merged experts).
    """

    has_gate, is_transposed, is_concatenated = True, False, True
    separate = False
    """Whether a slot's weights are rows of the banks and nothing else, as expert parallelism moves them."""

    @property
    def scales_inner(self) -> bool:
        """Whether `expert_outputs` takes the routing weights: its down projection has no bias."""
        return not self.has_bias

    def __init__(self, config: Any, settings: dict[str, Any]) -> None:
        super().__init__()
        self.has_bias = bool(settings.get("bias"))
        self.config = config
        slots = settings.get("slots")
        self.num_experts = max(slots) + 1 if slots else settings["num_experts"]
        self.hidden, self.inner = config.hidden_size, settings["inner"]
        self.act_fn = ACT2FN[config.hidden_act]
        self.slots: Tensor | None
        self.register_buffer("slots", torch.tensor(slots) if slots else None)

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """[T,H], chosen experts [T,k] and their weights [T,k] -> [T,H]."""
        if self.slots is not None:
            index = self.slots[index]
        registered = _interface(self.config)
        if registered is not None:
            return registered(self, hidden, index, weights)
        slot, order = torch.sort(index.reshape(-1), stable=True)
        ends = torch.bincount(slot, minlength=self.num_experts).cumsum(0)
        token = order // index.shape[1]
        rows = self.expert_inputs(hidden, token, slot, 0, self.num_experts)
        out = self.expert_outputs(rows, ends, slot, None, grouped_loop)
        return torch.zeros_like(hidden).index_add(0, token, (out * weights.reshape(-1, 1)[order]).to(hidden.dtype))

    def expert_inputs(self, hidden: Tensor, token: Tensor, slot: Tensor, first: int, size: int) -> Tensor:
        """What `expert_outputs` gets for each of the sorted rows; ``slot`` counts from slot ``first``, of ``size``."""
        return hidden[token]

    def expert_outputs(self, rows: Tensor, ends: Tensor, slot: Tensor, part: slice | None, grouped: Any,
                       scale: Tensor | None = None) -> Tensor:
        """What the slots ``part`` (None: all) make of sorted rows: [N,H]. ``grouped``: as `grouped_loop`. ``scale``
        [N,1]: by which the down projection's input is multiplied (`scales_inner`)."""
        raise NotImplementedError  # each of `KINDS` has its own; this class is none of them

    def gated(self, joined: Tensor) -> Tensor:
        gate, up = joined.chunk(2, dim=-1)
        return self.act_fn(gate) * up

    _apply_gate = gated


class Banks(Experts):
    """Whole matrices, one of each kind per slot; ``bias``: with one on the output."""

    separate = True

    def __init__(self, config: Any, settings: dict[str, Any]) -> None:
        super().__init__(config, settings)
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * self.inner, self.hidden))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, self.hidden, self.inner))
        self.down_proj_bias = nn.Parameter(torch.empty(self.num_experts, self.hidden)) if self.has_bias else None

    def expert_outputs(self, rows: Tensor, ends: Tensor, slot: Tensor, part: slice | None, grouped: Any,
                       scale: Tensor | None = None) -> Tensor:
        inner = self.gated(grouped(rows, of(self.gate_up_proj, part).transpose(1, 2), ends))
        out = grouped(scaled(inner, scale), of(self.down_proj, part).transpose(1, 2), ends)
        return out if self.down_proj_bias is None else out + of(self.down_proj_bias, part)[slot]


class LatentExperts(Experts):
    """MoLAE (arXiv 2503.23100): ``group`` neighbouring experts share the projections into a latent space.

    ``gate_up_latent`` [groups, 2 h, H] is what they share (gate's rows first), ``gate_proj`` and ``up_proj`` [E,M,h]
    are their own. Where there are no more groups than experts per token, every token's latents are computed once per
    group, else once per row.
    """

    def __init__(self, config: Any, settings: dict[str, Any]) -> None:
        super().__init__(config, settings)
        self.group, self.latent = settings["group"], settings["latent"]
        self.groups = -(-self.num_experts // self.group)
        self.gate_up_latent = nn.Parameter(torch.empty(self.groups, 2 * self.latent, self.hidden))
        self.gate_proj = nn.Parameter(torch.empty(self.num_experts, self.inner, self.latent))
        self.up_proj = nn.Parameter(torch.empty(self.num_experts, self.inner, self.latent))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, self.hidden, self.inner))
        self.once = self.groups <= config.num_experts_per_tok

    def expert_inputs(self, hidden: Tensor, token: Tensor, slot: Tensor, first: int, size: int) -> Tensor:
        if not self.once:
            return hidden[token]
        low, high = self._groups(first, first + size)
        bank = self.gate_up_latent if size == self.num_experts else self.gate_up_latent[low:high]
        latents = F.linear(hidden, bank.reshape(-1, self.hidden)).view(-1, 2 * self.latent)
        return latents[token * (high - low) + (slot + first) // self.group - low]

    def expert_outputs(self, rows: Tensor, ends: Tensor, slot: Tensor, part: slice | None, grouped: Any,
                       scale: Tensor | None = None) -> Tensor:
        if not self.once:
            first, stop = (0, self.num_experts) if part is None else (part.start, part.stop)
            low, high = self._groups(first, stop)
            last = [min((group + 1) * self.group, stop) - first - 1 for group in range(low, high)]
            shared = ends[last[0]::self.group] if len(last) > 1 else ends[last[0]:last[0] + 1]
            if len(shared) < len(last):  # a smaller last group
                shared = torch.cat([shared, ends[-1:]])
            bank = self.gate_up_latent if part is None else self.gate_up_latent[low:high]
            rows = grouped(rows, bank.transpose(1, 2), shared)
        gate, up = (grouped(half.contiguous(), of(bank, part).transpose(1, 2), ends) for half, bank in zip(
            rows.chunk(2, dim=-1), (self.gate_proj, self.up_proj), strict=True))
        inner = scaled(self.act_fn(gate) * up, scale)
        return grouped(inner, of(self.down_proj, part).transpose(1, 2), ends)

    def _groups(self, first: int, stop: int) -> tuple[int, int]:
        if first % self.group or (stop % self.group and stop != self.num_experts):
            raise ValueError(f"experts {first} to {stop} are no whole groups of {self.group}; make fewer parts")
        return first // self.group, -(-stop // self.group)


class CompressedExperts(Experts):
    """MC-SMoE (arXiv 2310.01334): each matrix is ``left @ right`` of low rank, plus some whole rows.

    ``rows`` [S, r]: which rows; they have their values in ``sparse`` [S, r, columns].
    """

    SHAPES = ("gate_proj", "up_proj", "down_proj")

    def __init__(self, config: Any, settings: dict[str, Any]) -> None:
        super().__init__(config, settings)
        for name in self.SHAPES:
            out, into = (self.hidden, self.inner) if name == "down_proj" else (self.inner, self.hidden)
            rank, kept = settings["ranks"][name], settings["rows"][name]
            self.register_parameter(f"{name}_left", nn.Parameter(torch.empty(self.num_experts, out, rank)))
            self.register_parameter(f"{name}_right", nn.Parameter(torch.empty(self.num_experts, rank, into)))
            self.register_parameter(f"{name}_sparse", nn.Parameter(torch.empty(self.num_experts, kept, into)))
            self.register_buffer(f"{name}_rows", torch.arange(kept).repeat(self.num_experts, 1))

    def expert_outputs(self, rows: Tensor, ends: Tensor, slot: Tensor, part: slice | None, grouped: Any,
                       scale: Tensor | None = None) -> Tensor:
        def project(x: Tensor, name: str) -> Tensor:
            left, right, sparse, places = (of(getattr(self, f"{name}_{item}"), part)
                                           for item in ("left", "right", "sparse", "rows"))
            out = grouped(grouped(x, right.transpose(1, 2), ends), left.transpose(1, 2), ends)
            if not sparse.shape[1]:
                return out
            return out.scatter_add(1, places[slot], grouped(x, sparse.transpose(1, 2), ends))

        inner = self.act_fn(project(rows, "gate_proj")) * project(rows, "up_proj")
        return project(scaled(inner, scale), "down_proj")


KINDS: dict[str, type[Experts]] = {"banks": Banks, "latent": LatentExperts, "compressed": CompressedExperts}


class Router(nn.Module):
    """The router of a mixture made from a dense MLP: logits [T,E], weights [T,k] and chosen experts [T,k].

    ``softmax``: over all experts, at ``temperature``, scaled to the sum of one over the chosen ones: the softmax over
    the chosen ones alone. ``residual`` (arXiv 2512.02351): one plus the logit.
    """

    def __init__(self, config: Any, settings: dict[str, Any]) -> None:
        super().__init__()
        self.top_k, self.kind = config.num_experts_per_tok, settings["router"]
        self.temperature = getattr(config, "router_temperature", 1.0)
        self.weight = nn.Parameter(torch.empty(settings["num_experts"], config.hidden_size))

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = F.linear(hidden, self.weight)
        exact = torch.promote_types(logits.dtype, torch.float32)
        scores = logits if self.kind == "residual" else F.softmax(logits.to(exact) / self.temperature, dim=-1)
        chosen, index = torch.topk(scores, self.top_k, dim=-1)
        weights = 1 + chosen if self.kind == "residual" else chosen / chosen.sum(-1, keepdim=True)
        return logits, weights.to(logits.dtype), index


class SharedExpert(nn.Module):
    """An expert for every token, weighted by one plus its own logit."""

    def __init__(self, config: Any, inner: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * inner, bias=False)
        self.down_proj = nn.Linear(inner, config.hidden_size, bias=False)
        self.weight_gate = nn.Linear(config.hidden_size, 1, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(hidden).chunk(2, dim=-1)
        return (1 + self.weight_gate(hidden)) * self.down_proj(self.act_fn(gate) * up)


class ConvertedMlp(nn.Module):
    """A dense model's MLP as a mixture of experts."""

    def __init__(self, config: Any, settings: dict[str, Any]) -> None:
        super().__init__()
        self.gate = Router(config, settings)
        self.experts = KINDS[settings["experts"]](config, settings)
        self.shared_expert = SharedExpert(config, settings["shared"]) if settings.get("shared") else None

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, weights, index = self.gate(hidden)
        out = self.experts(hidden, index, weights)
        if self.shared_expert is not None:
            out = out + self.shared_expert(hidden)
        return out.reshape(hidden_states.shape)


def convert_layers(model: nn.Module) -> None:
    """Give a host model the experts that its config describes."""
    config: Any = model.config
    common = {key: value for key, value in config.mipipe_moe.items() if key != "layers"}
    for number, own in config.mipipe_moe["layers"].items():
        layer = model.model.layers[int(number)]  # type: ignore[union-attr, index]
        settings = {**common, **own}
        if hasattr(layer.mlp, "experts"):  # type: ignore[union-attr]
            layer.mlp.experts = KINDS[settings["experts"]](config, settings)  # type: ignore[union-attr]
        else:
            layer.mlp = ConvertedMlp(config, settings)  # type: ignore[union-attr]


def init_converted(module: nn.Module, std: float) -> bool:
    """Fill the parameters of a module of this file that came from no file; whether it is one."""
    if not isinstance(module, (Experts, Router)):
        return False
    for name, item in module.named_parameters(recurse=False):
        if getattr(item, "_is_hf_initialized", False):
            continue
        if name.endswith("_bias") or getattr(module, "kind", "") == "residual":
            item.data.zero_()
        else:
            item.data.normal_(0.0, std)
    return True


def _interface(config: Any) -> Any:
    """mipipe's own implementation of experts, where it is registered and chosen."""
    if getattr(config, "_experts_implementation", None) != "mipipe":
        return None
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    return ALL_EXPERTS_FUNCTIONS["mipipe"]


def classes(model_type: str) -> tuple[Any, Any]:
    """The config and model class of ``mipipe_<host>``.

    Raises:
        KeyError: there is no such host.
    """
    part = {kind: name for name, kind in HOSTS.items()}[model_type.removeprefix(PREFIX)]
    names = f"Mipipe{part}Config", f"Mipipe{part}ForCausalLM"
    found = globals()
    if names[0] not in found:
        found[names[0]], found[names[1]] = _make(HOSTS[part], *names)
    return found[names[0]], found[names[1]]


def _make(host: str, config_name: str, model_name: str) -> tuple[Any, Any]:
    base = CONFIG_MAPPING[host]
    model: Any = MODEL_FOR_CAUSAL_LM_MAPPING[base]
    fields = {"mipipe_moe": dict[str, Any] | None, "num_experts_per_tok": int, "router_temperature": float}
    made_config: Any = type(config_name, (base,), {
        "__module__": __name__, "model_type": PREFIX + host, "mipipe_moe": None, "router_temperature": 1.0,
        "num_experts_per_tok": getattr(base, "num_experts_per_tok", 1), "__annotations__": fields})

    def build(self: Any, config: Any) -> None:
        model.__init__(self, config)
        convert_layers(self)
        self.post_init()
        for module in self.modules():
            init_converted(module, config.initializer_range)

    def init_weights(self: Any, module: nn.Module) -> None:
        if not init_converted(module, self.config.initializer_range):
            model._init_weights(self, module)

    made: Any = type(model_name, (model,), {"__module__": __name__, "config_class": made_config, "__init__": build,
                                       "_init_weights": init_weights})
    made_config.register_for_auto_class()
    made.register_for_auto_class("AutoModelForCausalLM")
    return made_config, made


def __getattr__(name: str) -> Any:
    part = name.removeprefix("Mipipe").removesuffix("Config").removesuffix("ForCausalLM")
    if name.startswith("Mipipe") and part in HOSTS:
        return classes(PREFIX + HOSTS[part])[name.endswith("ForCausalLM")]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
