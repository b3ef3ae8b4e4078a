"""One decoder of transformers with the weights of one layer in memory at a time.

The model is built on the meta device from its config, by transformers' own classes: they know masks, positions, biases,
norms and routing of hundreds of architectures, and are what the merged model will be run with; captured traces of the
product know a training step of fixed shape, which would have to be traced and partitioned once for each model. Weights
are read as a merge reads them (adapters added, names mapped) and renamed as transformers renames them on loading.

Between layers there is one tensor, the residual stream; what else a layer takes (masks, positions) is recorded once per
shape from the model's own forward, in which every layer is replaced by one that only remembers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mipipe.graphs.errors import InputError
from mipipe.graphs.merging.checkpoints.files import CheckpointFiles, StoredTensor
from mipipe.runtime.calibration.empty_decoder import decoder_stack, empty_decoder
from mipipe.runtime.calibration.quiet import quiet_transformers
from mipipe.runtime.merge.output.verify import Loaded, loaded_tensors

Read = Callable[[str], Tensor]
"""A whole tensor by its name in the merge, in the compute dtype."""


class Decoder:
    """A causal language model, run layer by layer. ``layers`` is how many it has."""

    def __init__(self, label: str, folder: str, tensors: Mapping[str, StoredTensor], read: Read,
                 rows: Callable[[str, Tensor], Tensor], dtype: torch.dtype) -> None:
        """Build the model without weights.

        Args:
            label: what errors call it.
            folder: of its config.json.
            tensors: what the merge knows of the model, by name.
            read: reads a tensor.
            rows: reads rows ``[n]`` of a table.

        Raises:
            InputError: transformers makes no causal language model of it.
        """
        self.label, self._read, self._rows, self._dtype = label, read, rows, dtype
        self.model = empty_decoder(label, folder, dtype)
        files = CheckpointFiles(folder, {}, {name: dataclasses.replace(tensor, name=name)
                                             for name, tensor in tensors.items()}, "")
        self._loaded: dict[str, Loaded] = loaded_tensors(files, self.model)
        self._own = {name: tuple(value.shape) for name, value in self.model.state_dict(keep_vars=True).items()}
        stack, self._at, self._name = decoder_stack(self.model, label)
        self._stack: nn.ModuleList = stack
        self.layers = len(stack)
        self.embedding = self.model.get_input_embeddings()
        self._table = next(name for name, module in self.model.named_modules() if module is self.embedding) + ".weight"
        self._head = self.model.get_output_embeddings()
        head = next((name for name, module in self.model.named_modules() if module is self._head), None)
        self._head_name = "" if head is None else f"{head}.weight"
        self.tied = self._head is not None and (self._head.weight is self.embedding.weight
                                                or self._head_name not in self._loaded)
        self._recorded: dict[tuple[int, ...], list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}

    # Names and weights -----------------------------------------------------------------------------------------------

    @property
    def table(self) -> str | None:
        """The merge's name of the token table."""
        return self.stored(self._table)

    @property
    def head(self) -> str | None:
        """The merge's name of the head, where the model has one of its own."""
        return None if self.tied or not self._head_name else self.stored(self._head_name)

    def has_recorded(self, shape: tuple[int, int]) -> bool:
        """Whether what layers take beside states of a shape is known."""
        return shape in self._recorded

    def prefix(self, layer: int) -> str:
        """What the names of a layer's parameters begin with, in the model's own spelling."""
        return f"{self._name}.{layer}."

    def stored(self, own: str) -> str | None:
        """The merge's name of a parameter; None where it is put together from several."""
        made = self._loaded.get(own)
        if made is None:
            return self.stored(self._table) if own == self._head_name and own != self._table else None
        return None if made.joined else made.tensors[0].name

    def load_layer(self, layer: int, train: bool = False) -> nn.Module:
        """A layer with its weights."""
        self._load([name for name in self._own if name.startswith(self.prefix(layer))], train)
        return self._stack[layer]

    def drop_layer(self, layer: int) -> None:
        """Forget a layer's weights."""
        self._drop([name for name in self._own if name.startswith(self.prefix(layer))])

    def load_rest(self, head: bool, train: bool = False) -> list[str]:
        """Everything around the layers but the token table, which is read row by row; returns the names."""
        layers = f"{self._name}."
        names = [name for name in self._own if not name.startswith(layers) and name != self._table
                 and (head or not (self._head_name and name.startswith(self._head_name.rpartition(".")[0] + ".")))]
        if head and self.tied:
            names = [name for name in names if name != self._head_name]
            value = self._read(self.stored(self._table) or self._table)
            self._head._parameters["weight"] = nn.Parameter(value, requires_grad=False)
        self._load(names, train)
        return names

    def load_all(self) -> None:
        """The whole model."""
        for layer in range(self.layers):
            self.load_layer(layer)
        self.load_rest(head=True)
        self._load([self._table], False)

    def parts(self, own: str) -> tuple[str, ...]:
        """The merge's names of the tensors that a parameter is made of."""
        made = self._loaded.get(own)
        return () if made is None else tuple(tensor.name for tensor in made.tensors)

    def drop_rest(self) -> None:
        layers = f"{self._name}."
        self._drop([name for name in self._own if not name.startswith(layers)])

    def _load(self, names: Sequence[str], train: bool) -> None:
        joined: dict[str, Tensor] = {}
        for own in names:
            made = self._loaded.get(own)
            if made is None:
                split = any(other.split and own.endswith(ending) for other in self._loaded.values()
                            for ending in other.split)
                if not split:
                    raise InputError(f"{self.label}: cannot be run: it has no tensor for {own}")
                continue
            if made.joined or made.split:
                joined |= {tensor.name: self._read(tensor.name) for tensor in made.tensors}
            else:
                self._assign(own, self._read(made.tensors[0].name).reshape(self._own[own]), train)
        if joined:
            self._convert(joined)
            for own in names:
                parameter = self.model.get_parameter(own) if _is_parameter(self.model, own) else None
                if parameter is not None and not parameter.is_meta:
                    parameter.requires_grad_(train)

    def _assign(self, own: str, value: Tensor, train: bool) -> None:
        path, _, name = own.rpartition(".")
        module = self.model.get_submodule(path)
        if name in module._parameters:
            module._parameters[name] = nn.Parameter(value.contiguous(), requires_grad=train)
        else:
            module._buffers[name] = value

    def _convert(self, tensors: dict[str, Tensor]) -> None:
        """Stored tensors that the model has joined (experts in a bank), put together as transformers does."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        mapping: Any = get_model_conversion_mapping(self.model)
        with quiet_transformers():
            convert_and_load_state_dict_in_model(self.model, tensors, LoadStateDictConfig(dtype=self._dtype,
                                                                                          weight_mapping=mapping))

    def _drop(self, names: Sequence[str]) -> None:
        for own in names:
            path, _, name = own.rpartition(".")
            module = self.model.get_submodule(path)
            empty = torch.empty(self._own[own], dtype=self._dtype, device="meta")
            if name in module._parameters:
                module._parameters[name] = nn.Parameter(empty, requires_grad=False)

    # Running ---------------------------------------------------------------------------------------------------------

    def embed(self, ids: Tensor) -> Tensor:
        """The residual stream before the first layer, ``[batch, length, hidden]``; `load_rest` came before.

        Only the rows of the tokens that occur are read.
        """
        return self._through(ids, None, False)

    def normed(self, ids: Tensor, states: Tensor) -> Tensor:
        """What goes into the head, from the residual stream after the last layer; `load_rest` came before."""
        return self._through(ids, states, False)

    def logits(self, ids: Tensor, states: Tensor) -> Tensor:
        """Logits from the residual stream after the last layer; `load_rest` with the head came before."""
        return self._through(ids, states, True)

    def forward(self, layer: int, states: Tensor) -> Tensor:
        """A layer on the residual stream; `embed` came before, on the same shape."""
        arguments, named = self._recorded[tuple(states.shape[:2])][layer]
        found = self._stack[layer](states, *arguments, **named)
        return found[0] if isinstance(found, tuple) else found

    def _through(self, ids: Tensor, states: Tensor | None, head: bool) -> Tensor:
        """The model with layers that pass on ``states``, or what they are given and remember with what."""
        tokens, places = torch.unique(ids, return_inverse=True)
        self._assign(self._table, self._rows(self.stored(self._table) or self._table, tokens), False)
        for tuples in (False, True):  # as layers of this version of the model return their states
            seen: list[Tensor] = []
            remembered: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
            with _passing(self._stack, states, tuples, seen, remembered):
                try:
                    found = self._run(places, head)
                except (IndexError, RuntimeError, ValueError):
                    if tuples:
                        raise
                    continue
            if len({tuple(item.shape) for item in seen}) == 1:
                break
        if states is not None:
            return found
        self._recorded[tuple(ids.shape)] = [
            (arguments, {key: value for key, value in named.items() if not key.startswith("past_key_value")})
            for arguments, named in remembered]
        return seen[0]

    def _run(self, places: Tensor, head: bool) -> Tensor:
        if head:
            result: Tensor = self.model(input_ids=places, use_cache=False).logits
            return result
        last: Tensor = self._at(input_ids=places, use_cache=False).last_hidden_state
        return last


class _Pass(nn.Module):
    """In place of a layer: notes what it is given and passes it on, or ``states`` instead."""

    def __init__(self, layer: nn.Module, states: Tensor | None, tuples: bool, seen: list[Tensor],
                 remembered: list[tuple[tuple[Any, ...], dict[str, Any]]]) -> None:
        super().__init__()
        self.__dict__["noted"] = layer, states, tuples, seen, remembered

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["noted"][0], name)  # attributes that the model asks its layers for

    def forward(self, hidden: Tensor, *arguments: Any, **named: Any) -> Any:
        _, states, tuples, seen, remembered = self.__dict__["noted"]
        seen.append(hidden)
        remembered.append((arguments, named))
        out = hidden if states is None else states
        return (out,) if tuples else out


@contextmanager
def _passing(stack: nn.ModuleList, states: Tensor | None, tuples: bool, seen: list[Tensor],
             remembered: list[tuple[tuple[Any, ...], dict[str, Any]]]) -> Iterator[None]:
    """All layers of a stack replaced for a while."""
    whole = list(stack)
    for number, layer in enumerate(whole):
        stack[number] = _Pass(layer, states, tuples, seen, remembered)
    try:
        yield
    finally:
        for number, layer in enumerate(whole):
            stack[number] = layer


def _is_parameter(model: nn.Module, own: str) -> bool:
    path, _, name = own.rpartition(".")
    return name in model.get_submodule(path)._parameters
