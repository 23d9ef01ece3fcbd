"""Every reducer as a direct per-image implementation of its formula: the baseline for the batched versions.

Each takes one image, as a context of one row, and the number k of tokens to keep. It returns the kept tokens, long
`(k,)` in ascending order, and for a merging reducer its weights `(k, N)`. The implementations are plain: float32,
vectorised within the image, without padding, per-row budgets or the library's careful tie-breaking.
"""

import math
import zlib
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from saccade.tokens import VisualContext

"""Edge length in pixels of the square that one token covers."""
Choice = tuple[Tensor, Tensor | None]


def cosine(features: Tensor, to: Tensor | None = None) -> Tensor:
    """Cosines of tokens `(M, D)` with tokens `(N, D)`, or with each other: float32 `(M, N)`."""
    unit = features.float() / features.float().norm(dim=1, keepdim=True)
    return unit @ (unit if to is None else to.float() / to.float().norm(dim=1, keepdim=True)).T


def ascending(chosen: list[int], image: VisualContext) -> Tensor:
    return torch.tensor(sorted(chosen), device=image.features.device)


def none(image: VisualContext, keep: int) -> Choice:
    """All tokens."""
    return torch.arange(image.shape[1], device=image.features.device), None


def random(image: VisualContext, keep: int) -> Choice:
    """A permutation seeded by a checksum of the features, so it is deterministic per image."""
    seed = zlib.crc32(image.features.contiguous().view(torch.uint8).cpu().numpy())
    drawn = torch.rand(image.shape[1], generator=torch.Generator().manual_seed(seed))
    return drawn.topk(keep).indices.sort().values.to(image.features.device), None


def seeded_random(image: VisualContext, keep: int) -> Choice:
    """A permutation with the seed that the caller provides."""
    drawn = torch.rand(image.shape[1], generator=torch.Generator().manual_seed(int(image.seed)))
    return drawn.topk(keep).indices.sort().values.to(image.features.device), None


