"""Which parts of an image a simple predictor reproduces, so that the vision tower need not see them. Our own idea.

Shapes: W windows, the squares of an image that become one visual token each, of K channels of h x w pixels.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


@torch.no_grad()
def reproduced(windows: Tensor, grids: Sequence[tuple[int, int]], tolerance: float) -> Tensor:
    """Which windows can be rebuilt from others to their left and above them, within a tolerance: bool `(W,)`.

    With L the window to the left, A the one above and C the one above L, a window is predicted as L, as A, as
    L + A - C, as L's last column continued to the right, and as A's last row continued downwards. It is reproduced if
    no pixel of the best prediction is off by more than the tolerance. Flat areas, areas that change evenly, lines, and
    content that repeats from window to window are.

    Neighbours that are reproduced themselves take part with their prediction, not with their own pixels. So errors do
    not add up along a slow gradient: from the windows that are not reproduced, and the name of the best prediction for
    each of the others, every pixel of the image can be rebuilt to within the tolerance.
    (Image coders call this near-lossless prediction in a closed loop.) The first window of each grid has no neighbours
    and is never reproduced.

    Args:
        windows: `(W, K, h, w)`, those of all grids one after another, each in raster order. Compared in float32.
        grids: rows and columns of windows of each image or frame.
        tolerance: in the unit of the pixels; 0 for exact copies.
    """
    own = windows.float()
    rebuilt = own.clone()
    found = torch.zeros(len(own), dtype=torch.bool, device=own.device)
    for window, columns, has_left, has_above in _waves(grids, own.device):
        pixels = own[window]
        left, above = (
            rebuilt[torch.where(has_left, window - 1, window)],
            rebuilt[torch.where(has_above, window - columns, window)],
        )
        both = has_left & has_above
        corner = rebuilt[torch.where(both, window - columns - 1, window)]
        predictions = (
            (left, has_left),
            (above, has_above),
            (left + (above - corner), both),
            (left[..., -1:].expand_as(left), has_left),
            (above[..., -1:, :].expand_as(above), has_above),
        )
        best, least = pixels, torch.full_like(window, torch.inf, dtype=torch.float32)
        for prediction, possible in predictions:
            error = (pixels - prediction).abs().amax(dim=(1, 2, 3))
            better = possible & (error < least)  # false for pixels that are not numbers
            best = torch.where(better[:, None, None, None], prediction, best)
            least = torch.where(better, error, least)
        taken = least <= tolerance
        rebuilt[window] = torch.where(taken[:, None, None, None], best, pixels)
        found[window] = taken
    return found


def _waves(grids: Sequence[tuple[int, int]], device: torch.device) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """The windows in an order in which neighbours to the left and above come first, as many at once as possible.

    Those with the same sum of row and column do not need one another. Yields their number, long `(n,)`, the columns
    of their grid, long `(n,)`, and whether they have a window to their left and one above, two bool `(n,)`.
    """
    parts, start = [], 0
    for rows, columns in grids:
        row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        row, column = row.flatten(), column.flatten()
        parts.append(
            torch.stack((row + column, start + row * columns + column, torch.full_like(row, columns), row, column))
        )
        start += rows * columns
    if not parts:
        return
    wave, *values = torch.cat(parts, dim=1).unbind()
    order = wave.sort(stable=True).indices
    values = torch.stack(values)[:, order].to(device)
    for window, columns, row, column in zip(*(value.split(wave.bincount().tolist()) for value in values), strict=True):
        yield window, columns, column > 0, row > 0
