"""Smaller images for the vision tower, and their tokens laid out over the grid of the full image.

What a family encodes at a lower resolution looks to all later steps like a full encoding: rows of N tokens, of which
those that the smaller image gave, `context.low_resolution`, have features, and the others zeros.
"""

import torch
from torch import Tensor

from saccade.families.base import Encoded, square_grid
from saccade.reducers.common import GPU_ELEMENTS, rows_at_once
from saccade.reducers.downsample import grid_places
from saccade.tokens import VisualContext


def shrink_images(pixels: Tensor, height: int, width: int) -> Tensor:
    """Images `(R, C, H, W)` as `(R, C, height, width)`, bicubic with antialiasing, in float32, then their dtype.

    A CPU gets a few images at a time, so that what it works on stays in a core's cache.
    """
    if tuple(pixels.shape[-2:]) == (height, width):
        return pixels
    rows = pixels.shape[0]
    step = rows_at_once(rows, pixels[:1].numel(), pixels.device, GPU_ELEMENTS)
    shrunk = pixels.new_empty(rows, pixels.shape[1], height, width)
    for start in range(0, rows, step):
        # Not by name, or the float32 images of two rounds would be there at once.
        shrunk[start : start + step] = torch.nn.functional.interpolate(
            pixels[start : start + step].float(), (height, width), mode="bicubic", antialias=True, align_corners=False
        )
    return shrunk


def shrink_patches(
    patches: Tensor, grid: tuple[int, int, int], lower: tuple[int, int], merge: int, patch: int, temporal: int
) -> Tensor:
    """The patches of a smaller image or video, as Qwen-VL's processors order them: block of merged patches by block.

    Args:
        patches: `(t * h * w, C * temporal * patch * patch)`.
        grid: t, h and w, in patches.
        lower: rows and columns of the smaller grid, in tokens of `merge x merge` patches.
    """
    frames, height, width = grid
    blocks = patches.reshape(
        frames, height // merge, width // merge, merge, merge, -1, temporal, patch, patch
    )  # (t, H, W, m, m, C, T, p, p)
    images = blocks.permute(0, 6, 5, 1, 3, 7, 2, 4, 8)  # (t, T, C, H, m, p, W, m, p)
    channels = images.shape[2]
    pixels = images.reshape(frames * temporal, channels, height * patch, width * patch)
    rows, columns = lower
    small = shrink_images(pixels, rows * merge * patch, columns * merge * patch)
    small = small.reshape(frames, temporal, channels, rows, merge, patch, columns, merge, patch)
    return small.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(-1, patches.shape[1])


def lay_out(features: Tensor, places: list[int], tokens: int) -> Tensor:
    """Tokens `(..., k, D)` of a smaller image at their `places` among `(..., N, D)`, zeros elsewhere."""
    index = torch.tensor(places, device=features.device)
    empty = features.new_zeros(*features.shape[:-2], tokens, features.shape[-1])
    return empty.index_copy(-2, index, features)


def low_resolution_rows(
    features: Tensor, full: tuple[int, int], lower: tuple[int, int], group: Tensor | None = None
) -> Encoded:
    """The encoding of rows that all shrank from the grid `full` to `lower`.

    Args:
        features: `(R, k, D)`, the tokens of the smaller images.
        group: as in `VisualContext`.
    """
    places = grid_places(full, lower)
    rows, device = features.shape[0], features.device
    context = VisualContext(
        features=lay_out(features, places, full[0] * full[1]),
        grid=square_grid(rows, *full, device),
        group=group,
        low_resolution=torch.tensor(places, device=device).expand(rows, -1),
    )
    return Encoded(context, outputs={})