def regions(height: int, width: int, keep: int) -> list[list[int]]:
    """Tokens of each of `keep` regions: bands of rows, each cut into pieces along a path up and down the columns."""

    def cost(bands: int) -> tuple[int, int]:
        lattice = keep % bands == 0 and height % bands == 0 and width % max(1, keep // bands) == 0
        return round(1000 * (abs(math.log2(bands * bands * width / (keep * height))) - lattice)), bands

    bands = min((number for number in range(1, height + 1) if keep * (height // number) >= height), key=cost)
    found = []
    for band in range(bands):
        top, bottom = -(-band * height // bands), -(-(band + 1) * height // bands)
        pieces = (2 * keep * bottom + height) // (2 * height) - (2 * keep * top + height) // (2 * height)
        path = [
            row * width + column
            for column in range(width)
            for row in (range(top, bottom) if column % 2 == 0 else range(bottom - 1, top - 1, -1))
        ]
        edges = [-(-piece * len(path) // pieces) for piece in range(pieces + 1)]
        found += [path[start:stop] for start, stop in pairwise(edges)]
    return found


def central(tokens: list[int], width: int) -> int:
    """The token nearest to the centroid of `tokens`; ties go to the first."""
    count = len(tokens)
    y, x = sum(token // width for token in tokens), sum(token % width for token in tokens)
    return min(tokens, key=lambda t: ((count * (t // width) - y) ** 2 + (count * (t % width) - x) ** 2, t))


def uniform(image: VisualContext, keep: int) -> Choice:
    """The central token of each region."""
    _, height, width = image.grid[0].tolist()
    return ascending([central(tokens, width) for tokens in regions(height, width, keep)], image), None


def avgpool(image: VisualContext, keep: int) -> Choice:
    """The mean of each region, ordered by central token."""
    _, height, width = image.grid[0].tolist()
    found = sorted(regions(height, width, keep), key=lambda tokens: central(tokens, width))
    weight = torch.zeros(keep, image.shape[1])
    for region, tokens in enumerate(found):
        weight[region, tokens] = 1 / len(tokens)
    index = ascending([central(tokens, width) for tokens in found], image)
    return index, weight.to(image.features.device)


def divprune(image: VisualContext, keep: int) -> Choice:
    """Greedy max-min selection with a running minimum over the kept tokens."""
    distance = 1.0 - cosine(image.features[0])
    others = distance.clone().fill_diagonal_(float("inf"))
    chosen = [int(others.min(dim=1).values.argmax())]
    nearest = torch.full_like(distance[0], float("inf"))
    while len(chosen) < keep:
        nearest = torch.minimum(nearest, distance[chosen[-1]])
        nearest[chosen[-1]] = -1.0
        chosen.append(int(nearest.argmax()))
    return ascending(chosen, image), None


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
    return chosen


def dpp(image: VisualContext, keep: int) -> Choice:
    """Greedy maximization of det S over the kept tokens; the diagonal of S is one, so all tie for the first pick."""
    return ascending(greedy_map(cosine(image.features[0]).fill_diagonal_(1), keep), image), None


def cdpruner(image: VisualContext, keep: int) -> Choice:
    """Like `dpp`, with diag(q) S diag(q), where q is the relevance scaled to [0, 1]."""
    relevance = image.relevance[0].float()
    quality = (relevance - relevance.min()) / (relevance.max() - relevance.min())
    kernel = quality.unsqueeze(0) * cosine(image.features[0]) * quality.unsqueeze(1)
    return ascending(greedy_map(kernel, keep), image), None


def fastervlm(image: VisualContext, keep: int) -> Choice:
    """The tokens of highest saliency."""
    return image.saliency[0].topk(keep).indices.sort().values, None


def vispruner(image: VisualContext, keep: int) -> Choice:
    """Half by saliency; from the rest, repeatedly drop the eight odd-position tokens most similar to an even one."""
    order = image.saliency[0].argsort(descending=True)
    important, rest = order[: keep // 2], order[keep // 2 :]
    similarity = cosine(image.encoder_features[0])
    target = keep - len(important)
    while len(rest) > target:
        offered, others = rest[0::2], rest[1::2]
        ranked = similarity[offered][:, others].amax(dim=1).argsort(descending=True)
        rest = torch.cat((offered[ranked[min(8, len(rest) - target, len(offered)) :]], others))
    return torch.cat((important, rest)).sort().values, None


def holov(image: VisualContext, keep: int) -> Choice:
    """Of each of 16 runs the most salient, as many as its share of the run scores says; what is too many, again."""
    features, saliency, count = image.features[0], image.saliency[0], 16
    runs = torch.arange(len(features), device=features.device).tensor_split(count)
    scores = []
    for run in runs:
        similarity = cosine(features[run]).fill_diagonal_(0)
        others = max(len(run) - 1, 1)
        mean = similarity.sum(dim=1, keepdim=True) / others
        variance = (similarity - mean).square().sum(dim=1) / others
        attention = 1000 * saliency[run]
        scores.append((attention + 0.09 * attention.abs().mean() / (variance.abs().mean() + 1e-6) * variance).mean())
    weight = torch.stack(scores).double()
    room = torch.tensor([len(run) for run in runs], device=weight.device)
    given = torch.zeros_like(room)
    while int(given.sum()) < keep:
        left = keep - int(given.sum())
        open_weight = torch.where(given < room, weight, 0)
        more = (left * open_weight / open_weight.sum() + 1e-9).long()
        more[open_weight.argsort(descending=True)[: left - int(more.sum())]] += 1
        given = torch.minimum(given + more, room)
    chosen = [run[saliency[run].topk(number).indices] for run, number in zip(runs, given.tolist(), strict=True)]
    return torch.cat(chosen).sort().values, None


def greedy_cover(cover: Tensor, quality: Tensor | None, keep: int) -> list[int]:
    """Again and again the token `(N, R)` that adds most to the best cover of all rows, times its quality."""
    best = torch.zeros_like(cover[0])
    chosen: list[int] = []
    for _ in range(keep):
        gain = (cover - best).clamp(min=0).sum(dim=1)
        gain = gain if quality is None else gain * quality
        gain[chosen] = -1
        chosen.append(int(gain.argmax()))
        best = torch.maximum(best, cover[chosen[-1]])
    return chosen


def scope(image: VisualContext, keep: int) -> Choice:
    """The greedy cover of all tokens by cosine, times the saliency."""
    return ascending(greedy_cover(cosine(image.features[0]), image.saliency[0], keep), image), None


def mmtok(image: VisualContext, keep: int) -> Choice:
    """The greedy cover of all words and tokens by softmax of the cosines."""
    words, tokens = image.word_relevance.shape[2], image.shape[1]
    text = (image.word_relevance[0].float() / 0.02).softmax(dim=0) / words
    picture = 0.5 * (cosine(image.encoder_features[0]) / 0.2).softmax(dim=0) / tokens
    return ascending(greedy_cover(torch.cat((text, picture), dim=1), None, keep), image), None


def visionzip(image: VisualContext, keep: int) -> Choice:
    """The most salient tokens, plus evenly spaced targets among the rest, each with the mean of its nearest tokens."""
    keys, tokens = image.keys[0], image.shape[1]
    contextual = int(keep * 10 / 64 + 0.5)
    dominant = image.saliency[0].topk(keep - contextual).indices
    mask = torch.ones(tokens, dtype=torch.bool, device=keys.device)
    mask[dominant] = False
    rest = mask.nonzero().flatten()
    targets = rest[:: len(rest) // contextual][:contextual]
    index = torch.cat((dominant, targets)).sort().values
    mask[targets] = False
    others = mask.nonzero().flatten()
    best = targets[cosine(keys[others], keys[targets]).argmax(dim=1)]
    weight = torch.zeros(keep, tokens, device=keys.device)
    weight[torch.searchsorted(index, best), others] = 1
    weight /= weight.sum(dim=1, keepdim=True).clamp(min=1)
    weight[torch.arange(keep, device=keys.device), index] = 1
    return index, weight


def prumerge(image: VisualContext, keep: int) -> Choice:
    """The most salient tokens, each plus its 32 nearest by key, saliency-weighted; one more for the pruned tokens."""
    keys, saliency, tokens = image.keys[0], image.saliency[0], image.shape[1]
    order = saliency.argsort(descending=True)
    kept, pruned = order[: keep - 1], order[keep - 1 :]
    similarity = cosine(keys[kept], keys)
    similarity[torch.arange(keep - 1, device=keys.device), kept] = -torch.inf
    nearest = similarity.topk(32, dim=1).indices
    weight = torch.zeros(keep, tokens, device=keys.device)
    weight[:-1].scatter_(1, nearest, saliency[nearest])
    weight[torch.arange(keep - 1, device=keys.device), kept] = 1
    weight[-1, pruned] = saliency[pruned]
    weight[-1, pruned[0]] = saliency[pruned[0]]
    index, place = order[:keep].sort()
    return index, weight[place]


def tome(image: VisualContext, keep: int) -> Choice:
    """Rounds that merge up to half of the tokens, those at even positions, into the most similar ones at odd ones."""
    features = image.features[0].float()
    member = torch.eye(len(features), device=features.device)
    place = torch.arange(len(features), device=features.device)
    means = features
    while len(place) > keep:
        best, partner = cosine(means[0::2], means[1::2]).max(dim=1)
        gone = best.topk(min(len(place) // 2, len(place) - keep)).indices
        member[1::2] = member[1::2].index_add(0, partner[gone], member[0::2][gone])
        alive = torch.ones(len(place), dtype=torch.bool, device=features.device)
        alive[2 * gone] = False
        member, place = member[alive], place[alive]
        means = member @ features / member.sum(dim=1, keepdim=True)
    return place, member / member.sum(dim=1, keepdim=True)


def redundancy(image: VisualContext, keep: int) -> Choice:
    """The tokens least similar to all others, each averaged with the tokens most similar to it."""
    similarity = cosine(image.features[0])
    sums = similarity.sum(dim=1) - similarity.diagonal()
    index = sums.topk(keep, largest=False).indices.sort().values
    weight = torch.zeros(keep, len(sums), device=sums.device)
    weight[similarity[:, index].argmax(dim=1), torch.arange(len(sums), device=sums.device)] = 1
    weight[:, index] = torch.eye(keep, device=sums.device)
    return index, weight / weight.sum(dim=1, keepdim=True)


LOOPS: dict[str, Callable[[VisualContext, int], Choice]] = {
    "avgpool": avgpool,
    "cdpruner": cdpruner,
    "divprune": divprune,
    "dpp": dpp,
    "fastervlm": fastervlm,
    "holov": holov,
    "mmtok": mmtok,
    "none": none,
    "prumerge": prumerge,
    "random": random,
    "random, seeded": seeded_random,
    "redundancy": redundancy,
    "scope": scope,
    "tome": tome,
    "uniform": uniform,
    "visionzip": visionzip,
    "vispruner": vispruner,
}
