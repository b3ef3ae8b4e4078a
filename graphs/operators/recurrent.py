"""Recurrent layers (LSTM, GRU, RNN with tanh or relu) in the form that F, I and W need.

ATen's own layers become one opaque kernel on the CPU, whose workspace and layout differ from what fake tensors say, and
whose backward makes all gradients at once. Here the input projection is an ordinary product, the recurrence is one
operator, ``mipipe::recurrence``, and its backward gives the gradients of the gates before their nonlinearity; what
makes weight gradients of these are ordinary products again, which W may delay.

Formulas as in the documentation of ``torch.nn.LSTM``, ``GRU`` and ``RNN``; gates in torch's order (i, f, g, o and r, z,
n). Left out: packed sequences. Legend: S steps, B batch, H hidden size, G gates of the cell, A kept activations of the
cell, L layers, D directions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

GATES = {"lstm": 4, "gru": 3, "tanh": 1, "relu": 1}
KEPT = {"lstm": 4, "gru": 4, "tanh": 0, "relu": 0}
"""How many activations of size H a step keeps beside its output (and its cell state, for an LSTM)."""


def recurrence(kind: str, gates: Tensor, weight: Tensor, bias: Tensor | None, start: Tensor,
               cell: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """All steps of one layer in one direction.

    Args:
        kind: a key of `GATES`.
        gates: the inputs' part of all gates [S,B,G*H].
        weight, bias: the hidden state's part, [G*H,H] and [G*H].
        start, cell: hidden state and (LSTM) cell state before the first step [B,H].

    Returns:
        Hidden states [S,B,H], cell states [S,B,H] (empty but for an LSTM), kept activations [S,B,A*H].
    """
    steps, batch, hidden = gates.shape[0], gates.shape[1], weight.shape[1]
    out = gates.new_empty(steps, batch, hidden)
    cells = gates.new_empty(steps if kind == "lstm" else 0, batch, hidden)
    kept = gates.new_empty(steps, batch, KEPT[kind] * hidden)
    state = start
    for step in range(steps):
        inner = functional.linear(state, weight, bias)
        if kind == "lstm":
            i, f, g, o = (gates[step] + inner).chunk(4, dim=-1)
            i, f, g, o = torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)
            assert cell is not None
            cell = f * cell + i * g
            state = o * torch.tanh(cell)
            cells[step] = cell
            kept[step] = torch.cat([i, f, g, o], dim=-1)
        elif kind == "gru":
            (xr, xz, xn), (hr, hz, hn) = gates[step].chunk(3, dim=-1), inner.chunk(3, dim=-1)
            r, z = torch.sigmoid(xr + hr), torch.sigmoid(xz + hz)
            n = torch.tanh(xn + r * hn)
            state = n + z * (state - n)
            kept[step] = torch.cat([r, z, n, hn], dim=-1)
        else:
            state = torch.tanh(gates[step] + inner) if kind == "tanh" else torch.relu(gates[step] + inner)
        out[step] = state
    return out, cells, kept


def recurrence_backward(kind: str, grad: Tensor, grad_cells: Tensor, weight: Tensor, start: Tensor, cell: Tensor | None,
                        out: Tensor, cells: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Backpropagation through the steps of `recurrence`, last to first.

    Args:
        grad, grad_cells: gradients of the hidden states [S,B,H] and of the cell states (empty but for an LSTM).
        out, cells, kept: what `recurrence` returned.

    Returns:
        Gradients of ``gates`` [S,B,G*H], of the hidden state's part of the gates [S,B,G*H] (empty where they are the
        same: all but GRU), of ``start`` [B,H] and of ``cell`` (empty but for an LSTM).
    """
    steps = grad.shape[0]
    outer, inner = [grad] * steps, [grad] * (steps if kind == "gru" else 0)
    carried = torch.zeros_like(start)
    carried_cell = torch.zeros_like(start)
    for step in reversed(range(steps)):
        total = grad[step] + carried
        before = out[step - 1] if step else start
        if kind == "lstm":
            i, f, g, o = kept[step].chunk(4, dim=-1)
            assert cell is not None
            bent, earlier = torch.tanh(cells[step]), cells[step - 1] if step else cell
            inside = carried_cell + grad_cells[step] + total * o * (1 - bent * bent)
            outer[step] = torch.cat([inside * g * i * (1 - i), inside * earlier * f * (1 - f),
                                     inside * i * (1 - g * g), total * bent * o * (1 - o)], dim=-1)
            carried, carried_cell = outer[step] @ weight, inside * f
        elif kind == "gru":
            r, z, n, hn = kept[step].chunk(4, dim=-1)
            dz, dn = total * (before - n) * z * (1 - z), total * (1 - z) * (1 - n * n)
            dr = dn * hn * r * (1 - r)
            outer[step], inner[step] = torch.cat([dr, dz, dn], dim=-1), torch.cat([dr, dz, dn * r], dim=-1)
            carried = total * z + inner[step] @ weight
        else:
            outer[step] = total * (1 - out[step] * out[step]) if kind == "tanh" else total * (out[step] > 0)
            carried = outer[step] @ weight
    empty = grad.new_empty(0)
    return (torch.stack(outer), torch.stack(inner) if inner else empty, carried,
            carried_cell if kind == "lstm" else grad.new_empty(0))


