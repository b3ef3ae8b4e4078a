"""The parameters and buffers of one rank: only those its stages name, each tied tensor once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn

from mipipe.graphs.errors import GraphError
from mipipe.graphs.operator_graph import OperatorGraph
from mipipe.graphs.operators.collectives import part_of
from mipipe.graphs.sharding.team_graph import Division
from mipipe.graphs.tracing.parameter_slices import parse_slice
from mipipe.runtime.weights.host_weights import HostWeights
from mipipe.runtime.weights.pieces import Piece
from mipipe.runtime.weights.stored_weights import StoredWeights

WeightSource = Mapping[str, torch.Tensor] | nn.Module | Callable[[], nn.Module] | HostWeights
"""Where weights come from: a state dict, a module, a function that makes the module, or one process of the host."""


@dataclass(frozen=True, slots=True)
class OwnPart:
    """What device ``place`` of those that hold the same of a parameter updates of it, as they divide it; ``summed``:
    its gradients are summed whole over microbatches."""

    division: Division
    place: int
    summed: bool = True

    def whole_shape(self, part: Sequence[int]) -> tuple[int, ...]:
        """The shape of a parameter by that of a part."""
        return tuple(length * self.division.size if dim == self.division.dim else length
                     for dim, length in enumerate(part))

    def of(self, whole: torch.Tensor) -> torch.Tensor:
        """The part of a whole tensor, a view."""
        return part_of(whole, self.place, self.division.size, self.division.dim, 1)


@dataclass(frozen=True, slots=True)
class Weights:
    """Local parameters and buffers by canonical FQN (the first name of a tied tensor), and the name of every FQN.

    ``compute`` holds what the phase functions read: the parameter itself, its copy in the trace's dtype where the
    master weights have another (mixed precision), or the whole of which the parameter is this device's part. ``homes``
    make the memory of gradients that have a place of their own; others lie where the operator that made them put them.
    ``parts`` says which parameters are parts, ``own`` is that part in ``compute``, and ``sums`` where their whole
    gradients are summed (parameters without memory but for ``.grad``); those that the trace scatters have none.
    """

    parameters: dict[str, nn.Parameter]
    buffers: dict[str, torch.Tensor]
    compute: dict[str, torch.Tensor]
    canonical: dict[str, str]
    homes: dict[nn.Parameter, Callable[[], torch.Tensor]] = field(default_factory=dict)
    own: dict[str, torch.Tensor] = field(default_factory=dict)
    sums: dict[str, nn.Parameter] = field(default_factory=dict)
    parts: Mapping[str, OwnPart] = field(default_factory=dict)

    def tensor(self, fqn: str) -> torch.Tensor:
        """The tensor the phase functions read for an FQN."""
        name = self.canonical[fqn]
        return self.compute[name] if name in self.compute else self.buffers[name]

    def summed(self, name: str) -> nn.Parameter:
        """To whose ``.grad`` W adds the gradients of a parameter."""
        return self.sums.get(name, self.parameters[name])

    def state(self, fqn: str) -> torch.Tensor:
        """The tensor that F itself changes, for an FQN.

        Raises:
            GraphError: its master weights have another dtype, and would overwrite the change.
        """
        name = self.canonical[fqn]
        if name in self.parameters and self.compute[name] is not self.parameters[name]:
            raise GraphError(f"parameter {name} is changed in place by the model's forward, which does not go with"
                             " master weights of another dtype; leave 'dtype' out of the train config")
        return self.tensor(fqn).detach()

    def fit(self, name: str) -> None:
        """Make what is beside a parameter follow its shape and values, after its rows have changed: a bank's experts.
        Of one that is a part the whole has no values before it is gathered."""
        parameter, compute = self.parameters[name], self.compute[name]
        part = self.parts.get(name)
        if part is not None:
            shape = part.whole_shape(parameter.shape)
            compute.data = compute.new_empty(shape)
            self.own[name] = part.of(compute)
            if name in self.sums:
                self.sums[name].data = _without_memory(shape, parameter)
        elif compute is not parameter:
            compute.data = parameter.detach().to(compute.dtype)

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy master weights into their compute copies, parts into the whole's part."""
        for name, tensor in self.compute.items():
            target, source = self.own.get(name, tensor), self.parameters[name]
            if target.data_ptr() != source.data_ptr():
                target.copy_(source)


