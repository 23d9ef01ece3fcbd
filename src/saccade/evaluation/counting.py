"""Count the floating-point operations that are actually executed, on a CPU too."""

from collections.abc import Callable

import torch
import torch.nn.attention.varlen
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten


def _attention(query, key, value, *args, out_shape=None, **kwargs) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(grad, query, key, value, *args, out_shape=None, **kwargs) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


# torch counts attention on GPUs, but not the CPU's attention kernel.
CPU_KERNELS = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
# Operations of rows without padding, which torch 2.11 does not count, by the kernel within that it does.
VARIABLE_LENGTH = {
    torch.ops.torch_attn._varlen_attn: aten._flash_attention_forward,
    torch.ops.torch_attn._varlen_attn_backward: aten._flash_attention_backward,
}


def count_flops(work: Callable[[], object]) -> int:
    """Floating-point operations of matrix products, convolutions and attention that `work` runs, two per multiply-add.

    For attention, every pair of query and key counts, masked or not, as in torch.
    """
    for operation, kernel in VARIABLE_LENGTH.items():
        flop_registry.setdefault(operation, flop_registry[kernel])
    with FlopCounterMode(display=False, custom_mapping=CPU_KERNELS) as counter:
        work()
    return counter.get_total_flops()
