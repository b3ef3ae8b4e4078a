"""A causal language model of transformers from its config alone: no weights, but the buffers that are computed."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mipipe.graphs.errors import InputError
from mipipe.graphs.models.configuration import know_converted
from mipipe.runtime.calibration.quiet import quiet_transformers


def empty_decoder(label: str, folder: str, dtype: torch.dtype) -> Any:
    """The config's causal language model without weights; buffers that are computed are there."""
    from transformers import AutoConfig, AutoModelForCausalLM

    know_converted(folder)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        config.dtype = dtype
        with quiet_transformers(), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(  # experts: kernels that take any dtype and sum in one order
                config, attn_implementation="sdpa", experts_implementation="eager", trust_remote_code=False).eval()
        _compute_buffers(model)
    except Exception as error:
        raise InputError(f"{label}: cannot be run for calibration: transformers makes no causal language model of it"
                         f" ({(str(error).splitlines() or [type(error).__name__])[0]})") from None
    return model.to(dtype) if dtype is torch.float64 else model


def _compute_buffers(model: Any) -> None:
    """Give buffers that are no weights (rotary frequencies, scales) their values, as transformers does on loading."""
    saved = set(model.state_dict())
    for path, module in model.named_modules():
        names = [name for name, value in module.named_buffers(recurse=False)
                 if value.is_meta and f"{path}.{name}".lstrip(".") not in saved]
        for name in names:
            value = module._buffers[name]
            module._buffers[name] = torch.zeros(value.shape, dtype=value.dtype)
        if names:
            if "RotaryEmbedding" in type(module).__name__ and hasattr(module, "config"):
                fresh = type(module)(config=module.config)
                for name, value in fresh.named_buffers(recurse=False):
                    module._buffers[name] = value
            else:
                model._init_weights(module)


def decoder_stack(model: Any, label: str) -> tuple[nn.ModuleList, Any, str]:
    """The stack of decoder layers, the module that runs it, and the stack's name."""
    number = getattr(model.config.get_text_config(), "num_hidden_layers", 0)
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == number and number:
            return module, model.get_submodule(path.rpartition(".")[0]), path
    raise InputError(f"{label}: cannot be run for calibration: {type(model).__name__} has no stack of {number} layers")
