"""What work costs, counted and not timed: FLOPs, tensor operations, and bytes kept for the backward pass."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
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


@dataclass
class SavedBytes:
    """Bytes of distinct memory that autograd keeps for the backward pass, parameters left out."""

    total: int = 0


@contextmanager
def count_saved_bytes(parameters: Iterator[Tensor]) -> Iterator[SavedBytes]:
    """Count while the forward pass runs.

    Args:
        parameters: tensors that are there in any case, and that do not count.
    """
    seen = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    saved = SavedBytes()
    # Held until the end, so that no address is used twice.
    held: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in seen:
            seen.add(address)
            held.append(tensor.detach())
            saved.total += tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved
