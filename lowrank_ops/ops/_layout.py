"""How a tensor lies in memory: what the kernels' predicates ask about."""

from torch import Tensor


def row_stride(x: Tensor) -> int:
    """Elements between the rows of ``x`` (..., features) as a matrix; 0 where it is none with unit column stride."""
    if x.is_contiguous():
        return x.shape[-1]
    if x.dim() < 2 or x.stride(-1) != 1:
        return 0
    for outer in range(x.dim() - 2):
        if x.shape[outer] != 1 and x.stride(outer) != x.stride(outer + 1) * x.shape[outer + 1]:
            return 0
    return x.stride(-2)


def starts_on_16_bytes(x: Tensor, stride: int) -> bool:
    """Whether ``x`` and every ``stride``-th element of it start on 16 bytes: what vector loads and TMA need."""
    return x.data_ptr() % 16 == 0 and stride * x.element_size() % 16 == 0