def load_weights(graph: OperatorGraph, names: Iterable[str], source: WeightSource, device: torch.device,
                 master_dtype: torch.dtype | None = None,
                 rows: Mapping[str, Sequence[int]] | None = None,
                 pieces: Mapping[str, Piece] | None = None,
                 parts: Mapping[str, OwnPart] | None = None) -> Weights:
    """Weights of the given FQNs, copied from ``source`` to ``device``.

    ``rows``: of these parameters only some rows, in this order (the experts a rank holds). ``pieces``: of these only
    the piece that a member of a team holds; of stored weights nothing else is read. ``parts``: what this device updates
    of parameters, while what runs reads them whole.

    Raises:
        GraphError: a name is missing in the source, its shape differs, or it has no values (meta device).
    """
    wanted = set(names)
    canonical = {item.fqn: item.tied_to or item.fqn for item in graph.parameters}
    needed = {canonical[name] for name in wanted}
    find = partial(_find_any, dict(pieces or {}))
    state = source.hand_out([item.fqn for item in graph.parameters if item.fqn in needed], find) \
        if isinstance(source, HostWeights) else _state(source)
    parameters: dict[str, nn.Parameter] = {}
    buffers: dict[str, torch.Tensor] = {}
    compute: dict[str, torch.Tensor] = {}
    own: dict[str, torch.Tensor] = {}
    sums: dict[str, nn.Parameter] = {}
    for item in graph.parameters:
        if item.fqn not in needed:
            continue
        found = find(state, item.fqn)
        if found is None:
            raise GraphError(f"weights: {item.fqn!r} is in the operator graph but not in the model given; the graph was"
                             " captured from another model")
        if tuple(found.shape) != item.spec.shape:
            raise GraphError(f"weights: {item.fqn} has shape {tuple(found.shape)}, expected {item.spec.shape}; the"
                             " graph was captured from another model")
        if found.is_meta:
            raise GraphError(f"weights: {item.fqn} is on the meta device and has no values; load a checkpoint or build"
                             " the model on a real device")
        if rows is not None and item.fqn in rows:
            found = found[torch.tensor(rows[item.fqn], device=found.device)]
        dtype = getattr(torch, item.spec.dtype)
        if item.buffer:
            buffers[item.fqn] = found.detach().to(device, dtype, copy=True).contiguous()
            continue
        trainable = item.trainable and (dtype.is_floating_point or dtype.is_complex)
        kept = master_dtype if master_dtype is not None and trainable and not dtype.is_complex else dtype
        if parts is not None and item.fqn in parts:
            part = parts[item.fqn]
            shape = part.whole_shape(found.shape)
            compute[item.fqn] = torch.empty(shape, dtype=dtype, device=device)
            own[item.fqn] = part.of(compute[item.fqn]).copy_(found.detach())
            alike = kept is dtype and own[item.fqn].is_contiguous()
            parameters[item.fqn] = nn.Parameter(
                own[item.fqn] if alike else found.detach().to(device, kept, copy=True).contiguous())
            if part.summed:
                sums[item.fqn] = nn.Parameter(_without_memory(shape, parameters[item.fqn]))
            continue
        parameter = nn.Parameter(found.detach().to(device, kept, copy=True).contiguous(), requires_grad=trainable)
        parameters[item.fqn] = parameter
        compute[item.fqn] = parameter if kept is dtype else parameter.detach().to(dtype)
    return Weights(parameters, buffers, compute, canonical, own=own, sums=sums, parts=dict(parts or {}))


def _without_memory(shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """A tensor of this shape that holds one element."""
    return torch.empty((), dtype=like.dtype, device=like.device).expand(shape)


def _find_any(pieces: Mapping[str, Piece], state: Mapping[str, torch.Tensor], fqn: str) -> torch.Tensor | None:
    """What is wanted of a name: a piece of its tensor where one is named, else all of it."""
    piece = pieces.get(fqn)
    return _find(state, fqn) if piece is None else _find_piece(state, fqn, piece)


def _find(state: Mapping[str, torch.Tensor], fqn: str) -> torch.Tensor | None:
    """A tensor by name; a slice of an expert bank is cut from the bank where the source has no slices."""
    base, rows = parse_slice(fqn)
    found = state.get(fqn)
    if found is None and rows is not None and base in state:
        found = state[base][rows[0]:rows[1]]
    return found


def _find_piece(state: Mapping[str, torch.Tensor], fqn: str, piece: Piece) -> torch.Tensor | None:
    """A piece of a tensor by name; the whole one where it does not have the piece's shape, to be refused."""
    if isinstance(state, StoredWeights):
        return state.piece(fqn, piece)
    found = _find(state, fqn)
    return found if found is None or tuple(found.shape) != piece.shape else piece.cut(found)


def _state(source: Mapping[str, torch.Tensor] | nn.Module | Callable[[], nn.Module]) -> Mapping[str, torch.Tensor]:
    if isinstance(source, Mapping):
        return source
    module = source if isinstance(source, nn.Module) else source()
    state: dict[str, torch.Tensor] = dict(module.named_parameters(remove_duplicate=False))
    state.update(module.named_buffers(remove_duplicate=False))
    return state