def recurrence_flops(kind: str, gates: Tensor, weight: Tensor, *rest: object) -> int:
    """One product of hidden states and their weights for each step: 2 S B G H H."""
    return 2 * gates.shape[0] * gates.shape[1] * weight.shape[0] * weight.shape[1]


def recurrence_backward_flops(kind: str, grad: Tensor, grad_cells: Tensor, weight: Tensor, *rest: object) -> int:
    """The same, transposed: 2 S B G H H."""
    return 2 * grad.shape[0] * grad.shape[1] * weight.shape[0] * weight.shape[1]


def _define() -> None:
    """Register the operators with fake implementations and the autograd formula."""
    made = torch.library.custom_op("mipipe::recurrence", recurrence, mutates_args=())
    back = torch.library.custom_op("mipipe::recurrence_backward", recurrence_backward, mutates_args=())

    @made.register_fake
    def _(kind, gates, weight, bias, start, cell):  # type: ignore[no-untyped-def]
        steps, batch, hidden = gates.shape[0], gates.shape[1], weight.shape[1]
        return (gates.new_empty(steps, batch, hidden), gates.new_empty(steps if kind == "lstm" else 0, batch, hidden),
                gates.new_empty(steps, batch, KEPT[kind] * hidden))

    @back.register_fake
    def _(kind, grad, grad_cells, weight, start, cell, out, cells, kept):  # type: ignore[no-untyped-def]
        size = (*grad.shape[:2], weight.shape[0])
        return (grad.new_empty(size), grad.new_empty(size if kind == "gru" else 0), start.new_empty(start.shape),
                start.new_empty(start.shape if kind == "lstm" else 0))

    made.register_autograd(_gradients, setup_context=_keep)


def _keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.kind, _, weight, bias, start, cell = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(weight, start, cell, *output)


def _gradients(ctx, grad, grad_cells, _):  # type: ignore[no-untyped-def]
    weight, start, cell, out, cells, kept = ctx.saved_tensors
    outer, inner, first, first_cell = torch.ops.mipipe.recurrence_backward(
        ctx.kind, grad, grad_cells, weight, start, cell, out, cells, kept)
    inner = (inner if ctx.kind == "gru" else outer).flatten(0, 1)
    before = torch.cat([start.unsqueeze(0), out[:-1]]).flatten(0, 1)
    asked = ctx.needs_input_grad
    return (None, outer, inner.t() @ before if asked[2] else None, inner.sum(0) if ctx.has_bias and asked[3] else None,
            first, first_cell if cell is not None else None)


_define()

DIRECT: dict[str, Callable[..., object]] = {"mipipe.recurrence.default": recurrence,
                                            "mipipe.recurrence_backward.default": recurrence_backward}
"""What a built phase calls for each operator, without the dispatcher's detour."""

Weights = Sequence[Tensor]


def lstm(x: Tensor, start: Sequence[Tensor], weights: Weights, has_biases: bool, num_layers: int, dropout: float,
         train: bool, bidirectional: bool, batch_first: bool) -> tuple[Tensor, Tensor, Tensor]:
    """``aten.lstm.input``: x [S,B,I] (or [B,S,I]), start and cell [L*D,B,H], weights of each layer and direction."""
    return _layers("lstm", x, start[0], start[1], weights, has_biases, num_layers, dropout if train else 0.0,
                   bidirectional, batch_first)


