"""Selection methods image by image, as their formulas read: what the batched forms are measured against.

Each takes one image's tokens `(N, D)`, its scores and the number k to keep, and returns the tokens kept, in ascending
order. In float32 like a plain implementation, and without the care for ties that the library takes.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from saccade.tokens import VisualContext


def cosine(features: Tensor) -> Tensor:
    """`(N, N)` float32."""
    unit = features.float() / features.float().norm(dim=1, keepdim=True)
    return unit @ unit.T


def divprune(image: VisualContext, keep: int) -> list[int]:
    """Greedy max-min selection with a running minimum over the kept tokens."""
    distance = 1.0 - cosine(image.features[0])
    others = distance.clone().fill_diagonal_(float("inf"))
    chosen = [int(others.min(dim=1).values.argmax())]
    nearest = torch.full_like(distance[0], float("inf"))
    while len(chosen) < keep:
        nearest = torch.minimum(nearest, distance[chosen[-1]])
        nearest[chosen[-1]] = -1.0
        chosen.append(int(nearest.argmax()))
    return sorted(chosen)


def greedy_map(kernel: Tensor, keep: int) -> list[int]:
    """The fast Cholesky recursion of greedy MAP inference on `kernel` `(N, N)`."""
    gain = kernel.diagonal().clone()
    factor = torch.zeros(keep, len(kernel), device=kernel.device)
    chosen: list[int] = []
    for step in range(keep):
        newest = int(gain.argmax())
        chosen.append(newest)
        row = (kernel[newest] - factor[:step, newest] @ factor[:step]) / gain[newest].clamp(min=1e-6).sqrt()
        factor[step] = row
        gain = gain - row.square()
        gain[newest] = -float("inf")
    return sorted(chosen)


def dpp(image: VisualContext, keep: int) -> list[int]:
    """Greedy maximum of det S over the kept tokens."""
    return greedy_map(cosine(image.features[0]), keep)


def cdpruner(image: VisualContext, keep: int) -> list[int]:
    """The same of diag(q) S diag(q), with q the relevance scaled to [0, 1]."""
    relevance = image.relevance[0].float()
    quality = (relevance - relevance.min()) / (relevance.max() - relevance.min())
    return greedy_map(quality.unsqueeze(0) * cosine(image.features[0]) * quality.unsqueeze(1), keep)


def fastervlm(image: VisualContext, keep: int) -> list[int]:
    """The tokens of highest saliency."""
    return sorted(image.saliency[0].topk(keep).indices.tolist())


def vispruner(image: VisualContext, keep: int) -> list[int]:
    """Half by saliency; of the rest, the eight likest duplicates at even places are dropped again and again."""
    tokens = image.shape[1]
    important = image.saliency[0].topk(int(keep / 2 + 0.5)).indices
    mask = torch.ones(tokens, dtype=torch.bool, device=important.device)
    mask[important] = False
    rest = mask.nonzero().flatten()
    similarity = cosine(image.features[0])
    target = keep - len(important)
    while len(rest) > target:
        even, odd = rest[0::2], rest[1::2]
        best = similarity[even][:, odd].amax(dim=1)
        staying = torch.ones(len(even), dtype=torch.bool, device=rest.device)
        staying[best.topk(min(8, len(rest) - target, len(even))).indices] = False
        rest = torch.cat((even[staying], odd)).sort().values
    return sorted(important.tolist() + rest.tolist())


LOOPS: dict[str, Callable[[VisualContext, int], list[int]]] = {
    "cdpruner": cdpruner,
    "divprune": divprune,
    "dpp": dpp,
    "fastervlm": fastervlm,
    "vispruner": vispruner,
}
