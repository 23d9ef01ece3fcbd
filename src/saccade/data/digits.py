"""Handwritten digits bundled with scikit-learn, in three splits that share no sample."""

from functools import lru_cache

import numpy as np

from saccade.values import SPLITS, check_choice

# Share of each class, in the order of SPLITS.
_SHARES = (0.70, 0.15, 0.15)


@lru_cache(maxsize=1)
def digit_samples() -> tuple[np.ndarray, np.ndarray]:
    """The 1,797 handwritten digits that scikit-learn ships.

    Returns:
        images: uint8 (1797, 8, 8), ink from 0 to 255.
        classes: int64 (1797,), 0 to 9.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.clip(np.rint(bunch.images * (255 / 16)), 0, 255).astype(np.uint8)
    return images, bunch.target.astype(np.int64)


@lru_cache(maxsize=3)
def split_indices(split: str) -> tuple[tuple[int, ...], ...]:
    """Indices into `digit_samples` that belong to one split, stratified by class and the same on every machine.

    Args:
        split: "train", "validation" or "test".

    Returns:
        Ten tuples of sample indices, one per digit class.

    Raises:
        SaccadeError: if `split` is none of the three.
    """
    check_choice("split", split, SPLITS)
    _, classes = digit_samples()
    generator = np.random.default_rng(0)
    part = SPLITS.index(split)
    edges = np.cumsum((0.0, *_SHARES))
    chosen = []
    for digit in range(10):
        members = generator.permutation(np.flatnonzero(classes == digit))
        low, high = (round(edge * len(members)) for edge in edges[part : part + 2])
        chosen.append(tuple(int(index) for index in members[low:high]))
    return tuple(chosen)
