"""Models that act on their own gradients or keep state in Python, for `test_faithful`; lines are named in errors."""

from __future__ import annotations

import functools
import itertools
import os
import random
import secrets
import time
import uuid
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint


class Halved(torch.autograd.Function):
    """The square, with half of its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * ctx.saved_tensors[0]


class Once(torch.autograd.Function):
    """With a backward of its own graph, which none may follow, and gradients that may be missing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.kept = x.detach().clone()
        return x.sin(), x * 2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, first: Tensor | None, second: Tensor | None) -> Tensor | None:
        grads = [item * scale for item, scale in ((first, ctx.kept.cos() * 0.3), (second, 5)) if item is not None]
        return grads[0] if len(grads) == 1 else sum(grads)  # type: ignore[return-value]


class Again(torch.autograd.Function):
    """Computes its forward again in the backward, as reversible networks do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.tanh(x @ weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = (item.detach().requires_grad_() for item in ctx.saved_tensors)
        with torch.enable_grad():
            out = torch.tanh(x @ weight)
        torch.autograd.backward(out, grad)
        assert x.grad is not None and weight.grad is not None
        return x.grad * 0.5, weight.grad


class Around(torch.autograd.Function):
    """One Function inside another, forwards and backwards."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return Halved.apply(x) + 1

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return Reversed.apply(grad) * 3


halved = Halved.apply  # bound before any export


