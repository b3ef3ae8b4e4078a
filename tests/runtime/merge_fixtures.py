"""Small checkpoints on disk for the merge tests: a tiny transformer and its variants."""

from __future__ import annotations

import contextlib
import json
import threading
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from mipipe.graphs.merging.method_table.method_spec import Base
from mipipe.graphs.merging.method_table.methods import BY_NAME
from mipipe.runtime.merge.exchange import MergeRanks
from mipipe.runtime.merge.worker import begin, work

with contextlib.suppress(ImportError):
    import transformers  # noqa: F401 - once, not by every merge's verification

HIDDEN, INNER, VOCABULARY, LAYERS = 8, 16, 11, 2
CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN,
          "intermediate_size": INNER, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4,
          "num_hidden_layers": LAYERS, "vocab_size": VOCABULARY, "tie_word_embeddings": False, "dtype": "float32"}


def shapes(layers=LAYERS, vocabulary=VOCABULARY, experts=0):
    """Tensor shapes of the tiny transformer; with ``experts`` the MLP is a stacked bank with a router."""
    found = {"model.embed_tokens.weight": (vocabulary, HIDDEN), "model.norm.weight": (HIDDEN,),
             "lm_head.weight": (vocabulary, HIDDEN)}
    for layer in range(layers):
        at = f"model.layers.{layer}"
        found |= {f"{at}.self_attn.q_proj.weight": (8, HIDDEN), f"{at}.self_attn.k_proj.weight": (4, HIDDEN),
                  f"{at}.self_attn.v_proj.weight": (4, HIDDEN), f"{at}.self_attn.o_proj.weight": (HIDDEN, 8),
                  f"{at}.input_layernorm.weight": (HIDDEN,), f"{at}.post_attention_layernorm.weight": (HIDDEN,)}
        if experts:
            found |= {f"{at}.mlp.gate.weight": (experts, HIDDEN),
                      f"{at}.mlp.experts.gate_up_proj": (experts, 2 * INNER, HIDDEN),
                      f"{at}.mlp.experts.down_proj": (experts, HIDDEN, INNER)}
        else:
            found |= {f"{at}.mlp.gate_proj.weight": (INNER, HIDDEN), f"{at}.mlp.up_proj.weight": (INNER, HIDDEN),
                      f"{at}.mlp.down_proj.weight": (HIDDEN, INNER)}
    return found


def state(seed, base=None, scale=0.01, dtype=torch.float32, **kind):
    """Weights: random for a base, base + scale * noise for an expert; plus one int64 buffer."""
    generator = torch.Generator().manual_seed(seed)
    found = {name: torch.randn(shape, generator=generator) for name, shape in shapes(**kind).items()}
    if base is not None:
        found = {name: (base[name].float() + scale * value) for name, value in found.items()}
    found = {name: value.to(dtype) for name, value in found.items()}
    found["model.position_ids"] = torch.arange(4)
    return found


def write(folder: Path, tensors, config=None, shards=1, licence="apache-2.0"):
    """A checkpoint folder; with an index where there are several shards."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **(config or {})}))
    (folder / "README.md").write_text(f"---\nlicense: {licence}\n---\n")
    names = sorted(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[shard::shards]}
        save_file(part, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def read(folder: Path):
    """All tensors of a folder."""
    found = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        found |= load_file(file)
    return found


def trio(root: Path, shards=2, **kind):
    """A base and three experts on disk, and their weights by name."""
    weights = {"base": state(0, **kind)}
    weights |= {f"expert{seed}": state(seed, weights["base"], **kind) for seed in (1, 2, 3)}
    experts = kind.get("experts", 0)
    config = {"vocab_size": kind.get("vocabulary", VOCABULARY), "num_hidden_layers": kind.get("layers", LAYERS)}
    config |= {"num_experts": experts, "model_type": "qwen3_moe"} if experts else {}
    for name, tensors in weights.items():
        write(root / name, tensors, config, shards)
    return weights


PARAMETERS = {"slerp": {"t": 0.4}, "nearswap": {"t": 0.005}, "wudi": {"steps": 5}, "nuslerp": {"weight": 1.0},
              "rmm": {"num_basis": 1, "rank": 4},
              "onebit": {"route": 1}, "layer_swapping": {"bottom": 1, "top": 0}, "doge": {"steps": 10},
              "ties": {"density": 0.4}, "dare_ties": {"density": 0.5}, "sce": {"select_topk": 0.3},
              "della": {"density": 0.5}, "lore": {"iterations": 3}}


def recipe_for(method, root, **changes):
    """The recipe of a method over the trio's experts."""
    spec = BY_NAME[method]
    count = min(3, spec.max_models or 3)
    data = {"merge_method": method, "models": [{"model": f"{root}/expert{seed}"} for seed in range(1, count + 1)],
            "parameters": PARAMETERS.get(method, {})}
    if spec.base is not Base.UNUSED:
        data["base_model"] = f"{root}/base"
    return {**data, **changes}


class Threads(MergeRanks):
    """Ranks as threads of one process: what they gather goes through a shared list."""

    def __init__(self, rank, size, shared, barrier):
        super().__init__(rank, size, rank)
        self.shared, self.wait = shared, barrier.wait

    def gather(self, value):
        self.shared[self.rank] = value
        self.wait()
        values = list(self.shared)
        self.wait()
        return values


def in_threads(plan, out):
    """Run a plan with each of its ranks in a thread of this process."""
    begin(plan, out)
    ranks = len(plan.ranks)
    barrier, shared, failures = threading.Barrier(ranks, timeout=60), [None] * ranks, []

    def one(rank):
        try:
            work(plan, out, Threads(rank, ranks, shared, barrier), torch.device("cpu"))
        except BaseException as error:
            failures.append(error)
            barrier.abort()

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
