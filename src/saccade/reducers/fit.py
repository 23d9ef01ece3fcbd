"""Make samples fit: a sample whose visual tokens exceed the room left by its text keeps as many as fit. Our own idea.

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
    """Why a sample cannot fit, however few visual tokens it keeps, and what to do; None if it can.

    Args:
        text: the number of its tokens that are not visual.
        images: the number of its images and videos. Each keeps at least one token, preceded by its isolator rows.
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
    """What each row keeps so that all samples fit.

    Args:
        keep: number of image tokens that each row keeps.
        newlines: whether each row keeps its protected tokens.
        lost: how many tokens fewer than its budget each row keeps, including its protected ones.
    """

    keep: list[int]
    newlines: list[bool]
    lost: list[int]


@torch.no_grad()
def fit_counts(context: VisualContext, keep: int | Tensor, room: Tensor, keeps_newlines: bool = True) -> Fit | None:
    """`keep` tokens of each row, or fewer in samples with less room; None if all samples have room.

    A sample with too many tokens gives each of its rows a share of its room in proportion to `keep * token_need`, from
    one token to `keep`. Newlines are kept if each row can keep a token besides them, and dropped otherwise. If even
    one token per row is too many, each image's neediest row is served first, then the second of each. What a row keeps
    depends on its own sample only.

    Args:
        context: says which sample each row belongs to.
        keep: image tokens within each row's budget, as returned by `keep_counts`.
        room: long `(B,)`, at least 1, the number of visual tokens that fit into the sample of each row.
        keeps_newlines: whether protected tokens are kept too.

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
    """One token for each of `total` rows: first every image's neediest row, then the second of each, and so on."""
    order = sorted((row for row in range(len(limits)) if limits[row]), key=lambda row: (-weights[row], row))
    seen: dict[int, int] = defaultdict(int)
    ranked = []
    for place, row in enumerate(order):
        ranked.append((seen[groups[row]], place, row))
        seen[groups[row]] += 1
    chosen = {row for _, _, row in sorted(ranked)[:total]}
    return [int(row in chosen) for row in range(len(limits))]
