"""Counts how often work makes the host wait for a device."""

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