def gru(x: Tensor, start: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    """``aten.gru.input``; arguments as of `lstm`."""
    return _without_cell("gru", x, start, *options)


def rnn_tanh(x: Tensor, start: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    """``aten.rnn_tanh.input``; arguments as of `lstm`."""
    return _without_cell("tanh", x, start, *options)


def rnn_relu(x: Tensor, start: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    """``aten.rnn_relu.input``; arguments as of `lstm`."""
    return _without_cell("relu", x, start, *options)


def _without_cell(kind: str, x: Tensor, start: Tensor, weights: Weights, has_biases: bool, num_layers: int,
                  dropout: float, train: bool, bidirectional: bool, batch_first: bool) -> tuple[Tensor, Tensor]:
    return _layers(kind, x, start, None, weights, has_biases, num_layers, dropout if train else 0.0, bidirectional,
                   batch_first)[:2]


def _layers(kind: str, x: Tensor, start: Tensor, cell: Tensor | None, weights: Weights, has_biases: bool,
            num_layers: int, dropout: float, bidirectional: bool, batch_first: bool) -> tuple[Tensor, Tensor, Tensor]:
    """All layers and directions: outputs, last hidden states [L*D,B,H], last cell states (LSTM; else empty)."""
    directions = 2 if bidirectional else 1
    size = len(weights) // (num_layers * directions)
    projected = kind == "lstm" and size > (4 if has_biases else 2)
    x = x.transpose(0, 1) if batch_first else x
    lasts, cells = [], []
    for layer in range(num_layers):
        outs = []
        for turned in range(directions):
            place = layer * directions + turned
            own = list(weights[place * size:(place + 1) * size])
            given = x.flip(0) if turned else x
            first = None if cell is None else cell[place]
            out, last, last_cell = (_projected(given, start[place], first, own, has_biases) if projected
                                    else _layer(kind, given, start[place], first, own, has_biases))
            outs.append(out.flip(0) if turned else out)
            lasts.append(last)
            cells.append(last_cell)
        x = torch.cat(outs, dim=-1) if bidirectional else outs[0]
        if dropout and layer + 1 < num_layers:
            x = functional.dropout(x, dropout, True)
    out = x.transpose(0, 1) if batch_first else x
    return out, torch.stack(lasts), torch.stack(cells) if kind == "lstm" else x.new_empty(0)


def _layer(kind: str, x: Tensor, start: Tensor, cell: Tensor | None, weights: Weights,
           has_biases: bool) -> tuple[Tensor, Tensor, Tensor]:
    """One layer in one direction: outputs [S,B,H], the last of them, the last cell state."""
    gates = functional.linear(x, weights[0], weights[2] if has_biases else None)
    bias = weights[3] if has_biases else None
    out, cells, _ = torch.ops.mipipe.recurrence(kind, gates, weights[1], bias, start, cell)
    return out, out[-1], cells[-1] if kind == "lstm" else out[-1]


def _projected(x: Tensor, start: Tensor, cell: Tensor | None, weights: Weights,
               has_biases: bool) -> tuple[Tensor, Tensor, Tensor]:
    """One layer of an LSTM whose output is a projection of its hidden state (``proj_size``), in plain operators."""
    gates = functional.linear(x, weights[0], weights[2] if has_biases else None)
    assert cell is not None
    outs, state = [], start
    for step in range(x.shape[0]):
        inner = gates[step] + functional.linear(state, weights[1], weights[3] if has_biases else None)
        i, f, g, o = inner.chunk(4, dim=-1)
        cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
        state = functional.linear(torch.sigmoid(o) * torch.tanh(cell), weights[-1])
        outs.append(state)
    return torch.stack(outs), state, cell


LAYERS: dict[str, Callable[..., object]] = {
    "aten.lstm.input": lstm, "aten.gru.input": gru, "aten.rnn_tanh.input": rnn_tanh, "aten.rnn_relu.input": rnn_relu}
"""What stands for each of ATen's layers in an exported graph."""
