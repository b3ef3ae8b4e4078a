"""Small real models for the runtime tests: how each is built, captured, fed, and run in one process."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn


class Block(nn.Module):
    """A residual MLP."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.drop = nn.Dropout(dropout)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.drop(nn.functional.gelu(self.up(self.norm(x)))))


class SkipTiedTwo(nn.Module):
    """Tied embedding and head, a long skip connection, an auxiliary output that joins the loss, and an unused one."""

    def __init__(self, vocab: int = 11, width: int = 8, layers: int = 8, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.layers = nn.ModuleList(Block(width, dropout) for _ in range(layers))
        self.gate = nn.Linear(width, 1)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        first = hidden = self.embed(input_ids)
        gates = []
        for layer in self.layers:
            hidden = layer(hidden)
            gates.append(self.gate(hidden))
        logits = self.head(self.norm(hidden + first))
        tokens = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        return {"loss": tokens + 0.1 * torch.cat(gates).square().sum(), "logits": logits}


def skip_module(dtype: torch.dtype = torch.float64, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(3)
    return SkipTiedTwo(dropout=dropout).to(dtype)


def token_batch(rows: int, length: int, vocab: int, seed: int = 4) -> dict[str, torch.Tensor]:
    """Random tokens, and labels some of which are ignored."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocab, (rows, length), generator=generator)
    labels = tokens.clone()
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = -100
    return {"input_ids": tokens, "labels": labels}


def chunked(batch: dict[str, torch.Tensor], num_microbatches: int) -> list[dict[str, torch.Tensor]]:
    """The microbatches of a batch."""
    return [{name: tensor.chunk(num_microbatches)[m] for name, tensor in batch.items()}
            for m in range(num_microbatches)]


def eager(module: nn.Module, microbatches: list[dict[str, torch.Tensor]], weight: float,
          loss_of: Any = None) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of the model's own forward and torch's autograd; the sum of losses over ``weight``."""
    module.zero_grad()
    if hasattr(module, "set_experts_implementation"):
        module.set_experts_implementation("eager")  # transformers' grouped kernel has no float64 on CPU
    total = 0.0
    for piece in microbatches:
        output = module(**piece)
        loss = (output["loss"] if loss_of is None else loss_of(output, piece)) / weight
        loss.backward()
        total += loss.item()
    return total, {name: item.grad.clone() for name, item in module.named_parameters() if item.grad is not None}


def tiny_moe(dtype: torch.dtype = torch.float64) -> nn.Module:
    """transformers' Qwen3-MoE: 8 layers, 4 experts, 2 active, untied head."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
    config = Qwen3MoeConfig(vocab_size=64, hidden_size=16, intermediate_size=32, moe_intermediate_size=8,
                            num_hidden_layers=8, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
                            num_experts=4, num_experts_per_tok=2, max_position_embeddings=64, use_cache=False,
                            tie_word_embeddings=False)
    torch.manual_seed(11)
    return Qwen3MoeForCausalLM(config).to(dtype)


def tiny_deepseek(dtype: torch.dtype = torch.float64, dense: int = 1) -> nn.Module:
    """transformers' DeepSeek-V3: 3 layers with latent attention, 4 experts in all but the first ones, 2 active."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
    config = DeepseekV3Config(vocab_size=64, hidden_size=16, intermediate_size=32, moe_intermediate_size=8,
                              num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4, q_lora_rank=6,
                              kv_lora_rank=4, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=4, n_routed_experts=4,
                              num_experts_per_tok=2, n_group=2, topk_group=1, n_shared_experts=1,
                              first_k_dense_replace=dense, max_position_embeddings=64, use_cache=False)
    torch.manual_seed(12)
    return DeepseekV3ForCausalLM(config).to(dtype)


def tiny_llama(dtype: torch.dtype = torch.float64) -> nn.Module:
    """transformers' Llama: 4 layers, fewer key heads than query heads, tied embedding and head."""
    from transformers import LlamaConfig, LlamaForCausalLM
    config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=4,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, use_cache=False,
                         tie_word_embeddings=True)
    torch.manual_seed(14)
    return LlamaForCausalLM(config).to(dtype)


def tiny_phi3(dtype: torch.dtype = torch.float64) -> nn.Module:
    """transformers' Phi-3: 2 layers, queries (4 heads), keys and values (2) in one tensor, gate and up in one."""
    from transformers import Phi3Config, Phi3ForCausalLM
    config = Phi3Config(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, use_cache=False,
                        tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(15)
    return Phi3ForCausalLM(config).to(dtype)


def tiny_vlm(dtype: torch.dtype = torch.float64) -> nn.Module:
    """transformers' LLaVA: a CLIP tower of 4 layers, a projector, a Llama of 4 layers."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
    vision = CLIPVisionConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2,
                              image_size=8, patch_size=4, projection_dim=16)
    text = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2,
                       num_key_value_heads=2, max_position_embeddings=64, use_cache=False)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=31, image_seq_length=4,
                         vision_feature_layer=-1, vision_feature_select_strategy="default")
    torch.manual_seed(12)
    return LlavaForConditionalGeneration(config).to(dtype)


def image_batch(rows: int, dtype: torch.dtype = torch.float64, seed: int = 8) -> dict[str, torch.Tensor]:
    """Four image tokens, then text; labels on the text."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(30, (rows, 9), generator=generator)
    tokens[:, 1:5] = 31
    labels = tokens.clone()
    labels[:, :5] = -100
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = -100
    return {"input_ids": tokens, "pixel_values": torch.randn(rows, 3, 8, 8, dtype=dtype, generator=generator),
            "labels": labels}


def token_losses(output: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The sum of next-token losses over valid labels."""
    logits = output["logits"] if not isinstance(output, torch.Tensor) else output
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float() if logits.dtype is torch.bfloat16
                                       else logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten(),
                                       reduction="sum")


def add_lora(module: nn.Module, names: tuple[str, ...], rank: int = 2) -> None:
    """Freeze everything; linear layers with a last name in ``names`` get a trainable low-rank part (LoRA)."""
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    for path, child in list(module.named_modules()):
        if isinstance(child, nn.Linear) and path.rpartition(".")[2] in names:
            parent = module.get_submodule(path.rpartition(".")[0])
            setattr(parent, path.rpartition(".")[2], Lora(child, rank))


class Lora(nn.Module):
    """``base(x) + b(a(x))``, with only a and b trained."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Linear(base.in_features, rank, bias=False, dtype=base.weight.dtype)
        self.b = nn.Linear(rank, base.out_features, bias=False, dtype=base.weight.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.b(self.a(x))


def byte_model() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A factory for captures by name: the skip model over bytes, with a mean loss."""
    class Mean(SkipTiedTwo):
        def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": super().forward(input_ids, labels)["loss"] / input_ids.numel()}

    return Mean(vocab=256, width=16, layers=4), token_batch(ROWS_OF_BYTES, 16, 256)


def byte_model_64() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """`byte_model` in float64."""
    module, inputs = byte_model()
    return module.double(), inputs


ROWS_OF_BYTES = 2


class KillOnce:
    """A loader whose batch kills one rank, once, if the file says so: ``rank step`` (used by the restart tests)."""

    def __init__(self, graph: Any, rows: int, seed: int, order: str, delay: float = 0.0) -> None:
        from mipipe.runtime.train.data import TextBytes, stdlib_text
        self._text = TextBytes(stdlib_text(100_000), rows, graph, seed)
        self._order, self._delay = Path(order), delay
        self._taken = 0

    def skip(self, count: int) -> None:
        self._taken = count
        self._text.skip(count)

    def __iter__(self) -> Any:
        for batch in self._text:
            self._taken += 1
            if self._delay:
                time.sleep(self._delay)
            self._obey()
            yield batch

    def _obey(self) -> None:
        orders = self._order.read_text().split("\n") if self._order.exists() else []
        for line in filter(None, orders):
            rank, step, what = line.split()
            if int(os.environ["RANK"]) == int(rank) and self._taken == int(step):
                self._order.write_text("\n".join(item for item in orders if item != line))
                if what == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise ValueError("a loader that fails")


class KillInTurn(KillOnce):
    """`KillOnce` whose samples are one sequence, of which copies of a plan take batches in turn."""

    def __init__(self, graph: Any, rows: int, seed: int, order: str, delay: float = 0.0, copy: int = 0,
                 copies: int = 1) -> None:
        super().__init__(graph, 1, seed, order, delay)
        self._rows, self._copy, self._copies = rows, copy, copies

    def __iter__(self) -> Any:
        while True:
            first = (self._taken * self._copies + self._copy) * self._rows
            self._taken += 1
            self._obey()
            samples = [self._text.batch(first + row) for row in range(self._rows)]
            yield {name: torch.cat([item[name] for item in samples]) for name in samples[0]}


class KillOneCopy(KillOnce):
    """`KillOnce` for several copies of a plan, each with batches of its own."""

    def __init__(self, graph: Any, rows: int, seed: int, order: str, delay: float = 0.0, copy: int = 0,
                 copies: int = 1) -> None:
        super().__init__(graph, rows, seed * 100 + copy, order, delay)
