"""What work costs, counted and not timed: FLOPs, tensor operations, reads by the host, and bytes kept."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten


def _attention(query, key, value, *args, out_shape=None, **kwargs) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(grad, query, key, value, *args, out_shape=None, **kwargs) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


# torch counts attention on GPUs, and not the kernel that the CPU has for it.
CPU_KERNELS = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def count_flops(work: Callable[[], object]) -> int:
    """Floating-point operations of matrix products, convolutions and attention that `work` runs, two a multiply-add.

    Attention counts every pair of a query and a key, masked or not, as torch does.
    """
    with FlopCounterMode(display=False, custom_mapping=CPU_KERNELS) as counter:
        work()
    return counter.get_total_flops()


class OperationCount(TorchDispatchMode):
    """Counts the tensor operations that compute something: views are free, each other one is at least a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


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
    """`tolist` and `numpy` of a tensor on the CPU are no operations."""

    def __init__(self, reads: HostReads) -> None:
        super().__init__()
        self.reads = reads

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.reads.count += func in (Tensor.tolist, Tensor.numpy)
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
