"""Tensor operations, and bytes kept for the backward pass: counted and not timed."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class OperationCount(TorchDispatchMode):
    """Counts the tensor operations that compute something: views are free, each other one is at least a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


@dataclass
class SavedBytes:
    """Bytes of distinct memory that autograd keeps for the backward pass, parameters left out.

    Args:
        now: what it keeps now.
        peak: the most that it kept at once.
    """

    now: int = 0
    peak: int = 0


@contextmanager
def count_saved_bytes(parameters: Iterator[Tensor]) -> Iterator[SavedBytes]:
    """Count while forward passes run, and backward passes that free what was kept.

    Args:
        parameters: tensors that are there in any case, and that do not count.
    """
    always = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    saved = SavedBytes()
    uses: Counter[int] = Counter()

    class Kept:
        """A saved tensor, which counts until autograd lets go of it."""

        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor
            self.address = tensor.untyped_storage().data_ptr()
            if self.address not in always:
                uses[self.address] += 1
                if uses[self.address] == 1:
                    saved.now += tensor.untyped_storage().nbytes()
                    saved.peak = max(saved.peak, saved.now)

        def __del__(self) -> None:
            if self.address not in always:
                uses[self.address] -= 1
                if uses[self.address] == 0:
                    saved.now -= self.tensor.untyped_storage().nbytes()

    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        yield saved
