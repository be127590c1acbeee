"""Where the ops list what they ship: the gate and the kernel table go through the same lists."""

from __future__ import annotations

from collections.abc import Callable

from lowrank_ops.ops._specialization import Specialization
from lowrank_ops.ops.covariance import _triton, _triton_conv

OPS: dict[str, Callable[[int], list[Specialization]]] = {
    "covariance_update_": _triton.shipped,
    "conv_covariance_update_": _triton_conv.shipped,
}
