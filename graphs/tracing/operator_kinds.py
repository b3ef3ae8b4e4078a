"""From an operator's kind in a file to the operator: registered overloads of known namespaces, and nothing else.

A graph is data from anywhere, and its kinds become calls. So a kind is looked up in torch's dispatcher, never by
walking over attributes: ``torch.ops`` also has ``import_module`` and ``load_library``.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable
from typing import Any

import torch

from mipipe.graphs.errors import GraphError, shown
from mipipe.graphs.trace_rules import GETITEM, is_kind

_NAMESPACES = {"aten", "prims", "mipipe"}
_TOUCHES_FILES = frozenset({"filename"})
"""Arguments of the few ATen operators that open a file (``aten.from_file``)."""


def allow_namespace(name: str) -> None:
    """Let graphs call the operators that a package of yours registers: ``allow_namespace("my_kernels")``.

    Call it beside their ``torch.library`` definitions, in the module that ``mipipe train --model module:factory``
    names; a file can never call it.
    """
    if not name.isidentifier():
        raise GraphError(f"operators: found the namespace {shown(name)}, expected an identifier")
    _NAMESPACES.add(name)


def resolve_operator(kind: str) -> Callable[..., Any]:
    """The callable of an operator kind: ``aten.add.Tensor`` -> torch.ops.aten.add.Tensor.

    Raises:
        GraphError: no such form, a namespace that is not allowed, or this torch has no such operator.
    """
    if kind == GETITEM:
        return operator.getitem
    if not is_kind(kind) or kind.count(".") != 2:
        raise GraphError(f"operator {shown(kind)}: expected namespace.name.overload, such as aten.add.Tensor")
    namespace, name, overload = kind.split(".")
    if namespace not in _NAMESPACES:
        raise GraphError(f"operator {shown(kind, quoted=False)}: its namespace is none of"
                         f" {', '.join(sorted(_NAMESPACES))}, so a file may not call it; if it is your own, call"
                         f" mipipe.graphs.tracing.operator_kinds.allow_namespace({namespace!r}) where you register it")
    qualified = f"{namespace}::{name}" + ("" if overload == "default" else f".{overload}")
    found = None
    with contextlib.suppress(RuntimeError, AttributeError):  # not a legal name, or an overload of TorchScript alone
        if torch._C._dispatch_has_kernel(qualified):
            found = getattr(getattr(getattr(torch.ops, namespace), name), overload)
    if not isinstance(found, torch._ops.OpOverload):
        raise GraphError(f"operator {shown(kind, quoted=False)}: torch {torch.__version__} does not have it; capture"
                         " the model again with the installed torch, or import the package that registers it")
    schema = found._schema
    if not schema.returns or any(item.name in _TOUCHES_FILES for item in schema.arguments):
        raise GraphError(f"operator {shown(kind, quoted=False)}: is no function of tensors, so a graph may not call it")
    return found
