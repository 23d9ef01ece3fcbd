"""Counts (not timings) of tensor operations and of bytes kept for the backward pass."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class OperationCount(TorchDispatchMode):
    """Counts tensor operations other than views: each of them launches at least one kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


@dataclass
class SavedBytes:
    """Bytes of distinct memory that autograd keeps for the backward pass, without parameters.

    Args:
        now: bytes currently kept.
        peak: maximum so far.
    """

    now: int = 0
    peak: int = 0


@contextmanager
def count_saved_bytes(parameters: Iterator[Tensor]) -> Iterator[SavedBytes]:
    """Count the bytes saved by forward passes and freed by backward passes in this context.

    Args:
        parameters: tensors to leave out of the count, since they are in memory anyway.
    """
    always = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    saved = SavedBytes()
    uses: Counter[int] = Counter()

    class Kept:
        """A saved tensor, counted until autograd releases it."""

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
