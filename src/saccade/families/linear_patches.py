"""Patch embeddings as matrix products, where torch's three-dimensional convolution is slow."""

import logging
from functools import partial

from torch import Tensor, nn

logger = logging.getLogger(__name__)

SLOW_ON = ("cpu",)
"""Types of devices on which torch's convolution was measured to be slower than the product."""


def patch_convolutions(tower: nn.Module) -> list[nn.Conv3d]:
    """The convolutions of a tower that only cut their input into patches: each value is read once."""
    return [module for module in tower.modules() if isinstance(module, nn.Conv3d) and _only_cuts(module)]


def slow_patches(tower: nn.Module) -> bool:
    """Whether the tower has patch convolutions that still run as such, on a device where that is slow."""
    waiting = (conv for conv in patch_convolutions(tower) if "forward" not in conv.__dict__)
    return any(conv.weight.device.type in SLOW_ON for conv in waiting)


def warn_of_slow_patches(tower: nn.Module) -> None:
    """Log a warning about `slow_patches`, with the option that helps."""
    if slow_patches(tower):
        logger.warning(
            "the patch embedding of the vision tower is a Conv3d, which torch runs slowly on a CPU: "
            "linear_patches=True runs it as a matrix product, with the same weights and values but for rounding"
        )


def use_linear_patches(tower: nn.Module) -> int:
    """Make the patch convolutions of a tower run as a matrix product with the same weights, in place.

    Values change by rounding only. Weights, and what is saved, stay as they are.

    Returns:
        How many there are: one in Qwen-VL and GLM-V, none in towers of two-dimensional patches.
    """
    found = patch_convolutions(tower)
    for conv in found:
        conv.forward = partial(_product, conv)
    return len(found)


def _only_cuts(conv: nn.Conv3d) -> bool:
    plain = conv.groups == 1 and conv.padding in ((0, 0, 0), "valid") and set(conv.dilation) == {1}
    return plain and conv.kernel_size == conv.stride


def _product(conv: nn.Conv3d, patches: Tensor) -> Tensor:
    """The convolution of patches `(N, C, T, H, W)` of the kernel's size: `(N, D, 1, 1, 1)`; of others, as it was."""
    if patches.dim() != 5 or tuple(patches.shape[2:]) != conv.kernel_size:
        return type(conv).forward(conv, patches)
    rows = nn.functional.linear(patches.flatten(1), conv.weight.flatten(1), conv.bias)
    return rows[:, :, None, None, None]
