"""Counts (not timings) of tensor operations, of waits for a device, and of bytes kept for the backward pass."""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

WAITING = {
    aten._local_scalar_dense,
    aten.nonzero,
    aten.masked_select,
    aten.equal,
    aten._unique2,
    aten.unique_consecutive,
    aten.unique_dim,
    aten.bincount,
}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}


class OperationCount(TorchDispatchMode):
    """Counts tensor operations other than views: each of them launches at least one kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


class HostReads:
    """Counts what makes the host wait for a GPU: values that are read, and shapes that depend on values.

    It counts operations, and so on a CPU too, where nothing waits. Copies to a device are not among them.
    """

    def __init__(self) -> None:
        self.count = 0

    def __enter__(self) -> "HostReads":
        self._modes = (_WaitingOperations(self), _ReadValues(self))
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)


class _WaitingOperations(TorchDispatchMode):
    def __init__(self, reads: HostReads) -> None:
        super().__init__()
        self.reads = reads

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        packet = func.overloadpacket
        masked = packet in INDEXING and any(index is not None and index.dtype == torch.bool for index in args[1])
        self.reads.count += masked or packet in WAITING or func is aten.repeat_interleave.Tensor
        return func(*args, **(kwargs or {}))


class _ReadValues(TorchFunctionMode):
    """`tolist` and `numpy` of a tensor on the CPU are not operations."""

    def __init__(self, reads: HostReads) -> None:
        super().__init__()
        self.reads = reads

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.reads.count += func in (Tensor.tolist, Tensor.numpy)
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
def count_saved_bytes(parameters: Iterable[Tensor]) -> Iterator[SavedBytes]:
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
            # An operation's own result would hold the graph that holds it: memory that is never freed.
            self.tensor = tensor.detach()
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
