"""Rows grouped by length, for networks on which left padding is not exact: each group is a state without padding."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor

from lmppl.lm.rows import CachedRows, RowState

__all__ = ["GroupedRows", "GroupedState"]


class GroupedState(NamedTuple):
    """The states of the groups, the group of each row (B,), and its place in that group (B,)."""

    groups: list[RowState]
    group: Tensor
    place: Tensor


class GroupedRows:
    """`CachedRows` for rows of any lengths, at one forward a group."""

    def __init__(self, rows: CachedRows) -> None:
        self.rows = rows

    def start(self, tokens: Tensor, lengths: Tensor, *, capacity: int = 0) -> tuple[Tensor, GroupedState]:
        """As `CachedRows.start`; a shorter row has its hidden states at the right, zeros before them."""
        sizes, group = torch.unique(lengths, return_inverse=True)
        groups, hidden = [], None
        for g, size in enumerate(sizes.tolist()):
            members = torch.nonzero(group == g).squeeze(1)
            read = tokens[members, tokens.shape[1] - size :]
            part, state = self.rows.start(read, lengths[members], capacity=capacity)
            groups.append(state)
            if hidden is None:
                hidden = part.new_zeros(len(tokens), tokens.shape[1], part.shape[2])
            hidden = hidden.index_put((members[:, None], _last_columns(tokens, size)), part)
        assert hidden is not None  # there is at least one row
        return hidden, GroupedState(groups, group, _places(group, len(groups)))

    def append(self, state: GroupedState, tokens: Tensor) -> tuple[Tensor, GroupedState]:
        """As `CachedRows.append`."""
        groups, order, parts = [], [], []
        for g, inner in enumerate(state.groups):
            members = _members(state, g)
            part, inner = self.rows.append(inner, tokens[members])
            groups.append(inner)
            order.append(members)
            parts.append(part)
        back = torch.argsort(torch.cat(order))
        return torch.cat(parts)[back], state._replace(groups=groups)

    def select(self, state: GroupedState, index: Tensor) -> GroupedState:
        """As `CachedRows.select`; groups that lose all rows are dropped."""
        group, place = state.group[index], state.place[index]
        kept, compact = torch.unique(group, return_inverse=True)
        groups = [self.rows.select(state.groups[g], place[group == g]) for g in kept.tolist()]
        return GroupedState(groups, compact, _places(compact, len(groups)))

    def crop(self, state: GroupedState, lengths: Tensor) -> GroupedState:
        """As `CachedRows.crop`; a group whose rows are cut to different lengths is split."""
        groups: list[RowState] = []
        group, place = torch.empty_like(state.group), torch.empty_like(state.place)
        for g, inner in enumerate(state.groups):
            members = _members(state, g)
            sizes, part = torch.unique(lengths[members], return_inverse=True)
            for p in range(len(sizes)):
                chosen = torch.nonzero(part == p).squeeze(1)
                source = inner if p + 1 == len(sizes) else copy.deepcopy(inner)  # a state can be consumed once
                piece = self.rows.select(source, chosen)
                group[members[chosen]] = len(groups)
                place[members[chosen]] = torch.arange(len(chosen), device=place.device)
                groups.append(self.rows.crop(piece, lengths[members[chosen]]))
        return GroupedState(groups, group, place)


def _members(state: GroupedState, g: int) -> Tensor:
    """Rows of group `g`, in the order of their places in it."""
    rows = torch.nonzero(state.group == g).squeeze(1)
    return rows[torch.argsort(state.place[rows])]


def _places(group: Tensor, count: int) -> Tensor:
    place = torch.empty_like(group)
    for g in range(count):
        members = group == g
        place[members] = torch.arange(int(members.sum()), device=group.device)
    return place


def _last_columns(tokens: Tensor, size: int) -> Tensor:
    return torch.arange(tokens.shape[1] - size, tokens.shape[1], device=tokens.device)[None]