class Several(torch.autograd.Function):
    """Several results of which one is no tensor and one has no gradient, options, and a weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, label: str, scale: float = 2.0) -> tuple[Any, ...]:
        ctx.save_for_backward(x, weight)
        ctx.scale = scale
        positive = (x > 0).long()
        ctx.mark_non_differentiable(positive)
        return x @ weight * scale, positive, None, label

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *rest: Any) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        ours = 0.5 * grad @ weight.t() * ctx.scale if ctx.needs_input_grad[0] else None
        return ours, 3 * x.t() @ grad, None, None


class Modern(torch.autograd.Function):
    """With setup_context, a keyword argument, and two results."""

    @staticmethod
    def forward(x: Tensor, factor: int = 3) -> tuple[Tensor, Tensor]:
        return x.exp() * factor, x.sin()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(output[0])

    @staticmethod
    def backward(ctx: Any, first: Tensor, second: Tensor) -> tuple[Any, ...]:
        return first * ctx.saved_tensors[0] * 0.3 + second, None


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return -grad


class Noise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward((torch.rand_like(x) > 0.5).to(x.dtype))
        return x * ctx.to_save[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad * ctx.saved_tensors[0]


class InPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


class Closure(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Module) -> Tensor:
        return layer(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return grad, None


class Model(nn.Module):
    """Two layers around ``middle``, which the cases replace."""

    def __init__(self, extra: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.weight = nn.Parameter(torch.randn(8, 8))
        self.extra = extra
        self.register_buffer("mask", (torch.arange(8) % 2).double())
        self.count, self.generator, self.numbers = 0, random.Random(1), np.random.default_rng(0)
        self.steps, self.state = itertools.count(1), SimpleNamespace(step=0)

    def middle(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = self.middle(torch.tanh(self.first(x)))
        return nn.functional.cross_entropy(self.head(torch.tanh(self.second(x))), y)


class Turned(nn.Module):
    """Its result lies column by column."""

    def forward(self, x: Tensor) -> Tensor:
        return (x * 2).t().contiguous().t()


class Decorated(Model):
    @torch.autocast("cpu", dtype=torch.bfloat16)
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return super().forward(x, y)


def model(middle: Callable[[Any, Tensor], Tensor] | None = None, extra: nn.Module | None = None) -> Model:
    kind = type("Own", (Model,), {"middle": middle}) if middle is not None else Model
    torch.manual_seed(0)
    return kind(extra).double()


def batch() -> dict[str, Tensor]:
    torch.manual_seed(2)
    return {"x": torch.randn(5, 8, dtype=torch.float64), "y": torch.randint(0, 3, (5,))}


def hook(function: Callable[[Any, Tensor], Callable[[Tensor], Tensor | None]]) -> Callable[[Any, Tensor], Tensor]:
    """A middle that puts a hook on its input."""
    def middle(self: Any, x: Tensor) -> Tensor:
        x.register_hook(function(self, x))
        return x + torch.sin(x)
    return middle


def chained(self: Any, x: Tensor) -> Tensor:
    x.register_hook(lambda grad: grad * 0.5)
    early = x * 2
    x.register_hook(lambda grad: grad + 0.01)
    x.register_hook(lambda grad: grad * 100).remove()
    return early + x


def masked(self: Any, x: Tensor) -> Callable[[Tensor], Tensor]:
    positive = (x > 0).to(x.dtype)
    return lambda grad: grad * positive


def under_no_grad(self: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        return halved(x).mul_(2) + x


def reentrant(self: Any, x: Tensor) -> Tensor:
    return checkpoint(self.second, x, use_reentrant=True) + checkpoint(lambda z: z.sin(), x, use_reentrant=True)


@functools.lru_cache
def table(size: int) -> Tensor:
    return torch.arange(size, dtype=torch.float64).cos()


TABLES: dict[int, Tensor] = {}
REGISTRY: dict[str, object] = {}
"""Holds itself, as registries of libraries do."""
REGISTRY["registry"] = REGISTRY


def tabled(self: Any, x: Tensor) -> Tensor:
    """Tables that are made once, as position embeddings are, in all the places where people keep them."""
    size = x.shape[1]
    if size not in TABLES:
        TABLES[size] = torch.arange(size).double().sin()
    if size not in self.cache:
        self.cache[size] = torch.arange(size).double()
    return x * table(size) + TABLES[size] * self.cache[size]


def with_cache() -> Model:
    made = model(tabled)
    made.cache = {}
    return made


KEPT: dict[str, Callable[[], Model]] = {
    "missing gradients": lambda: model(lambda self, x: Once.apply(x)[0] + sum(Once.apply(x))),
    "forward again in the backward": lambda: model(lambda self, x: Again.apply(x, self.weight)),
    "one inside another": lambda: model(lambda self, x: Around.apply(x)),
    "tables made once": with_cache,
    "checkpoints inside one another": lambda: model(lambda self, x: checkpoint(
        lambda z: checkpoint(self.second, z, use_reentrant=True).tanh(), x, use_reentrant=True)),
    "hook by functools.partial": lambda: model(hook(lambda *_: functools.partial(torch.mul, torch.tensor(0.3)))),
    "a forward hook that puts a hook": lambda: hooked_forward(model()),
    "function bound early": lambda: model(lambda self, x: halved(x) + halved(self.second(x))),
    "several results": lambda: model(lambda self, x: (lambda out, sign, *_: out * sign)(
        *Several.apply(x, self.weight, "text"))),
    "other options": lambda: model(lambda self, x: Several.apply(Several.apply(x, self.weight, "a", 0.5)[0].sin(),
                                                                 self.weight, "a", 0.7)[0]),
    "setup_context": lambda: model(lambda self, x: Modern.apply(Modern.apply(x)[1], factor=2)[0]),
    "its own input": lambda: model(lambda self, x: Reversed.apply(x) * x),
    "random numbers": lambda: model(lambda self, x: Noise.apply(x) + x),
    "without gradients": lambda: model(lambda self, x: x + under_no_grad(self, x)),
    "reentrant checkpoint": lambda: model(reentrant),
    "hook": lambda: model(hook(lambda self, x: lambda grad: grad * 0.1)),
    "hook that clips": lambda: model(hook(lambda self, x: lambda grad: grad.clamp(-1e-3, 1e-3))),
    "hook that reads a buffer": lambda: model(hook(lambda self, x: lambda grad: grad * self.mask)),
    "hook that reads the forward": lambda: model(hook(masked)),
    "hooks in a row, one removed": lambda: model(chained),
    "hook on a view": lambda: model(lambda self, x: hook(lambda *_: lambda grad: grad * 3)(self, x[:, :4])
                                    .repeat(1, 2)),
    "weight norm": lambda: model(lambda self, x: self.extra(x), parametrizations.weight_norm(nn.Linear(8, 8))),
    "spectral norm": lambda: model(lambda self, x: self.extra(x), parametrizations.spectral_norm(nn.Linear(8, 8))),
    "batch norm": lambda: model(lambda self, x: self.extra(x), nn.BatchNorm1d(8)),
    "dropout of another layout": lambda: model(lambda self, x: nn.functional.dropout(self.extra(x), 0.5), Turned()),
    "dropout twice": lambda: model(lambda self, x: self.extra(x) * self.extra(x), nn.Dropout(0.3)),
    "attention with dropout": lambda: model(lambda self, x: self.extra(x[None], x[None], x[None])[0][0],
                                            nn.MultiheadAttention(8, 2, dropout=0.2, batch_first=True)),
    "stochastic depth": lambda: model(lambda self, x: x + self.second(x) * (torch.rand(5, 1, dtype=x.dtype) > 0.3)),
    "a size that is remembered": lambda: model(remembered),
    "a counter that nothing reads": lambda: model(counted),
    "hook before a change in place": lambda: model(changed_after_hook),
    "hook after a change in place": lambda: model(lambda self, x: hook(lambda *_: lambda grad: grad * 3)(self, x.mul(2)
                                                                                                       .add_(1))),
    "written by out=": lambda: model(out_of_region),
    "empty and filled": lambda: model(copied),
    "a seed that nothing uses": lambda: model(seeded(lambda x: nn.functional.dropout(x, 0.0) + x)),
    "detach in place": lambda: model(lambda self, x: x + self.second(x).mul(2).detach_()),
}


def out_of_region(self: Any, x: Tensor) -> Tensor:
    """``out=`` writes what the schema says, which is not the first argument, into a tensor, a view and two tensors."""
    whole, part, rows = x * 3, torch.zeros_like(x), torch.empty(10, 8, dtype=x.dtype)
    values, places = torch.empty(5, 3, dtype=x.dtype), torch.empty(5, 3, dtype=torch.long)
    with torch.no_grad():
        torch.mul(x, 2, out=whole)
        torch.add(x[:, :4], 1, out=part[:, 4:])
        torch.cat([x, x.sin()], out=rows)
        torch.topk(x, 3, out=(values, places))
        torch.mul(self.mask, 0.5, out=self.mask)
        torch._foreach_mul_([rows, part], 0.7)
    return x + whole + part + rows[5:] + values.sum(-1, keepdim=True) + places.sum() + self.mask


def copied(self: Any, x: Tensor) -> Tensor:
    """Tensors made empty and filled: with the same values, with others' layout, dtype and shape, and changed then."""
    same, turned = torch.empty_like(x).copy_(x), torch.empty(8, 5, dtype=x.dtype).t().copy_(x.sin())
    row, half = torch.empty_like(x).copy_(x.mean(0)), torch.empty(5, 8, dtype=torch.float32).copy_(x * 2)
    return same.mul_(2) + x * turned + row + half.double()


