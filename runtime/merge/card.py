"""What a merged model's folder holds beside the weights: config, tokenizer files, index, and a model card."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import yaml

from mipipe.graphs.merge_layout import index_json
from mipipe.graphs.merge_methods import BY_NAME
from mipipe.graphs.serialize import write_text
from mipipe.graphs.units import format_bytes
from mipipe.graphs.vocabulary import union_tokenizer
from mipipe.planner.merge_plan import MergePlan

COPIED = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
          "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "generation_config.json", "chat_template.jinja",
          "chat_template.json", "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
          "image_processor_config.json")
"""Files of a model that go with its tokenizer or its inputs."""


def write_companions(plan: MergePlan, folder: Path) -> None:
    """Write everything but the weights into the folder."""
    graph = plan.graph
    write_text(folder / "config.json", json.dumps(graph.config, indent=2) + "\n")
    if len(plan.shards) > 1:
        write_text(folder / "model.safetensors.index.json", index_json(plan.shards))
    source = Path(graph.tokenizer_from)
    for name in COPIED:
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)
    for code in sorted(source.glob("*.py")):  # models with remote code do not load without it
        shutil.copyfile(code, folder / code.name)
    if graph.vocabulary is not None and graph.vocabulary.added:
        write_text(folder / "tokenizer.json", union_tokenizer(graph.tokenizer_from, graph.vocabulary.added))
    template = graph.recipe.get("chat_template")
    if template:
        write_text(folder / "chat_template.jinja", template)
    write_text(folder / "README.md", model_card(plan, folder.name.removesuffix(".partial")))


def model_card(plan: MergePlan, name: str) -> str:
    """The README: sources with their licences, method with its paper, parameters, and the recipe itself."""
    graph = plan.graph
    licences = sorted({model.licence for model in graph.models})
    front = {"library_name": "transformers", "tags": ["mipipe", "merge"],
             "license": licences[0] if len(licences) == 1 else "other"}
    recipe = _given(graph.recipe)
    rows = "\n".join(f"| {model.label} | {model.licence} | {format_bytes(model.num_bytes)} |"
                     f" `{model.fingerprint}` |" for model in graph.models)
    methods = sorted({unit.method for unit in graph.units} - {"copy"})
    lines = "\n".join(f"- `{method}`: {_reference(method)}" for method in methods)
    text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)
    return f"""---
{yaml.safe_dump(front, sort_keys=False).strip()}
---

# {name}

Merged by mipipe with `{graph.recipe["merge_method"]}`.

| source | licence | size | fingerprint |
|---|---|---|---|
{rows}

Methods:

{lines}

{len(graph.units)} tensors, {format_bytes(graph.write_bytes)}, computed in {graph.compute_dtype}, seed {graph.seed}. The
licences of all sources apply.

## Recipe

```yaml
{text.strip()}
```
"""


def _given(value: Any) -> Any:
    """The recipe without the keys that were left out: those with empty values, outside parameters."""
    if isinstance(value, dict):
        return {key: item if key == "parameters" else _given(item) for key, item in value.items()
                if item not in (None, "", [], {}) and (key, item) not in (("mismatch", "error"), ("seed", 0))}
    return [_given(item) for item in value] if isinstance(value, list) else value


def _reference(method: str) -> str:
    spec = BY_NAME[method]
    return f"{spec.title}, arXiv {spec.arxiv}" if spec.arxiv else spec.title
