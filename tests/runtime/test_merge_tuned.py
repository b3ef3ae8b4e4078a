"""Merges of models that were really tuned: loaded with transformers' own from_pretrained, and better at both tasks."""

import copy

import pytest
import torch
import yaml

from mipipe.runtime.merge.launching.launch import merge

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.slow

TEXT = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "tie_word_embeddings": False}
IMAGE, QUESTION = 31, 30


def sequences(generator, low, step, size=16, rows=32):
    """Rows of tokens in [low, low + size) that go on by ``step``."""
    first = torch.randint(size, (rows, 1), generator=generator)
    return {"input_ids": low + (first + step * torch.arange(8)) % size}


def pictures(generator, rows=32):
    """Images with one bright quarter, followed by a question and the quarter's number."""
    quarter = torch.randint(4, (rows,), generator=generator)
    pixels = 0.3 * torch.randn(rows, 3, 8, 8, generator=generator)
    for row, place in enumerate(quarter.tolist()):
        y, x = 4 * (place // 2), 4 * (place % 2)
        pixels[row, :, y:y + 4, x:x + 4] += 1.0
    ids = torch.full((rows, 6), IMAGE)
    ids[:, 4], ids[:, 5] = QUESTION, 20 + quarter
    return {"input_ids": ids, "pixel_values": pixels}


def answers(model, batch):
    """Logits of the positions that are judged, and what should come there: after the question, or everywhere."""
    logits, ids = model(**batch).logits, batch["input_ids"]
    first = 4 if "pixel_values" in batch else 2
    return logits[:, first:-1].flatten(0, 1), ids[:, first + 1:].flatten()


def tune(model, task, steps, rate=3e-3, seed=1):
    model = copy.deepcopy(model).train()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), rate)
    for _ in range(steps):
        torch.nn.functional.cross_entropy(*answers(model, task(generator))).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def accuracy(model, task):
    logits, wanted = answers(model, task(torch.Generator().manual_seed(99), rows=128))
    return float((logits.argmax(-1) == wanted).float().mean())


def merged(folder, models, loader, **recipe):
    for name, model in models.items():
        model.save_pretrained(folder / name)
    (folder / "recipe.yaml").write_text(yaml.safe_dump({
        "base_model": str(folder / "base"),
        "models": [{"model": str(folder / name)} for name in models if name != "base"], **recipe}))
    merge(folder / "recipe.yaml", folder / "out")
    found, info = loader.from_pretrained(folder / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return found.eval()


def scores(models, tasks):
    return {name: [accuracy(model, task) for task in tasks] for name, model in models.items()}


def test_a_model_tuned_on_images_and_one_tuned_on_text(tmp_path):
    torch.manual_seed(0)
    vision = transformers.CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                           num_attention_heads=4, image_size=8, patch_size=4, projection_dim=32)
    config = transformers.LlavaConfig(vision_config=vision, text_config=transformers.LlamaConfig(**TEXT),
                                      image_token_index=IMAGE, image_seq_length=4,
                                      vision_feature_select_strategy="default", vision_feature_layer=-1)

    def text(generator, rows=32):
        return sequences(generator, 0, 3, rows=rows)

    base = transformers.LlavaForConditionalGeneration(config)
    models = {"base": base.eval(), "images": tune(base, pictures, 60, 2e-3), "text": tune(base, text, 80)}
    out = merged(tmp_path, models, transformers.LlavaForConditionalGeneration, merge_method="task_arithmetic",
                 branches=[{"name": "eyes", "tensors": "vision_tower|multi_modal_projector",
                            "merge_method": "passthrough", "models": [{"model": str(tmp_path / "images")}]}])
    found = scores({**models, "out": out}, (pictures, text))
    assert found["images"][0] > 0.95 and found["text"][1] > 0.95
    assert found["out"][0] > 0.8 and found["out"][1] > 0.8
    assert sum(found["out"]) > max(sum(found[name]) for name in models) + 0.2


def test_two_qwen3_moe_experts(tmp_path):
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(**TEXT, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
                                         decoder_sparse_step=1, mlp_only_layers=[])

    def up(generator, rows=32):
        return sequences(generator, 0, 3, rows=rows)

    def down(generator, rows=32):
        return sequences(generator, 16, -5, rows=rows)

    base = transformers.Qwen3MoeForCausalLM(config)
    models = {"base": base.eval(), "up": tune(base, up, 60), "down": tune(base, down, 60)}
    out = merged(tmp_path, models, transformers.AutoModelForCausalLM, merge_method="task_arithmetic")
    found = scores({**models, "out": out}, (up, down))
    assert found["up"][0] > 0.95 and found["down"][1] > 0.95
    assert found["out"][0] > 0.8 and found["out"][1] > 0.8
    assert sum(found["out"]) > max(sum(found[name]) for name in models) + 0.2
