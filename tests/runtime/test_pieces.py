"""Pieces of tensors against the divisions of a team, member by member; names; and one piece read from others."""

import itertools
import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mipipe.graphs.operators.collectives import part_of
from mipipe.graphs.sharding.parts import units
from mipipe.graphs.sharding.team_graph import Division
from mipipe.runtime.weights.pieces import Piece, overlap, parse_piece, piece_of

SHAPE = (24, 8, 4)


@st.composite
def divisions(draw):
    """Up to two axes, along any dimensions, in sections, equal or not."""
    found, left = [], list(SHAPE)
    for axis in ("context", "tensor")[:draw(st.integers(0, 2))]:
        dim, size = draw(st.integers(0, 2)), draw(st.sampled_from((2, 3, 4)))
        sections = draw(st.sampled_from((1, 2, (2, 1), (1, 3, 2))))
        if left[dim] % (size * units(sections)) == 0:
            left[dim] //= size
            found.append(Division(axis, size, dim, sections))
    return tuple(found)


def members(found):
    """The coordinates of every member."""
    for places in itertools.product(*(range(item.size) for item in found)):
        yield dict(zip((item.axis for item in found), places, strict=True))


@given(divisions())
def test_a_piece_is_what_the_divisions_leave(found):
    """All pieces together are the whole; what a piece is cut from, it is put back to; its name says where it is."""
    whole = torch.arange(math.prod(SHAPE)).view(SHAPE)
    together = torch.full(SHAPE, -1)
    for place in members(found):
        piece, wanted = piece_of(SHAPE, found, place), whole
        for item in found:
            wanted = part_of(wanted, place[item.axis], item.size, item.dim, item.sections)
        mine = piece.cut(whole)
        assert torch.equal(mine, wanted) and tuple(mine.shape) == piece.local_shape
        piece.put(together, mine)
        assert parse_piece(f"model.layer[3].weight{piece.suffix}") == ("model.layer[3].weight", dict(piece.ranges))
    assert torch.equal(together, whole)


@settings(max_examples=60)
@given(divisions(), divisions())
def test_any_piece_is_put_together_from_others(first, second):
    """Every element once, whatever wrote the pieces and whoever reads them."""
    whole = torch.arange(math.prod(SHAPE)).view(SHAPE)
    stored = {piece.suffix: piece for piece in (piece_of(SHAPE, first, place) for place in members(first))}
    for place in members(second):
        target = piece_of(SHAPE, second, place)
        made, count = torch.full(target.local_shape, -1), 0
        for source in stored.values():
            for ours, theirs in overlap(target, source):
                made[ours] = source.cut(whole)[theirs]
                count += made[ours].numel()
        assert count == made.numel() and torch.equal(made, target.cut(whole))


def test_rows_in_any_order():
    """Experts on a rank: some twice, none in order."""
    bank = torch.arange(12).view(6, 2)
    target = Piece((4, 2), {0: ((5, 6), (0, 1), (5, 6), (3, 4))})
    made = torch.full((4, 2), -1)
    for ours, theirs in overlap(target, Piece((6, 2))):
        made[ours] = bank[theirs]
    assert torch.equal(made, bank[[5, 0, 5, 3]])


def test_names_that_are_no_pieces():
    for name in ("model.weight", "model.bank[7]", "user@0:1", "model.weight@0:1-", "a@0:1-2x"):
        assert parse_piece(name) == (name, {})
