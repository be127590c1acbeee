"""Where the ops list what they ship: the gate and the kernel table go through the same lists."""

from __future__ import annotations

from collections.abc import Callable

from lowrank_ops.ops._specialization import Specialization
from lowrank_ops.ops.covariance import _triton as covariance
from lowrank_ops.ops.covariance import _triton_conv as convolution
from lowrank_ops.ops.linear import _triton as lowrank_linear

OPS: dict[str, Callable[[int], list[Specialization]]] = {
    "covariance_update_": covariance.shipped,
    "conv_covariance_update_": convolution.shipped,
    "lowrank_linear": lowrank_linear.shipped,
}
