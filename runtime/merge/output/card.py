"""What a merged model's folder holds beside the weights: config, tokenizer files, index, and a model card."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from mipipe.graphs.merging.graph import MergeGraph
from mipipe.graphs.merging.layout import index_json
from mipipe.graphs.merging.method_table.methods import BY_NAME
from mipipe.graphs.merging.tokens.chat_templates import NAMED
from mipipe.graphs.merging.tokens.vocabulary import union_tokenizer
from mipipe.graphs.serialize import load_data, write_text
from mipipe.graphs.units import format_bytes
from mipipe.planner.merging.plan import MergePlan

COPIED = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
          "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tekken.json",
          "generation_config.json", "chat_template.jinja", "chat_template.json", "preprocessor_config.json",
          "processor_config.json", "video_preprocessor_config.json", "image_processor_config.json")
"""Files of a model that go with its tokenizer or its inputs."""
EXTRA_TEMPLATES = "additional_chat_templates"
"""The folder of the chat templates that have names beside the usual one."""
RECORD = "mipipe_merge.json"
"""A file of the result: which merge made it, and what each rank did."""


def write_companions(plan: MergePlan, folder: Path) -> None:
    """Write everything but the weights into the folder."""
    graph = plan.graph
    if len(plan.shards) > 1:
        write_text(folder / "model.safetensors.index.json", index_json(plan.shards))
    if graph.config:  # else state dicts of something else, which has no tokenizer either
        write_text(folder / "config.json", json.dumps(graph.config, indent=2) + "\n")
        _write_tokenizer(graph, folder)
    write_text(folder / "README.md", model_card(plan, folder.name.removesuffix(".partial")))


def _write_tokenizer(graph: MergeGraph, folder: Path) -> None:
    """The tokenizer's and processors' files, code that goes with the model, and the chat template."""
    source = Path(graph.tokenizer_from)
    for name in COPIED:
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)
    for extra in sorted(source.glob(f"{EXTRA_TEMPLATES}/*.jinja")):
        (folder / EXTRA_TEMPLATES).mkdir(exist_ok=True)
        shutil.copyfile(extra, folder / EXTRA_TEMPLATES / extra.name)
    for code in sorted(source.glob("*.py")):  # models with remote code do not load without it; only copied, never run
        shutil.copyfile(code, folder / code.name)
    if graph.vocabulary is not None and graph.vocabulary.added:
        write_text(folder / "tokenizer.json", union_tokenizer(
            graph.tokenizer_from, graph.vocabulary.added, [model.folder for model in graph.models]))
    template = graph.recipe.get("chat_template")
    if template == "auto":
        template = usual_template([model.folder for model in graph.models])
    template = NAMED.get(template or "", template)
    if template:
        write_text(folder / "chat_template.jinja", template)


def usual_template(folders: Sequence[str]) -> str | None:
    """The chat template that most of the models have, the first of them where several are as frequent; None if none."""
    found = Counter(template for folder in folders if (template := _template(Path(folder))))
    return found.most_common(1)[0][0] if found else None


def _template(folder: Path) -> str | None:
    """A model's chat template: a file of its own, or in its tokenizer's config."""
    if (folder / "chat_template.jinja").exists():
        return (folder / "chat_template.jinja").read_text()
    config = folder / "tokenizer_config.json"
    template = load_data(config, foreign=True).get("chat_template") if config.exists() else None
    if isinstance(template, list):  # several with names
        template = {entry.get("name"): entry.get("template") for entry in template
                    if isinstance(entry, dict)}.get("default")
    return template if isinstance(template, str) else None


def model_card(plan: MergePlan, name: str) -> str:
    """The README of a merged model."""
    return graph_card(plan.graph, name, len(plan.graph.units))


def graph_card(graph: MergeGraph, name: str, num_tensors: int) -> str:
    """A README: sources with their licences, methods with papers and parameters, and the recipe itself."""
    licences = sorted({model.licence for model in graph.models if model.licence})
    front = {"base_model": _sources(graph),
             "library_name": "peft" if graph.recipe.get("adapter") else "transformers", "tags": ["mipipe", "merge"],
             "license": licences[0] if len(licences) == 1 else "other"}
    recipe = _given(graph.recipe)
    title = f"with `{recipe['merge_method']}`" if "merge_method" in recipe else "from dense models, one per expert"
    rows = "\n".join(f"| {model.label} | {model.licence or 'made here'} | {format_bytes(model.num_bytes)} |"
                     f" `{model.fingerprint}` |" for model in graph.models)
    methods = "\n".join(_method_lines(graph)) or "- tensors are copied"
    text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)
    made = "".join(f"\n## How {model.label} was made\n{told}" for model in graph.models
                   if (told := _made(Path(model.folder))))
    return f"""---
{yaml.safe_dump(front, sort_keys=False).strip()}
---

