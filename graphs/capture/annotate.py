"""What a segment is: its layer, modality branch, role in a MoE layer; read from module paths by patterns.

The patterns are data (`DEFAULT`): a YAML file of the same form, given by the user, is tried first. Needs no torch.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

from mipipe.graphs.errors import InputError, shown
from mipipe.graphs.expressions import check_expression, search
from mipipe.graphs.operator_graph import OperatorGraph, Role, Segment, Tags
from mipipe.graphs.serialize import STRICT, from_data, load_data


@dataclass(frozen=True, slots=True)
class Patterns:
    """Regular expressions, searched in a segment's name; of each kind the first that matches decides.

    ``roles`` maps an expression to a role, ``branches`` to a branch name, ``layers`` lists expressions whose first
    group is the layer's number.
    """

    __pydantic_config__: ClassVar = STRICT
    roles: dict[str, Role] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    layers: tuple[str, ...] = ()


DEFAULT = Patterns(
    roles={
        r"shared_experts?\b|shared_mlp\b": Role.SHARED_EXPERTS,
        r"\.router$|(^|\.)(mlp|moe|block_sparse_moe|feed_forward|ffn)\.(gate|router)$": Role.ROUTER,
        r"(^|\.)experts(\.\d+)?$|\.experts\.group\d+$": Role.EXPERTS,
        r"\.combine$": Role.COMBINE,
        r"\.dispatch$": Role.DISPATCH,
        r"attn\b|attention\b|(^|\.)mixer$|self_attn|cross_attn|encoder_attn": Role.ATTENTION,
        r"lm_head|(^|\.)(head|classifier|score|output_projection|fc|proj_out)$|logits": Role.HEAD,
        r"(^|[._])loss\b": Role.LOSS,
        r"embed|(^|\.)(wte|wpe|tok_embeddings|embeddings)(\.|$)|(^|\.)(stem|patchify)": Role.EMBEDDING,
        r"(^|\.)(mlp|ffn|feed_forward|feedforward|fc\d|block_sparse_moe|moe)(\.|$)": Role.MLP,
        r"norm\b|(^|[._])ln(_f|\d)?$": Role.NORM,
    },
    branches={
        r"^reference(\.|$)": "reference",
        r"projector|connector|(^|[._])merger|visual_projection|text_projection|aligner": "projector",
        r"vision|visual|image|(^|\.)vit(\.|$)|pixel": "vision",
        r"audio|speech|acoustic": "audio",
    },
    layers=(r"(?:^|\.)(?:layers?|blocks?|h|resblocks|encoder|decoder|stages?)\.(\d+)(?:\.|$|#)",),
)


def load_patterns(path: str | Path) -> Patterns:
    """Patterns from a YAML file with the keys ``roles``, ``branches`` and ``layers``.

    Raises:
        InputError: unknown keys or roles, or an invalid regular expression.
    """
    patterns = from_data(load_data(path), Patterns, str(path))
    for text in (*patterns.roles, *patterns.branches, *patterns.layers):
        check_expression(text, str(path))
    for text in patterns.layers:
        if not re.compile(text).groups:
            raise InputError(f"{path}: layers: {shown(text)} has no group; expected one that is the layer's number,"
                             r" such as layers\.(\d+)")
    return patterns


def tag(name: str, patterns: Sequence[Patterns] = (DEFAULT,)) -> Tags:
    """The tags of a segment by its name; earlier patterns win."""
    layer = next((int(match[1]) for item in patterns for text in item.layers
                  if (match := _search(item, text, name)) and (match[1] or "").isdecimal()), None)
    role = next((role for item in patterns for text, role in item.roles.items() if _search(item, text, name)),
                Role.OTHER)
    branch = next((branch for item in patterns for text, branch in item.branches.items() if _search(item, text, name)),
                  None)
    group = re.search(r"\.experts\.group(\d+)$", name)
    return Tags(layer, branch, role, int(group[1]) if group else None)


def _search(patterns: Patterns, text: str, name: str) -> re.Match[str] | None:
    """Where a pattern is found; those of a file have a limit."""
    return re.search(text, name) if patterns is DEFAULT else search(text, name)


def annotate(graph: OperatorGraph, patterns: Patterns | None = None) -> OperatorGraph:
    """The graph with tags on every segment.

    Where some segments have a branch, the others are ``text`` if they start from an embedding of their own; else they
    belong to the one branch there is, unless the user's patterns name it. A projector beside no other branch is none.
    """
    patterns = patterns or Patterns()
    sources = (patterns, DEFAULT)
    tags = {segment.name: tag(segment.name, sources) for segment in graph.segments}
    branches = {item.branch for item in tags.values()} - {None}
    if branches == {"projector"} and "projector" not in patterns.branches.values():
        branches, tags = set(), {name: replace(item, branch=None) for name, item in tags.items()}
    reads = any(item.branch is None and item.role is Role.EMBEDDING for item in tags.values())
    found = next(iter(branches - {*patterns.branches.values()}), None)
    rest = "text" if branches and (reads or len(branches) > 1) else found

    def tagged(segment: Segment) -> Segment:
        item = tags[segment.name]
        return replace(segment, tags=replace(item, branch=item.branch or rest))

    return replace(graph, segments=tuple(tagged(segment) for segment in graph.segments))
