"""What an export would not see of a model's forward, in a form that it sees, or refused with the model's line."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mipipe.graphs.capture.outside_caches import caches_kept
from mipipe.graphs.capture.user_calls import calling_line
from mipipe.graphs.errors import GraphError
from mipipe.graphs.operators.ctc import ctc_loss_call


class seen_mode(torch.overrides.TorchFunctionMode):
    """Inside, what the exporter would not see has a form that it sees, or is refused with its line.

    ``x.data`` is ``x.detach()``, which is the same to read and to change. A tensor made of Python numbers on the meta
    device, where they would be lost, is made on the CPU and moved. ctc_loss is mipipe's, of fixed shapes.
    """

    def __init__(self, name: str = "") -> None:
        super().__init__()
        self.name = name

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == Tensor.data.__get__:  # type: ignore[attr-defined]
            return args[0].detach()
        if func == Tensor.data.__set__:  # type: ignore[attr-defined]
            self._refuse("assigns to .data of a tensor, which an operator graph cannot say; change it in place"
                         " (x.data.copy_(y)), or compute a new tensor")
        if func in _ASKS_GRADIENT and isinstance(args[0], nn.Parameter):
            asked = args[1] if len(args) > 1 else kwargs.get("requires_grad", True)
            if bool(asked) != args[0].requires_grad:
                self._refuse("switches requires_grad of a parameter, and a graph trains a parameter or not; set it"
                             " outside the forward, or use the parameter under detach()")
        if isinstance(kwargs.get("generator"), torch.Generator):
            self._refuse("draws from a torch.Generator of its own, and a run keys random numbers by its seed, step,"
                         " microbatch and operator; draw without generator=")
        if func is torch._VF._pack_padded_sequence or func is torch._pack_padded_sequence:
            self._refuse("packs sequences, whose sizes depend on data; give the recurrent layer the padded sequences"
                         " and pick each sequence's last step by its length (gather), or mask what is behind it")
        if func is torch.nn.functional.ctc_loss:
            return ctc_loss_call(*args, **kwargs)
        if func in (torch.tensor, torch.as_tensor) and str(kwargs.get("device")) == "meta" and not isinstance(
                args[0], Tensor):
            return func(*args, **{**kwargs, "device": "cpu"}).to("meta")
        if func == Tensor.__getitem__ and str(args[0].device) == "meta":
            return func(args[0], _with_tensors(args[1]))
        return func(*args, **kwargs)

    def _refuse(self, text: str) -> None:
        raise GraphError(f"model {self.name}: its forward, at {calling_line()}, {text}")


_ASKS_GRADIENT = (Tensor.requires_grad_, Tensor.requires_grad.__set__)  # type: ignore[attr-defined]


def _with_tensors(index: Any) -> Any:
    """An index with tensors in place of lists of numbers, as `seen_mode` makes them."""
    if isinstance(index, tuple):
        return tuple(_with_tensors(item) for item in index)
    return torch.tensor(index).to("meta") if type(index) is list and index else index


PARTS = frozenset(nn.Module().__dict__)
"""What every module has: its tables of parameters, buffers, modules and hooks."""


@contextlib.contextmanager
def attributes_kept(module: nn.Module) -> Iterator[None]:
    """Afterwards, buffers and attributes that hold tensors are the objects that they were, in all parts of a module.

    Other attributes stay as the forward left them, such as transformers' note of hooks that it has installed.
    """
    kept = [(part, dict(part.__dict__), dict(part._buffers)) for part in module.modules()]
    try:
        yield
    finally:
        for part, items, buffers in kept:
            for name, value in list(part.__dict__.items()):
                if name in PARTS or value is items.get(name) or not any(
                        isinstance(leaf, Tensor) for leaf in tree_leaves(value)):
                    continue
                if name in items:
                    part.__dict__[name] = items[name]
                else:
                    del part.__dict__[name]
            part._buffers.clear()
            part._buffers.update(buffers)


@contextlib.contextmanager
def keep_assigned(module: nn.Module, name: str, prefix: str) -> Iterator[None]:
    """Inside, a forward that gives buffers new tensors (``self.average = ...``) changes the old ones in place.

    An export keeps what is assigned to buffers of the outermost module only.
    """
    before: dict[tuple[nn.Module, str], Tensor] = {}

    def remember(*args: Any) -> None:
        before.clear()
        before.update({(part, key): item for part in module.modules() for key, item in part._buffers.items()
                       if item is not None})

    def settle(*args: Any) -> None:
        paths = {part: path for path, part in module.named_modules()}
        for (part, key), old in before.items():
            new = part._buffers.get(key)
            if new is old:
                continue
            if new is None or (new.shape, new.dtype) != (old.shape, old.dtype):
                found = "nothing" if new is None else f"shape {list(new.shape)}, {new.dtype}"
                raise GraphError(f"model {name}: its forward assigns {found} to buffer"
                                 f" {f'{paths[part]}.{key}'.removeprefix(prefix)} of shape {list(old.shape)},"
                                 f" {old.dtype}, and a graph keeps shapes and dtypes; change it in place (copy_)")
            with torch.no_grad():
                old.copy_(new.detach())
            part._buffers[key] = old

    hooks = module.register_forward_pre_hook(remember), module.register_forward_hook(settle)
    try:
        with attributes_kept(module), caches_kept(module):
            yield
    finally:
        for hook in hooks:
            hook.remove()
