"""Rows that always fit: a sample whose visual tokens do not fit beside its text keeps as many as do. Our own idea.

Shapes: B feature rows (or units that share a budget) of N tokens.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.errors import SaccadeError
from saccade.reducers.adaptive import token_need
from saccade.reducers.budget import share_out
from saccade.tokens import VisualContext


def no_room(text: int, images: int, isolator_length: int, fit_length: int) -> str | None:
    """Why a sample cannot fit, however few visual tokens it keeps, and what to do; None where it can.

    Args:
        text: its tokens that stand for no image.
        images: how many images and videos it has. Each keeps at least one token, behind its isolator rows.
    """
    least = text + images * (isolator_length + 1)
    if least <= fit_length:
        return None
    beside = f" and {isolator_length} isolator rows" if isolator_length else ""
    each = f", and with one token{beside} per image ({images}) it has {least}" if images else ""
    return (
        f"fit_length={fit_length} is too short: its text has {text} tokens{each}; raise it to at least {least}, or "
        "shorten the text"
    )


@dataclass(frozen=True)
class Fit:
    """What is left of each row so that all samples fit.

    Args:
        keep: tokens of the image that each row keeps.
        newlines: whether a row keeps its protected tokens.
        lost: how many tokens fewer than its budget a row keeps, its protected ones counted.
    """

    keep: list[int]
    newlines: list[bool]
    lost: list[int]


@torch.no_grad()
def fit_counts(context: VisualContext, keep: int | Tensor, room: Tensor, keeps_newlines: bool = True) -> Fit | None:
    """`keep` tokens of each row, fewer in samples that have room for fewer; None where all samples have room.

    A sample that has too many gives each of its rows a share of its room in proportion to `keep * token_need`, from
    one token to `keep`. Newlines stay as long as each row can have a token beside them, and make way for it otherwise.
    Where even one token per row is too much, each image's neediest row comes first, then the second of each. What a
    row keeps depends on its own sample alone.

    Args:
        context: says which sample each row belongs to.
        keep: tokens of the image that each row's budget leaves, as `keep_counts` gives them.
        room: long `(B,)`, visual tokens that the sample of each row can have altogether, from 1 on.
        keeps_newlines: whether protected tokens are kept beside them.

    Raises:
        SaccadeError: if the context does not say which sample each row belongs to.
    """
    if context.sample is None:
        raise SaccadeError("fit_length: the context does not say which sample each row belongs to")
    rows = context.shape[0]
    counts = keep.tolist() if isinstance(keep, Tensor) else [keep] * rows
    protected, plain = torch.zeros_like(room), context.valid.sum(dim=1)
    if keeps_newlines and context.protected is not None:
        protected = (context.protected & context.valid).sum(dim=1)
        plain = plain - protected
    values = torch.stack((context.sample, context.group, room, protected, plain))
    sample, group, rooms, lines, available = values.tolist()
    members: dict[int, list[int]] = defaultdict(list)
    for row in range(rows):
        members[sample[row]].append(row)
    too_long = [own for own in members.values() if sum(counts[row] + lines[row] for row in own) > rooms[own[0]]]
    if not too_long:
        return None
    needs = token_need(context).tolist()
    fitted, newlines = list(counts), [True] * rows
    for own in too_long:
        limits = [counts[row] for row in own]
        free = rooms[own[0]] - sum(lines[row] for row in own)
        if free < sum(limit > 0 for limit in limits):
            # The image gets the whole budget, as it does where newlines are dropped anyway.
            free = rooms[own[0]]
            limits = [min(counts[row] + lines[row], available[row]) for row in own]
            for row in own:
                newlines[row] = False
        weights = [needs[row] * limit for row, limit in zip(own, limits, strict=True)]
        if free < sum(limit > 0 for limit in limits):
            limits = _one_each(free, weights, limits, [group[row] for row in own])
        for row, share in zip(own, share_out(free, weights, limits), strict=True):
            fitted[row] = share
    lost = [
        count - left + (0 if stay else line)
        for count, left, line, stay in zip(counts, fitted, lines, newlines, strict=True)
    ]
    return Fit(fitted, newlines, lost)


def _one_each(total: int, weights: Sequence[float], limits: Sequence[int], groups: Sequence[int]) -> list[int]:
    """One token for each of `total` rows: the neediest of every image, then the second of each, and so on."""
    order = sorted((row for row in range(len(limits)) if limits[row]), key=lambda row: (-weights[row], row))
    seen: dict[int, int] = defaultdict(int)
    ranked = []
    for place, row in enumerate(order):
        ranked.append((seen[groups[row]], place, row))
        seen[groups[row]] += 1
    chosen = {row for _, _, row in sorted(ranked)[:total]}
    return [int(row in chosen) for row in range(len(limits))]
