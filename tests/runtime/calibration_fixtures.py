"""Small models of transformers on disk with samples, for tests of calibrated merges."""

from __future__ import annotations

import json

import torch
import transformers

LENGTH, VOCABULARY = 12, 64
SMALL = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SMALL),
    "qwen2": lambda: transformers.Qwen2Config(**SMALL, tie_word_embeddings=True),
    "gemma3": lambda: transformers.Gemma3TextConfig(**SMALL, head_dim=8, sliding_window=4,
                                                    layer_types=["sliding_attention", "full_attention"]),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=4, n_positions=32),
    "mixtral": lambda: transformers.MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(**SMALL, moe_intermediate_size=8, num_experts=4, head_dim=4,
                                                     num_experts_per_tok=2, decoder_sparse_step=1),
}


def make(kind, seed, spread=0.3):
    """A model of a family with random weights in float64's precision."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[kind]()).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(spread * torch.randn(value.shape))
    return model


def family(root, kind, count=2):
    """A base and experts near it, saved under ``root``; returns them by name."""
    base = make(kind, 0)
    models = {"base": base}
    for number in range(1, count + 1):
        expert = make(kind, 0)
        torch.manual_seed(number)
        with torch.no_grad():
            for value in expert.parameters():
                value.add_(0.05 * torch.randn(value.shape))
        models[f"expert{number}"] = expert
    for name, model in models.items():
        model.save_pretrained(root / name)
    return models


def write_samples(path, seed, count=6, lengths=(LENGTH,)):
    """A JSONL file of random token ids; returns them."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(VOCABULARY, (lengths[number % len(lengths)],), generator=generator).tolist()
            for number in range(count)]
    path.write_text("".join(json.dumps({"tokens": row}) + "\n" for row in rows))
    return rows


def recipe(root, method, data=("a.jsonl", "b.jsonl"), parameters=None, base=True, **rule):
    """A recipe over the family's experts, each on data of its own."""
    found = {"merge_method": method, "dtype": "float64", "parameters": parameters or {},
             "models": [{"model": str(root / f"expert{number}"), "calibration": str(root / name)}
                        for number, name in enumerate(data, 1)],
             "calibration": {"data": str(root / data[0]), "samples": 6, "length": LENGTH, "batch": 4, **rule}}
    if base:
        found["base_model"] = str(root / "base")
    return found
