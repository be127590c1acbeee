"""How a tensor lies in memory: what the kernels' predicates ask about."""

from torch import Tensor


def row_stride(x: Tensor) -> int:
    """Elements between the rows of ``x`` (..., features) as a matrix; 0 where it is none with unit column stride.

    Rows that overlap make none either: the tensor copy engine refuses them.
    """
    if x.is_contiguous():
        return x.shape[-1]
    if x.dim() < 2 or x.stride(-1) != 1:
        return 0
    step, rows = 0, 1  # between rows, and how many the dimensions so far make; one of size 1 has any stride
    for size, stride in zip(x.shape[-2::-1], x.stride()[-2::-1], strict=True):
        if size == 1:
            continue
        if rows == 1:
            step = stride
        elif stride != step * rows:
            return 0
        rows *= size
    return step if step >= x.shape[-1] else 0


def starts_on_16_bytes(x: Tensor, stride: int) -> bool:
    """Whether ``x`` and every ``stride``-th element of it start on 16 bytes: what vector loads and TMA need."""
    return x.data_ptr() % 16 == 0 and stride * x.element_size() % 16 == 0
