"""Running the vision towers of Qwen-VL and GLM-4V on some of an image's patches, each at its place in the whole image.

The stock towers take what they otherwise compute from the grid (positions, and where attention is cut) as arguments,
so no model code is copied: these are those of the whole grid, reduced to the patches that are left.

Shapes: S patches of a batch's images or videos, in W windows of m x m that become one token each.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)


def windows_of(pixels: Tensor, patch_size: int, merge: int) -> Tensor:
    """`pixel_values` `(S, K * p * p)`, whose patches are ordered by window, as pictures `(W, K, m * p, m * p)`."""
    patches = pixels.reshape(-1, merge, merge, pixels.shape[-1] // patch_size**2, patch_size, patch_size)
    return patches.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def window_grids(grid: Tensor, merge: int) -> list[tuple[int, int]]:
    """Rows and columns of windows of each image, and of each frame of a video."""
    return [(high // merge, wide // merge) for frames, high, wide in grid.tolist() for _ in range(frames)]


def tower_arguments(tower: nn.Module, grid: Tensor, kept: Tensor) -> dict[str, Any]:
    """What the tower takes beside the pixels of the kept windows and `grid`, long `(images, 3)`.

    Args:
        kept: bool `(W,)`, at least one of each frame.
    """
    merge = tower.spatial_merge_size
    patches = kept.repeat_interleave(merge**2)
    arguments = {
        "position_ids": get_vision_position_ids(grid, merge)[patches],
        "cu_seqlens": borders_of(get_vision_cu_seqlens(grid), patches),
    }
    if hasattr(tower, "pos_embed"):
        table = get_vision_interpolation_indices_and_weights(
            grid,
            num_grid_per_side=tower.num_grid_per_side,
            mode=tower.interpolation_mode,
            align_corners=tower.interpolation_align_corners,
            spatial_merge_size=merge,
        )
        arguments |= zip(("interp_indices", "interp_weights"), (values[patches] for values in table), strict=True)
    if hasattr(tower, "window_size"):
        order, borders = get_vision_window_index(grid, merge, tower.window_size, tower.patch_size)
        order = order.to(kept.device)
        arguments["window_index"] = order_of(order, kept)
        arguments["cu_window_seqlens"] = borders_of(borders, kept[order].repeat_interleave(merge**2))
    return arguments


def order_of(order: Tensor, kept: Tensor) -> Tensor:
    """`order`, long `(W,)`, in which a tower takes the windows, reduced to the kept ones and numbered among them."""
    return (kept.cumsum(dim=0) - 1)[order[kept[order]]]


def borders_of(borders: Tensor, kept: Tensor) -> Tensor:
    """Borders `(pieces + 1,)` of a sequence's pieces, after only the entries `kept`, bool `(S,)`, are left of it.

    A piece of which nothing is left is left out.
    """
    left = torch.nn.functional.pad(kept.cumsum(dim=0), (1, 0))[borders.long()]
    return left.unique_consecutive().to(borders.dtype)
