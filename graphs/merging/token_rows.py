"""Which rows of which models the output's token tables have: the models' tokenizers, joined by the recipe's rule."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from mipipe.graphs.errors import InputError, shown
from mipipe.graphs.merging.participants import Participant
from mipipe.graphs.merging.tokens.tokenizer_rule import TokenizerRule, TokenOrigin, TokenRule
from mipipe.graphs.merging.tokens.vocabulary import GivenRow, Vocabulary, added_entries, join, next_added, read_tokens


def join_vocabularies(rule: TokenizerRule | None, opened: Mapping[str, Participant], reference: str,
                      where: str) -> Vocabulary | None:
    """The output's rows for every opened model; None where the recipe says nothing of tokens.

    Raises:
        InputError: a source that is no model of the recipe, a model without token table or tokenizer, a token's row
            from a model that lacks it.
    """
    if rule is None:
        return None
    main = reference if rule.source in ("base", "union") else rule.source
    if main not in opened:
        raise InputError(f"{where}: tokenizer source {rule.source!r} is neither base, union nor a model of the recipe")
    labels, sizes = list(opened), []
    for label in labels:
        name = opened[label].token_table
        if name is None:
            raise InputError(f"{label}: has no token embedding, but the recipe joins vocabularies")
        sizes.append(opened[label].tensors[name].shape[0])
    tokens = [read_tokens(opened[label].tokenizer_folder) for label in labels]
    extra = [added_entries(opened[label].tokenizer_folder) for label in labels]
    joined = join(tokens, sizes, labels.index(main), rule.source == "union", rule.pad_to_multiple_of, extra,
                  rule.tokens, next_added(opened[main].tokenizer_folder))
    slots = {**tokens[labels.index(main)], **dict(joined.added)}
    given = [_given_row(token, slots[token], entry, labels, tokens, sizes, where)
             for token, entry in rule.tokens.items() if token in slots]
    return replace(joined, given=tuple(given))


def _given_row(token: str, row: int, rule: TokenRule, labels: Sequence[str], tokens: Sequence[Mapping[str, int]],
               sizes: Sequence[int], where: str) -> GivenRow:
    """Where a token's row comes from by the recipe's rule."""
    if not rule.model:
        return GivenRow(row, -1, 0, rule.force)
    model = labels.index(rule.model)
    origin = rule.source if isinstance(rule.source, TokenOrigin) else None
    index = origin.token_id if origin is not None else None
    name = origin.token if origin is not None and origin.token is not None else token
    index = tokens[model].get(name, -1) if index is None else index
    if not 0 <= index < sizes[model]:
        found = f"the token {shown(name)}" if origin is None or origin.token_id is None else f"row {index}"
        raise InputError(f"{where}: tokenizer: tokens: {shown(token)} takes the row of {found} of {rule.model}, which"
                         " does not have it")
    return GivenRow(row, model, index, rule.force)


def check_given(vocabulary: Vocabulary, models: Collection[int], labels: Sequence[str], where: str) -> None:
    """Raise where a token's row is to come from a model that is not merged into a table.

    Raises:
        InputError: naming the model.
    """
    other = next((row for row in vocabulary.given if row.model >= 0 and row.model not in models), None)
    if other is not None:
        raise InputError(f"{where}: tokenizer: tokens: takes a row of {labels[other.model]}, which is not merged; list"
                         " it among the models (with weight 0, if need be)")
