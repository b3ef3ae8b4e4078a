"""A causal language model of transformers with all its weights in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mipipe.graphs.errors import InputError
from mipipe.graphs.models.configuration import know_converted
from mipipe.runtime.calibration.quiet import quiet_transformers

EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Keys of configs that say how many experts a layer has."""


def load_model(folder: Path, experts_per_token: int | None = None) -> Any:
    """A causal language model in float32; ``experts_per_token`` in place of its config's.

    Raises:
        InputError: transformers cannot load it, it has no experts, or fewer.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    know_converted(folder)
    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise _not_loaded(folder, error) from None
    if experts_per_token is not None:
        text = config.get_text_config()
        most = next((value for name in EXPERT_COUNTS if isinstance(value := getattr(text, name, None), int)), 0)
        most = (getattr(text, "mipipe_moe", None) or {}).get("num_experts", most)
        if not hasattr(text, "num_experts_per_tok") or not 1 <= experts_per_token <= most:
            raise InputError(f"{folder}: --experts-per-token {experts_per_token}: expected at most {most}, the experts"
                             " it has" if most else f"{folder}: --experts-per-token: it has no experts")
        text.num_experts_per_tok = experts_per_token
    try:
        with quiet_transformers():
            return AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32,
                                                        local_files_only=True, trust_remote_code=False).eval()
    except Exception as error:
        raise _not_loaded(folder, error) from None


def _not_loaded(folder: Path, error: Exception) -> InputError:
    return InputError(f"{folder}: cannot be run: transformers loads no causal language model from it"
                      f" ({(str(error).splitlines() or ['?'])[0]})")
