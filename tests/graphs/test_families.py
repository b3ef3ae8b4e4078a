"""Transformers' families, small: F, I, W of all segments reproduce the family's own eager loss and all gradients.

The reference is transformers' model as it ships (its SDPA attention with its own masks, eager experts), never our code.
In float64; the families cast norms and router weights to float32 inside, which bounds the agreement (`RTOL`).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from fake_cuda import assert_on_fake_cuda
from torch import Tensor, nn

from mipipe.graphs.capture.model import capture
from mipipe.graphs.models import loss as losses
from mipipe.graphs.operator_graph import OperatorGraph, Phase, Role
from mipipe.graphs.tracing.compose import parameter_tensors, run_step
from mipipe.graphs.tracing.parameter_slices import parse_slice

transformers = pytest.importorskip("transformers")
from mipipe.graphs.models import configuration, families, tasks  # noqa: E402

RTOL = 1e-6
TEXT = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64}
MOE = {**TEXT, "moe_intermediate_size": 8, "num_experts": 4, "num_experts_per_tok": 2}


@dataclass(frozen=True)
class Case:
    """A small variant of a family: source name, overrides, capture options, the branches expected, and how many tokens
    of each text are an image's."""

    source: str
    overrides: Mapping[str, Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    branches: frozenset[str | None] = frozenset({None})
    image_tokens: int = 0
    dtype: str = "float64"

    @property
    def rtol(self) -> float:
        """The agreement to be expected."""
        return RTOL if self.dtype == "float64" else 1e-5


VISION = {f"vision_config.{key}": value for key, value in {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 8,
    "patch_size": 4}.items()}


def text(values: Mapping[str, Any]) -> dict[str, Any]:
    """Overrides of the language part of a multimodal configuration."""
    return {f"text_config.{key}": value for key, value in values.items()}


QWEN_VL = {**text({**TEXT, "num_attention_heads": 2, "rope_parameters": {
    "rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}), **{
    f"vision_config.{key}": value for key, value in {
        "hidden_size": 16, "depth": 2, "num_heads": 2, "patch_size": 2, "out_hidden_size": 16}.items()},
    "image_token_id": 63, "vision_config.intermediate_size": 32}
DEEP = {**QWEN_VL, "text_config.head_dim": 8, "vision_config.num_position_embeddings": 25,
        "vision_config.deepstack_visual_indexes": [0]}
FILMS = {"seq": 40, "image": 8, "frames": 4}  # one video of 2 layers of 2 x 2 tokens each
TWO_IMAGES = {"seq": 24, "images": 2, "image": 12}  # 3 x 3 tokens each
BRANCHES = frozenset({"vision", "text", "projector"})
BERT = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 64, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SSM = {**TEXT, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 4}
SOUND = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
         "conv_dim": [8, 8], "conv_stride": [4, 2], "conv_kernel": [8, 4], "num_conv_pos_embeddings": 4,
         "num_conv_pos_embedding_groups": 2, "num_feat_extract_layers": 2, "layerdrop": 0.0,
         "apply_spec_augment": False,
         **dict.fromkeys(("hidden_dropout", "attention_dropout", "feat_proj_dropout", "activation_dropout",
                          "final_dropout"), 0.0)}
PATCHES = {f"vision_config.{key}": value for key, value in {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 4}.items()}
ROUTED = {"vocab_size": 64, "d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_decoder_layers": 2,
          "num_heads": 4, "num_experts": 4, "dropout_rate": 0.0, "router_jitter_noise": 0.0, "expert_capacity": 16,
          "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}
GEMMA3N = {**TEXT, "head_dim": 8, "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8,
           "altup_num_inputs": 2, "laurel_rank": 4, "num_kv_shared_layers": 0, "sliding_window": 4,
           "intermediate_size": [32, 32], "layer_types": ["sliding_attention", "full_attention"],
           "activation_sparsity_pattern": [0.5, 0.0]}
LINEAR = {"num_hidden_layers": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
          "linear_value_head_dim": 8}

QUICK = {
    "bert_questions": Case("BertForQuestionAnswering", BERT),
    "llava": Case("llava", {**text(TEXT), **VISION, "image_token_index": 63}, {"seq": 12, "image": 8},
                  frozenset({"vision", "text", "projector"}), 4),
    "qwen3_moe_aux": Case("Qwen3MoeForCausalLM", {**MOE, "head_dim": 8, "output_router_logits": True}),
}
SLOW = {
    "deepseek_v3": Case("deepseek_v3", {
        **TEXT, "num_key_value_heads": 4, "moe_intermediate_size": 8, "n_routed_experts": 8, "num_experts_per_tok": 2,
        "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 8, "kv_lora_rank": 8,
        "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4, "n_shared_experts": 1}),
    "siglip": Case("siglip", {**VISION, **text({**{key: TEXT[key] for key in TEXT if key != "num_key_value_heads"},
                                                "projection_size": 16})}, {"batch": 3, "seq": 6},
                   frozenset({"vision", "text"})),
    "qwen3_next": Case("Qwen3NextForCausalLM", {**MOE, **LINEAR, "head_dim": 8, "shared_expert_intermediate_size": 8}),
    "mamba2": Case("Mamba2ForCausalLM", {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_heads": 4,
                                         "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 4, "expand": 2}),
    "bamba": Case("BambaForCausalLM", {**SSM, "attn_layer_indices": [1], "mamba_n_groups": 1}),
    "falcon_h1": Case("FalconH1ForCausalLM", {**SSM, "mamba_d_ssm": 32, "head_dim": 8}),
    "granite_hybrid": Case("GraniteMoeHybridForCausalLM", {
        **SSM, "layer_types": ["mamba", "attention"], "num_local_experts": 4, "num_experts_per_tok": 2,
        "shared_intermediate_size": 8}),
    "idefics2": Case("Idefics2ForConditionalGeneration", {
        **text(TEXT), **PATCHES, "image_token_id": 63, **{f"perceiver_config.{key}": value for key, value in {
            "hidden_size": 16, "resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 2,
            "resampler_head_dim": 8, "num_key_value_heads": 1}.items()}}, {"seq": 12}, BRANCHES, 4),
    "idefics3": Case("Idefics3ForConditionalGeneration", {**text(TEXT), **PATCHES, "image_token_id": 63,
                                                          "scale_factor": 2}, {"seq": 12}, BRANCHES, 4),
    "smolvlm": Case("SmolVLMForConditionalGeneration", {**text(TEXT), **PATCHES, "image_token_id": 63,
                                                        "scale_factor": 2}, {"seq": 12}, BRANCHES, 4),
    "mllama": Case("MllamaForConditionalGeneration", {
        **text({**TEXT, "cross_attention_layers": [1], "pad_token_id": 0}), "image_token_index": 63,
        **{f"vision_config.{key}": value for key, value in {
            "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_global_layers": 1,
            "attention_heads": 2, "image_size": 8, "patch_size": 4, "max_num_tiles": 2, "vision_output_dim": 48,
            "intermediate_layers_indices": [0, 1], "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]]}.items()}},
        {"seq": 12}, BRANCHES, 1),
    "gemma3_images": Case("Gemma3ForConditionalGeneration", {
        **text({**TEXT, "head_dim": 8, "sliding_window": 4}), **VISION, "image_token_index": 63,
        "mm_tokens_per_image": 4}, {"seq": 12}, BRANCHES, 4),
    "gemma3n": Case("Gemma3nForCausalLM", GEMMA3N),
    "switch": Case("SwitchTransformersForConditionalGeneration", ROUTED, dtype="float32"),
    "llama4": Case("Llama4ForCausalLM", {**TEXT, "attention_chunk_size": 4, "num_local_experts": 4, "head_dim": 4,
                                         "num_experts_per_tok": 1, "intermediate_size_mlp": 32, "moe_layers": [1],
                                         "layer_types": ["chunked_attention", "full_attention"]}),
    "modernbert": Case("ModernBertForMaskedLM", {
        **{key: BERT[key] for key in BERT if "prob" not in key}, "local_attention": 4, **dict.fromkeys(
            ("pad_token_id", "cls_token_id", "sep_token_id", "bos_token_id", "eos_token_id"), 1)}),
    "wav2vec2_ctc": Case("Wav2Vec2ForCTC", SOUND),
    "wav2vec2_classes": Case("Wav2Vec2ForSequenceClassification", SOUND),
    "hubert": Case("HubertForCTC", SOUND),
    "spectrogram": Case("ASTForAudioClassification", {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "max_length": 32,
        "num_mel_bins": 16}, branches=frozenset({"audio"})),
    **{name: Case(name, BERT) for name in (
        "BertForTokenClassification", "BertForSequenceClassification", "BertForMultipleChoice", "BertForPreTraining",
        "BertForNextSentencePrediction", "RobertaForQuestionAnswering")},
    "bloom": Case("BloomForCausalLM", {"vocab_size": 64, "hidden_size": 16, "n_layer": 2, "n_head": 4}),
    "mpt": Case("MptForCausalLM", {"vocab_size": 64, "d_model": 16, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}),
    "gpt_neo": Case("GPTNeoForCausalLM", {
        "vocab_size": 64, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "window_size": 4,
        "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 64}),
    "falcon": Case("FalconForCausalLM", {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2,
                                         "num_attention_heads": 4, "alibi": True}),
    "gptj": Case("GPTJForCausalLM", {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 2, "rotary_dim": 4,
                                     "n_positions": 64, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    "xlnet": Case("XLNetLMHeadModel", {"vocab_size": 64, "d_model": 16, "n_layer": 2, "n_head": 4, "d_inner": 32,
                                       "dropout": 0.0}, dtype="float32"),  # some of its parameters are, always
    "rwkv": Case("RwkvForCausalLM", {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2,
                                     "attention_hidden_size": 16, "intermediate_size": 32, "context_length": 32}),
    "jamba": Case("JambaForCausalLM", {
        **TEXT, "num_experts": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
        "expert_layer_offset": 1, "mamba_d_state": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False}),
    "minimax": Case("MiniMaxForCausalLM", {
        **TEXT, "head_dim": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "block_size": 4,
        "layer_types": ["linear_attention", "full_attention"]}),
    "lfm2": Case("Lfm2ForCausalLM", {**TEXT, "layer_types": ["conv", "full_attention"]}),
    "cohere2": Case("Cohere2ForCausalLM", {**TEXT, "sliding_window": 4}),
    "deberta_v2": Case("DebertaV2ForMaskedLM", {**BERT, "relative_attention": True, "position_buckets": 4,
                                                "pos_att_type": ["p2c", "c2p"], "type_vocab_size": 0}),
    "llama_classes": Case("LlamaForSequenceClassification", {**TEXT, "pad_token_id": 0}),
    "qwen2_5_vl": Case("qwen2_5_vl", {**QWEN_VL, "vision_config.window_size": 8, "vision_config.fullatt_block_indexes":
                                      [1]}, TWO_IMAGES, BRANCHES),
    "qwen2_5_vl_video": Case("qwen2_5_vl", {**QWEN_VL, "vision_config.window_size": 8, "video_token_id": 62,
                                            "vision_config.fullatt_block_indexes": [1]}, FILMS, BRANCHES),
    "qwen3_vl": Case("qwen3_vl", DEEP, TWO_IMAGES, BRANCHES),
    "qwen3_vl_video": Case("qwen3_vl", {**DEEP, "video_token_id": 62}, FILMS, BRANCHES),
    "qwen3_vl_moe": Case("qwen3_vl_moe", {**DEEP, **text({"moe_intermediate_size": 8, "num_experts": 4,
                                                          "num_experts_per_tok": 2})}, TWO_IMAGES, BRANCHES),
    "llama": Case("llama", TEXT),
    "qwen3": Case("qwen3", {**TEXT, "head_dim": 8}),
    "qwen3_moe": Case("qwen3_moe", {**MOE, "head_dim": 8}),
    "mixtral": Case("mixtral", {**TEXT, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 5}),
    "gemma3": Case("gemma3_text", {**TEXT, "head_dim": 8, "sliding_window": 3, "num_hidden_layers": 6}),
    "olmoe": Case("olmoe", {**TEXT, "num_key_value_heads": 4, "num_experts": 4, "num_experts_per_tok": 2}),
    "gpt_oss": Case("gpt_oss", {**TEXT, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2,
                                "sliding_window": 3}),
    "clip": Case("clip", {**VISION, **text({key: TEXT[key] for key in TEXT if key != "num_key_value_heads"}),
                          "text_config.eos_token_id": 59, "projection_dim": 8}, {"batch": 3, "seq": 6},
                 frozenset({"vision", "text", "projector"})),
    "whisper": Case("whisper", {
        "vocab_size": 64, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_source_positions": 10,
        "max_target_positions": 16, "num_mel_bins": 8, "pad_token_id": 1}),
    "resnet": Case("ResNetForImageClassification", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2],
                                                    "layer_type": "basic", "num_labels": 5}, {"image": 16, "batch": 3}),
    "vit": Case("ViTForImageClassification", {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
                                              "intermediate_size": 32, "image_size": 8, "patch_size": 4},
                {"batch": 3}, frozenset({"vision"})),
}
CASES = {**QUICK, **SLOW}


def reference(case: Case, graph: OperatorGraph) -> tuple[nn.Module, dict[str, Tensor], Tensor]:
    """transformers' own model with random weights, a random batch, and its loss times the weight of the microbatch."""
    torch.manual_seed(0)
    config = configuration.read_model_config(case.source, case.overrides)
    config._experts_implementation = "eager"
    kind = families.model_class(config)
    implementation = "sdpa" if getattr(kind, "_supports_sdpa", False) else "eager"
    model = kind._from_config(config, attn_implementation=implementation, dtype=getattr(torch, case.dtype)).train()
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.add_(0.05 * torch.randn_like(parameter))
    batch = random_batch(case, graph, config)
    return model, batch, eager_loss(case, graph, model, batch)


def eager_loss(case: Case, graph: OperatorGraph, model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """The model's own loss of one microbatch, summed over labels, by formulas of our own."""
    config = model.config
    task = tasks.task_of(config, type(model))
    if task.kind in ("own", "ctc"):
        return model(**batch, **task.constants).loss
    extra = image_arguments(case, batch, config)
    output = model(**{key: item for key, item in batch.items() if key != "labels"}, **task.constants, **extra)
    labels = batch["labels"][:, 1:] if task.shift else batch["labels"]
    logits = output.logits[:, :-1] if task.shift else output.logits
    valid = labels != -100
    loss = -logits.log_softmax(-1)[valid].gather(-1, labels[valid][:, None]).sum()
    if getattr(output, "aux_loss", None) is not None:
        loss = loss + config.router_aux_loss_coef * output.aux_loss * losses.weight(graph, batch)
    return loss


def image_arguments(case: Case, batch: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
    """What Qwen-VL's processor adds for the model's own forward: the grids of the images and where their tokens are."""
    if "image_token_id" not in case.overrides or case.image_tokens:
        return {}
    side = case.options["image"] // config.vision_config.patch_size
    if "frames" in case.options:
        grid = [case.options["frames"] // config.vision_config.temporal_patch_size, side, side]
        return {"video_grid_thw": torch.tensor([grid] * len(batch["input_ids"])),
                "mm_token_type_ids": 2 * (batch["input_ids"] == config.video_token_id).int()}
    return {"image_grid_thw": torch.tensor([[1, side, side]] * (case.options["images"] * len(batch["input_ids"]))),
            "mm_token_type_ids": (batch["input_ids"] == config.image_token_id).int()}


def random_batch(case: Case, graph: OperatorGraph, config: Any) -> dict[str, Tensor]:
    """Random inputs with the graph's shapes; some labels are ignored."""
    batch: dict[str, Tensor] = {}
    for value in graph.values:
        if value.source is None:
            dtype = getattr(torch, value.spec.dtype)
            high = {"token_type_ids": 2, "start_positions": 7, "end_positions": 7, "next_sentence_label": 2,
                    "aspect_ratio_ids": 3}.get(value.name, 60)
            batch[value.name] = (torch.randn(value.spec.shape, dtype=dtype) if dtype.is_floating_point
                                 else torch.randint(0, high, value.spec.shape))
        if "mask" in value.name and value.source is None:
            batch[value.name] = torch.ones(value.spec.shape, dtype=torch.int64)
    if "attention_mask" in batch:
        batch["attention_mask"][..., -2:] = torch.tensor([1, 0])
    labels = batch.get("labels")
    if labels is not None and case.source.endswith(("Classification", "NextSentencePrediction", "MultipleChoice",
                                                    "Segmentation")):
        labels %= 2 if case.source.endswith("MultipleChoice") else config.num_labels
    elif labels is not None and case.source.endswith("CTC"):
        labels %= config.vocab_size
    if labels is not None and labels.dim() == 2:
        labels[:, -2] = -100
    if "text_config.eos_token_id" in case.overrides:  # CLIP reads its text at this token
        batch["input_ids"][:, -1] = case.overrides["text_config.eos_token_id"]
    if "frames" in case.options:  # one video, each layer at a place of its own where text stands between them
        starts = (3, 7) if case.source == "qwen2_5_vl" else (3, 12)
        for row, start in itertools.product(range(len(batch["input_ids"])), starts):
            batch["input_ids"][row, start + row:start + row + 4] = case.overrides["video_token_id"]
    elif "image_token_id" in case.overrides and not case.image_tokens:  # two images in each text, at different places
        for row, (first, second) in enumerate([(1, 11), (2, 13)]):
            batch["input_ids"][row, first:first + 9] = batch["input_ids"][row, second:second + 9] = 63
    if case.image_tokens:
        token = case.overrides.get("image_token_id", case.overrides.get("image_token_index"))
        batch["input_ids"][:, 1:1 + case.image_tokens] = token
    return batch


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_family_equals_eager(name: str) -> None:
    case = CASES[name]
    graph = capture(case.source, overrides=case.overrides, dtype=case.dtype, **{"seq": 8, "batch": 2, **case.options})
    model, batch, loss = reference(case, graph)
    assert_same(graph, model, batch, loss, case.rtol)
    assert {segment.tags.branch for segment in graph.segments} == set(case.branches)
    sizes = [torch.Size(item.spec.shape).numel() for item in graph.parameters if not item.buffer and not item.tied_to]
    assert sum(sizes) == sum(parameter.numel() for parameter in model.parameters())


def assert_same(graph: OperatorGraph, model: nn.Module, batch: Mapping[str, Tensor], loss: Tensor,
                rtol: float = RTOL) -> None:
    """Loss and gradients of the graph are those of the model; and its traces are CUDA's as well."""
    assert_on_fake_cuda(graph)
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    step = run_step(graph, parameter_tensors(graph, named), batch)
    loss.backward()
    assert abs(step.outputs[graph.loss] - loss.detach()) <= rtol * abs(loss.detach())
    whole: dict[str, list[tuple[int, Tensor]]] = {}
    for key, grad in step.gradients.items():
        base, rows = parse_slice(key)
        whole.setdefault(base, []).append((rows[0] if rows else 0, grad))
    gradients = {key: torch.cat([grad for _, grad in sorted(parts, key=lambda part: part[0])])
                 if len(parts) > 1 else parts[0][1] for key, parts in whole.items()}
    expected = {key: item.grad for key, item in model.named_parameters() if item.grad is not None and item.grad.any()}
    assert set(expected) <= set(gradients)
    largest = max(grad.norm() for grad in expected.values())
    for key, grad in expected.items():  # a key bias has no gradient but rounding, hence the floor
        error = (gradients[key] - grad).norm() / torch.maximum(grad.norm(), 1e-6 * largest)
        assert error <= rtol, f"{key}: relative error {error:.1e}"


@pytest.mark.parametrize(("architecture", "first"), [
    ("LlamaForCausalLM", "mipipe"), ("GptOssForCausalLM", "mipipe"), ("FalconForCausalLM", "sdpa"),
    ("BloomForCausalLM", "eager"), pytest.param("MptForCausalLM", "eager", marks=pytest.mark.slow),
    pytest.param("GPTNeoForCausalLM", "eager", marks=pytest.mark.slow)])
def test_a_class_has_an_attention_from_outside_only_if_it_asks(architecture: str, first: str) -> None:
    """With another one, Bloom's own attention was given no mask and read what comes later: no error, another model."""
    kind = getattr(transformers, architecture)
    assert families.implementations(kind, families.NAME)[0] == first
    if first == "eager":
        overrides = next(case.overrides for case in SLOW.values() if case.source == architecture)
        config = configuration.read_model_config(architecture, overrides)
        model = families.build_model(config, "cpu", torch.float64).eval()
        ids = torch.arange(16).reshape(2, 8)
        changed = torch.cat([ids[:, :5], ids[:, 5:] + 20], 1)
        before, after = (model(input_ids=item).logits[:, :5] for item in (ids, changed))
        torch.testing.assert_close(before, after, rtol=1e-12, atol=1e-12)


def test_layers_share_traces_and_moe_has_its_roles() -> None:
    case = SLOW["qwen3_moe"]
    graph = capture(case.source, overrides={**case.overrides, "num_hidden_layers": 4}, seq=8, batch=2)
    assert len(graph.segments) == 4 * 4 + 2 and len(graph.traces) == 6
    roles = [segment.tags.role for segment in graph.segments]
    assert roles[:5] == [Role.EMBEDDING, Role.ATTENTION, Role.ROUTER, Role.EXPERTS, Role.COMBINE]
    assert roles[-1] is Role.HEAD
    crossing = [item for item in graph.values if item.source and "self_attn" in item.source]
    assert all(item.spec.shape == (2, 8, 16) for item in crossing)  # no mask, no rotary embedding is sent
    assert not keeps_down_projections(graph)


def keeps_down_projections(graph: OperatorGraph) -> bool:
    """Whether the backward of experts reads what their down projections make, with or without a bias."""
    found = []
    for segment in graph.segments:
        if segment.tags.role is Role.EXPERTS:
            trace = graph.trace(segment)
            forward = list(trace.phase_operators(Phase.F))
            last = max(place for place, item in enumerate(forward) if "grouped_mm" in item.kind)
            made = {item.name for item in forward[last:] if item.outputs[0].shape == forward[last].outputs[0].shape}
            found.append(any(made & {*item.inputs} for item in trace.operators if item.phase is not Phase.F))
    assert found
    return any(found)


@pytest.mark.parametrize("name", ["qwen3_moe", pytest.param("gpt_oss", marks=pytest.mark.slow),
                                  pytest.param("deepseek_v3", marks=pytest.mark.slow)])
def test_expert_groups_are_parallel_branches(name: str) -> None:
    case = CASES[name]
    graph = capture(case.source, overrides=case.overrides, dtype="float64", seq=8, batch=2, expert_groups=2)
    model, batch, loss = reference(case, graph)
    assert_same(graph, model, batch, loss)
    groups = [segment for segment in graph.segments if segment.tags.expert_group is not None]
    assert {segment.tags.expert_group for segment in groups} == {0, 1}
    made = {name for segment in groups for name in segment.outputs}
    assert not any(set(segment.inputs) & made for segment in groups)  # no group waits for another
    assert keeps_down_projections(graph) == (name == "gpt_oss")  # a bias: routing weights come after it
    sizes = [torch.Size(item.spec.shape).numel() for item in graph.parameters if not item.buffer and not item.tied_to]
    assert sum(sizes) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("groups", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_experts_without_tokens_in_poisoned_memory(groups: int) -> None:
    """All tokens go to two of eight experts, so that a whole expert group gets none; fresh memory is full of NaN."""
    case = CASES["deepseek_v3"]
    graph = capture(case.source, overrides=case.overrides, dtype="float64", seq=8, batch=2, expert_groups=groups)
    model, batch, _ = reference(case, graph)
    model.get_buffer("model.layers.1.mlp.gate.e_score_correction_bias")[:2] = 10.0
    torch.use_deterministic_algorithms(True)
    try:
        assert_same(graph, model, batch, eager_loss(case, graph, model, batch))
    finally:
        torch.use_deterministic_algorithms(False)
    used = model.get_parameter("model.layers.1.mlp.experts.down_proj").grad.flatten(1).any(dim=1)
    assert used.tolist() == [True] * 2 + [False] * 6


def test_frozen_model_with_trained_head() -> None:
    graph = capture("llama", overrides=TEXT, seq=8, batch=2, freeze=[r"^model\."])
    assert [sum(graph.trace(s).has(p) for p in Phase) for s in graph.segments] == [1] * 5 + [2]


@pytest.mark.slow
def test_frozen_vision_tower_has_no_backward() -> None:
    """The usual multimodal case: the projector trains, so the text embedding and it get W, the tower only F."""
    case = CASES["llava"]
    graph = capture(case.source, overrides=case.overrides, dtype="float64", batch=2, freeze=["vision_tower"],
                    **case.options)
    model, batch, _ = reference(case, graph)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("vision_tower" not in name)
    assert_same(graph, model, batch, frozen_loss(model, batch))
    has = {segment.name: "".join(p for p in Phase if graph.trace(segment).has(p)) for segment in graph.segments}
    assert {phases for name, phases in has.items() if "vision_tower" in name} == {"F"}
    assert has["model.multi_modal_projector"] == "FIW"  # I: towards the text embedding it is merged into


def frozen_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The language loss of a model, computed again (after its parameters were frozen)."""
    logits = model(**{key: item for key, item in batch.items() if key != "labels"}, use_cache=False).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    return -logits.log_softmax(-1)[labels != -100].gather(-1, labels[labels != -100][:, None]).sum()


@pytest.mark.parametrize(("name", "error", "words"), [
    ("Gemma3nForConditionalGeneration", ImportError("\nTimmWrapperModel requires the timm library but it was"),
     "needs the package timm, which is not installed: pip install timm, or capture Gemma3nForCausalLM, its text part"),
    ("LlamaForCausalLM", ImportError("no module", name="kernels"),
     "needs the package kernels, which is not installed: pip install kernels"),
    ("Other", ImportError("\nbroken\n"), "cannot be built here: broken")])
def test_a_missing_package_is_named(name: str, error: ImportError, words: str) -> None:
    assert families._needs(name, error) == f"model {name} {words}"