# {name}

Merged by mipipe {title}.

| source | licence | size | fingerprint |
|---|---|---|---|
{rows}

Methods, with all their parameters (per model in the order of the recipe; ranges where tensors differ):

{methods}

{num_tensors} tensors, computed in {graph.compute_dtype}, seed {graph.seed}. The licences of all sources apply.

## Recipe

```yaml
{text.strip()}
```
{made}"""


def _sources(graph: MergeGraph) -> list[str]:
    """The models a merge is made of, without what it made itself, as the Hub's ``base_model`` lists them."""
    labels = [part for model in graph.models if model.licence for part in model.label.split("+")]
    return list(dict.fromkeys(labels))


def _made(folder: Path) -> str:
    """What the card of a source tells that is itself a merge (as earlier recipes of a file are), a level deeper."""
    card = folder / "README.md"
    if not (folder / RECORD).exists() or not card.exists():
        return ""
    _, _, body = card.read_text().partition("\n# ")
    return re.sub(r"^(?=#+ )", "#", body.partition("\n")[2], flags=re.MULTILINE)


def _method_lines(graph: MergeGraph) -> list[str]:
    """One line per method that is used: its paper, and the values of its parameters."""
    lines = []
    for method in sorted({unit.method for unit in graph.units} - {"copy"}):
        spec = BY_NAME[method]
        paper = f"{spec.title}, arXiv {spec.arxiv}" if spec.arxiv else spec.title
        units = [unit for unit in graph.units if unit.method == method]
        values = [f"{parameter.name} {_spread([unit.parameters[parameter.name] for unit in units])}"
                  for parameter in spec.parameters if parameter.name in units[0].parameters]
        lines.append(f"- `{method}`: {paper}" + (f"; {', '.join(values)}" if values else ""))
    return lines


def _spread(values: Sequence[Any]) -> str:
    """Values over tensors in few words: the one they share, per model if there are several, or from least to most."""
    if isinstance(values[0], (list, tuple)):
        columns = {_spread(column) for column in zip(*values, strict=True)} if len({*map(len, values)}) == 1 else set()
        if len(columns) == 1:
            return columns.pop()
        return "[" + ", ".join(_spread([row[place] for row in values if len(row) > place])
                               for place in range(max(map(len, values)))) + "]"
    distinct = sorted({str(value) for value in values})
    numbers = [value for value in values if isinstance(value, (int, float)) and not isinstance(value, bool)]
    if len(distinct) > 1 and len(numbers) == len(values):
        return f"{min(numbers):g} to {max(numbers):g}"
    if len(numbers) == len(values):
        return f"{numbers[0]:g}"
    return " or ".join(value.lower() if value in ("None", "True", "False") else value for value in distinct)


def _given(value: Any) -> Any:
    """The recipe without the keys that were left out: those with empty values, outside parameters."""
    if isinstance(value, dict):
        return {key: item if key == "parameters" else _given(item) for key, item in value.items()
                if item not in (None, "", [], {}) and (key, item) not in (("mismatch", "error"), ("seed", 0))}
    return [_given(item) for item in value] if isinstance(value, list) else value
