"""What a recipe says about the output's tokens: whose vocabulary, and where single tokens' rows come from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from mipipe.graphs.errors import InputError
from mipipe.graphs.serialize import STRICT


@dataclass(frozen=True, slots=True)
class TokenOrigin:
    """The row of another token (or id) of a model, or (``zero``) nothing; in mergekit's words."""

    __pydantic_config__: ClassVar = STRICT
    kind: Literal["model_token", "zero"]
    model: str = ""
    token: str | None = None
    token_id: int | None = None


@dataclass(frozen=True, slots=True)
class TokenRule:
    """Where models that lack a token (with ``force``: all) take its row from: a model that has it, or an origin."""

    __pydantic_config__: ClassVar = STRICT
    source: str | TokenOrigin | None = None
    force: bool = False

    @property
    def model(self) -> str:
        """The model the row comes from; empty for none."""
        return self.source.model if isinstance(self.source, TokenOrigin) else self.source or ""


@dataclass(frozen=True, slots=True)
class TokenizerRule:
    """Whose vocabulary the output has: ``base``, ``union``, or a model; and rules for single tokens.

    Tokens of the rules that the vocabulary lacks are added to it.
    """

    __pydantic_config__: ClassVar = STRICT
    source: str = "union"
    tokens: dict[str, TokenRule] = field(default_factory=dict)
    pad_to_multiple_of: int | None = None


def check_tokenizer_rule(rule: TokenizerRule, where: str) -> None:
    """Raise for what no vocabulary can have.

    Raises:
        InputError: padding below 1, or a token's origin without a model, or with not exactly one of token and id.
    """
    if rule.pad_to_multiple_of is not None and rule.pad_to_multiple_of < 1:
        raise InputError(f"{where}: tokenizer: pad_to_multiple_of: found {rule.pad_to_multiple_of}, expected at least"
                         " 1")
    for token, entry in rule.tokens.items():
        origin = entry.source
        if origin is None:
            raise InputError(f"{where}: tokenizer: tokens: {token!r} has no source; expected a model, or a mapping with"
                             " kind (model_token or zero)")
        if isinstance(origin, TokenOrigin) and origin.kind == "model_token" and \
                (not origin.model or (origin.token is None) == (origin.token_id is None)):
            raise InputError(f"{where}: tokenizer: tokens: {token!r}: kind model_token needs a model, and either token"
                             " or token_id")