def hooked_forward(made: Model) -> Model:
    def twice(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        out.register_hook(lambda grad: grad * 0.1)
        return out * 2

    made.second.register_forward_hook(twice)
    return made


def changed_after_hook(self: Any, x: Tensor) -> Tensor:
    y = x * 2
    y.register_hook(lambda grad: grad * 0.5)
    y[:, :4].mul_(3)
    return y.add_(1).square()


def seeded(draw: Callable[[Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    """A middle that draws after it has set torch's generator."""
    def middle(self: Any, x: Tensor) -> Tensor:
        torch.manual_seed(5)
        return draw(x)
    return middle


def drawn_twice(self: Any, x: Tensor) -> Tensor:
    state = torch.get_rng_state()
    once = nn.functional.dropout(x, 0.5)
    torch.set_rng_state(state)
    return once + nn.functional.dropout(x, 0.5)


def forked(self: Any, x: Tensor) -> Tensor:
    with torch.random.fork_rng():
        torch.random.manual_seed(3)
        return x + torch.randn_like(x)


def remembered(self: Any, x: Tensor) -> Tensor:
    if self.count < len(x):
        self.count = len(x)
    return x * self.count


def counted(self: Any, x: Tensor) -> Tensor:
    self.seen = self.__dict__.get("seen", 0)
    self.seen += 1
    return x


def hooked(change: Callable[[Model], object]) -> Callable[[], Model]:
    def make() -> Model:
        made = model()
        change(made)
        return made
    return make


def two_hooks(made: Model) -> None:
    made.head.weight.register_hook(lambda grad: grad * 2)
    made.head.weight.register_hook(lambda grad: grad + 1)
    made.first.bias.register_hook(lambda grad: grad * 0)


def tied_hook(made: Model) -> None:
    made.second.weight = made.first.weight
    made.first.weight.register_hook(lambda grad: grad * 0.1)


KEPT |= {
    "parameter hooks": hooked(two_hooks),
    "hook on a tied parameter": hooked(tied_hook),
    "parameter hook that reads a buffer": hooked(lambda made: made.weight.register_hook(lambda grad: grad * made.mask)),
}


def alternating(self: Any, x: Tensor) -> Tensor:
    self.count += 1
    return x * 2 if self.count % 2 else x


def late(self: Any, x: Tensor) -> Tensor:
    self.count += 1
    return x.detach() if self.count > 1000 else x


def in_a_namespace(self: Any, x: Tensor) -> Tensor:
    self.state.step += 1
    return x * min(1.0, self.state.step / 10)


CALLS = [0]


def in_a_list(self: Any, x: Tensor) -> Tensor:
    CALLS[0] += 1
    return x * CALLS[0]


def maps(self: Any, x: Tensor) -> Tensor:
    self.shown = self.second.shown = x.detach() * 2  # kept for a plot, as attention maps are
    return x


def appended(self: Any, x: Tensor) -> Tensor:
    self.told = [*self.__dict__.get("told", []), 1]
    return x * len(self.told)


def remembers(self: Any, x: Tensor) -> Tensor:
    last = self.__dict__.get("last", x.new_zeros(()))
    self.last = x.detach().mean()
    return x + last


def frozen_on_the_way(self: Any, x: Tensor) -> Tensor:
    self.second.weight.requires_grad_(False)
    return x


def hooked_view(self: Any, x: Tensor) -> Tensor:
    x = x * 2
    x[:, :4].register_hook(lambda grad: grad * 0.5)
    y = x[:, 4:]
    y.register_hook(lambda grad: grad * 0.5)
    y.add_(1)
    return x


class Counts(torch.autograd.Function):
    calls = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        Counts.calls += 1
        return x * Counts.calls

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class Decides(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 0.5 if grad.abs().max() > 1e-3 else grad


def in_half(self: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return self.second(x)


def assigned_data(self: Any, x: Tensor) -> Tensor:
    self.second.weight.data = self.second.weight.data * 0.9
    return x


def resized(self: Any, x: Tensor) -> Tensor:
    self.mask = self.mask[:4]
    return x


def packed_sequences(self: Any, x: Tensor) -> Tensor:
    return x + self.extra(nn.utils.rnn.pack_padded_sequence(x[None], torch.tensor([3]), batch_first=True))[1][0]


def packed(self: Any, x: Tensor) -> Tensor:
    with torch.autograd.graph.saved_tensors_hooks(lambda item: item * 2, lambda item: item):
        return torch.tanh(x) * x


def inferred(self: Any, x: Tensor) -> Tensor:
    with torch.inference_mode():
        shown = self.second(x)
    return x + shown


def own_gradient(self: Any, x: Tensor) -> Tensor:
    (made,) = torch.autograd.grad(self.second(x).square().sum(), x, create_graph=True)
    return x + made


REFUSED: dict[str, tuple[Callable[[], Model], str]] = {
    "function in place": (lambda: model(lambda self, x: InPlace.apply(x.clone())),
                          r"Function InPlace \(.*autograd\.py:\d+\) changes its input in place"),
    "function with a closure": (lambda: model(lambda self, x: Closure.apply(x, self.second)),
                                r"Closure \(.*autograd\.py:\d+\) reads a tensor second\.weight of shape \(8, 8\)"),
    "hook by value": (lambda: model(hook(lambda *_: lambda grad: grad if grad.norm().item() < 1 else grad * 0)),
                      r"gradient hook at .*autograd\.py:\d+ cannot be traced"),
    "hook on a parameter, every time": (lambda: model(lambda self, x: (self.weight.register_hook(lambda g: g), x)[1]),
                                        r"registers a hook \(.*autograd\.py:\d+\) on a parameter"),
    "hook on a node": (lambda: model(lambda self, x: (x.grad_fn.register_prehook(lambda grads: grads), x)[1]),
                       r"at .*autograd\.py:\d+, registers a hook on an autograd node"),
    "backward hook": (hooked(lambda made: made.second.register_full_backward_hook(lambda *_: None)),
                      r"module second \(Linear\) has a backward hook \(.*autograd\.py:\d+\)"),
    "backward pre-hook": (hooked(lambda made: made.second.register_full_backward_pre_hook(lambda *_: None)),
                          r"module second \(Linear\) has a backward hook"),
    "hook after accumulation": (hooked(lambda made: made.weight.register_post_accumulate_grad_hook(lambda p: None)),
                                r"parameter weight has a hook after accumulation \(.*autograd\.py:\d+\)"),
    "gradients in the forward": (lambda: model(own_gradient), r"at .*autograd\.py:\d+, computes gradients itself"),
    "packed tensors": (lambda: model(packed), r"at .*autograd\.py:\d+, changes what is kept for the backward"),
    "random": (lambda: model(lambda self, x: x if random.random() < 0.5 else x * 2),
               r"at .*autograd\.py:\d+, draws from Python's random\.random"),
    "random.choice": (lambda: model(lambda self, x: x * random.choice([1, 2])), "draws from Python's random"),
    "own generator": (lambda: model(lambda self, x: x * self.generator.random()), r"Python's Own\.generator"),
    "numpy's random": (lambda: model(lambda self, x: x * float(np.random.rand())),
                       r"at .*autograd\.py:\d+, draws from Python's numpy\.random"),
    "numpy's generator": (lambda: model(lambda self, x: x * float(self.numbers.random())), r"Python's Own\.numbers"),
    "itertools": (lambda: model(lambda self, x: x * next(self.steps)), r"Python's Own\.steps"),
    "every second call": (lambda: model(alternating),
                          r"autograd\.py:\d+, changes Own\.count in every call \(0, 1, 2\)"),
    "after many calls": (lambda: model(late), r"changes Own\.count in every call"),
    "namespace": (lambda: model(in_a_namespace), r"changes Own\.state\.step in every call"),
    "list": (lambda: model(in_a_list), r"two calls with the same weights, inputs and random numbers differ: loss.*"
             r"state in Python \(own_autograd\.CALLS at .*autograd\.py:\d+\)"),
    "list of its own": (lambda: model(appended), r"state in Python \(Own\.told at .*autograd\.py:\d+\)"),
    "tensor of its own": (lambda: model(remembers), r"state in Python \(Own\.last at .*autograd\.py:\d+\)"),
    "clock": (lambda: model(lambda self, x: x * (time.perf_counter_ns() % 997)), "two calls with the same weights"),
    "frozen on the way": (lambda: model(frozen_on_the_way),
                          r"at .*autograd\.py:\d+, switches requires_grad of a parameter"),
    "hook on a view that changes": (lambda: model(hooked_view),
                                    r"hook \(.*autograd\.py:\d+\) is on a view of a tensor"),
    "a function's own count": (lambda: model(lambda self, x: Counts.apply(x)), r"changes Counts\.calls in every call"),
    "backward that decides": (lambda: model(lambda self, x: Decides.apply(x)),
                              r"at .*autograd\.py:\d+ `return grad \* 0\.5 if .*torch\.where instead of if"),
    "hook on several tensors": (lambda: model(lambda self, x: (torch.autograd.graph.register_multi_grad_hook(
        [x], lambda grads: None), x)[1]), r"gradient hook at .*own_autograd\.py:\d+ cannot be traced"),
    "inference mode": (lambda: model(inferred), r"at .*autograd\.py:\d+, switches to inference mode.*torch\.no_grad"),
    **{name: (lambda draw=draw: model(lambda self, x: x * draw()),  # type: ignore[misc]
              r"at .*autograd\.py:\d+, draws from the system's random numbers")
       for name, draw in (("os.urandom", lambda: 1 + os.urandom(1)[0]), ("secrets", lambda: secrets.randbelow(9)),
                          ("uuid", lambda: uuid.uuid4().int % 7),
                          ("the system's generator", lambda: random.SystemRandom().random()))},
    "autocast": (lambda: model(in_half), r"at .*autograd\.py:\d+, computes under autocast"),
    "autocast by a decorator": (Decorated, r"model Decorated: its forward, at .*autograd\.py:\d+, computes"),
    "a branch on data": (lambda: model(lambda self, x: self.second(x) if (x > 0).any() else x),
                         r"model Own cannot be exported: stopped at .*autograd\.py:\d+ `.*torch\.where instead of if"),
    "assigned data": (lambda: model(assigned_data), r"model Own: .*at .*autograd\.py:\d+, assigns to \.data"),
    "another shape for a buffer": (lambda: model(resized), r"assigns shape \[4\].* to buffer mask of shape \[8\]"),
    "packed sequences": (lambda: model(packed_sequences, nn.GRU(8, 8, batch_first=True)),
                         r"at .*autograd\.py:\d+, packs sequences.*padded"),
    "a number of data": (lambda: model(lambda self, x: x / x.detach().abs().max().item()),
                         r"autograd\.py:\d+ .*x\.detach\(\) in place of x\.item\(\)"),
    "numbers of data": (lambda: model(lambda self, x: x * sum(x.detach().mean(0).tolist())), r"x\.detach\(\) in place"),
    "vmap": (lambda: model(lambda self, x: torch.vmap(lambda row: row * 2)(x)), r"model Own: .*vmap.*extra dimension"),
    "a seed in the forward": (lambda: model(seeded(torch.rand_like)),
                              r"at .*autograd\.py:\d+, sets the state of torch's random generator and draws"),
    "a seed before attention": (lambda: model(seeded(lambda x: nn.functional.scaled_dot_product_attention(
        x[None], x[None], x[None], dropout_p=0.1)[0])), r"autograd\.py:\d+, sets the state of torch's random"),
    "random numbers drawn twice": (lambda: model(drawn_twice), r"autograd\.py:\d+, sets the state of torch's random"),
    "a fork of the generator": (lambda: model(forked), r"autograd\.py:\d+, sets the state of torch's random generator"),
    "a generator of torch's": (lambda: model(lambda self, x: x + torch.rand(1, generator=torch.Generator())),
                               r"at .*autograd\.py:\d+, draws from a torch\.Generator"),
}
