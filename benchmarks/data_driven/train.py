"""Byte-level language models of 0.9 M parameters, trained by the product: a base, and an expert for each kind of text.

    python benchmarks/data_driven/train.py WORK SEED

The base (WORK/base, one for all seeds) learns prose and a little of everything; every expert (WORK/SEED/KIND) continues
from it on one kind, in an order that follows from its seed. What is there already is not trained again. The folders are
Hugging Face's, with a tokenizer of single bytes.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import mipipe

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data_driven import texts
from data_driven.methods import EXPERTS

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 256, "hidden_size": 128,
          "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4,
          "max_position_embeddings": 256, "tie_word_embeddings": False, "rms_norm_eps": 1e-5, "use_cache": False}
MIXTURE = {**CONFIG, "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 96,
           "num_hidden_layers": 3, "head_dim": 24, "intermediate_size": 192, "moe_intermediate_size": 64,
           "num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True, "decoder_sparse_step": 1,
           "mlp_only_layers": [], "output_router_logits": True, "router_aux_loss_coef": 0.01}
"""A mixture of experts of 0.6 M parameters."""
LENGTH, ROWS = 128, 16
BASE, TUNED = (900, 3e-3), (60, 2.5e-4)
"""Steps and learning rate of the base and of an expert."""
MIXTURE_STEPS = 400
"""Of a mixture's base, whose steps take longer."""
SHARE = 150_000
"""Bytes of every expert's kind that the base sees beside its prose."""


def corpora(work: Path) -> Path:
    """Folders of texts: ``KIND/train/text.txt`` for training, ``KIND/validation.txt`` and ``KIND/test.txt``."""
    folder = work / "texts"
    if (folder / "done").exists():
        return folder
    for name in ("prose", *EXPERTS):
        parts = texts.split(name)
        (folder / name / "train").mkdir(parents=True, exist_ok=True)
        (folder / name / "train" / "text.txt").write_bytes(parts["train"])
        for part in ("validation", "test"):
            (folder / name / f"{part}.txt").write_bytes(parts[part])
    (folder / "base" / "train").mkdir(parents=True, exist_ok=True)
    mixed = b"".join((folder / name / "train" / "text.txt").read_bytes()[:SHARE].decode(errors="ignore").encode()
                     for name in EXPERTS)
    (folder / "base" / "train" / "text.txt").write_bytes((folder / "prose/train/text.txt").read_bytes() + mixed)
    (folder / "done").touch()
    return folder


def write_tokenizer(folder: Path) -> None:
    """A tokenizer whose 256 tokens are the bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    vocabulary = {letter: byte for byte, letter in bytes_to_unicode().items()}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


def folder_of(work: Path, seed: int, name: str) -> Path:
    return work / "base" if name == "base" else work / str(seed) / name


def train(work: Path, seed: int, mixture: bool = False) -> None:
    """Train what is missing of the base and of one seed's five experts; ``mixture``: of models with experts inside."""
    data, model = corpora(work), work / "model"
    missing = [name for name in ("base", *EXPERTS) if not (folder_of(work, seed, name) / "tokenizer.json").exists()]
    if not missing:
        return
    model.mkdir(parents=True, exist_ok=True)
    (model / "config.json").write_text(json.dumps(MIXTURE if mixture else CONFIG))
    graph = mipipe.capture(model, seq=LENGTH, batch=ROWS)
    cluster = mipipe.load_cluster(Path(__file__).resolve().parents[2] / "examples/cluster_1cpu.yaml")
    costs = mipipe.profile(graph)
    plan = mipipe.plan(graph, cluster, microbatches=1, costs=costs, time_limit_s=2).plan
    for name in missing:
        folder, (steps, rate) = folder_of(work, seed, name), BASE if name == "base" else TUNED
        shutil.rmtree(folder, ignore_errors=True)
        if mixture and name == "base":
            steps = MIXTURE_STEPS
        config = {"steps": steps, "seed": seed, "clip": 1.0, "save": {"folder": str(folder)},
                  "optimizer": {"name": "adamw", "lr": rate, "options": {"weight_decay": 0.01, "betas": [0.9, 0.98]}},
                  "schedule": {"name": "cosine", "warmup": 20, "minimum": 0.1},
                  "data": {"source": str(data / name / "train")}}
        if name != "base":
            config["weights"] = str(work / "base")
        result = mipipe.train(plan, graph, config, device="cpu")
        write_tokenizer(folder)
        print(f"seed {seed}, {name}: loss {result.losses[0]:.3f} -> {result.losses[-1]:.3f}", flush=True)


if __name__ == "__main__":
    train(Path(sys.argv[1]), int(sys.argv[2]))
