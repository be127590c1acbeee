"""The ``weight`` of a low-rank layer: metadata at no cost; the product is computed when an operation needs its values.

transformers reads ``layer.weight.dtype`` in every forward pass of some models, so reading it must not multiply the
factors. A write to the product would be lost, so it is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

_DETACH = {Tensor.detach, Tensor.data.__get__}  # type: ignore[attr-defined]
_IS_LEAF = Tensor.is_leaf.__get__  # type: ignore[attr-defined]
_NEED_VALUES = {getattr(Tensor, name).__get__ for name in ("T", "H", "mT", "mH", "real", "imag")}
_METADATA = {
    getattr(Tensor, name)
    for name in (
        "size", "dim", "ndimension", "numel", "nelement", "stride", "element_size", "is_contiguous", "get_device",
        "is_floating_point", "is_complex", "is_signed", "is_inference", "__len__", "__hash__",
    )
} | {torch.is_floating_point, torch.is_complex, torch.numel}  # fmt: skip


def lost_write(operation: str) -> RuntimeError:
    """The error for a write to the weight of a low-rank layer."""
    return RuntimeError(
        f"{operation} would be lost: the weight of a low-rank layer is the product of its factors and is not "
        "stored. Write to layer.up and layer.down, copy the product with layer.weight.clone(), or replace the layer by "
        "layer.to_dense(), whose weight is a parameter."
    )


class ProductWeight(Tensor):
    """A read-only tensor whose values are computed when an operation needs them.

    Gradients of the values reach the factors. Views, ``detach()`` and ``data`` are read-only as well.
    """

    values: Callable[[], Tensor]

    @staticmethod
    def __new__(cls, shape: tuple[int, ...], like: Tensor, values: Callable[[], Tensor]) -> ProductWeight:
        weight: ProductWeight = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, shape, dtype=like.dtype, device=like.device, requires_grad=like.requires_grad
        )
        weight.values = values
        return weight

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.__name__
        if func == _IS_LEAF:  # an optimizer refuses what is no leaf
            return not args[0].requires_grad
        if (name == "__get__" and func not in _NEED_VALUES and func not in _DETACH) or func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        target = args[0] if args else next(iter(kwargs.values()))
        if func in _DETACH:
            return cls(target.shape, torch.empty(0, dtype=target.dtype, device=target.device), target.detached_values)
        if isinstance(target, cls) and (name == "__set__" or (name.endswith("_") and not name.endswith("__"))):
            raise lost_write(f"setting {func.__self__.__name__}" if name == "__set__" else name)  # type: ignore[attr-defined]

        made: list[Tensor] = []

        def values_of(weight: ProductWeight) -> Tensor:
            # Not in inference mode: an inference tensor has no version, by which a write is noticed.
            grad = torch.is_grad_enabled()
            with torch.inference_mode(False), torch.set_grad_enabled(grad):
                made.append(weight.values())
            return made[-1]

        args, kwargs = tree_map_only(cls, values_of, (args, kwargs))
        versions = [values._version for values in made]
        result = func(*args, **kwargs)
        if versions != [values._version for values in made]:
            raise lost_write(name)

        def read_only(tensor: Tensor) -> Tensor:
            alias = any(torch._C._is_alias_of(tensor, values) for values in made)  # type: ignore[attr-defined]
            return cls(tensor.shape, tensor, lambda: tensor) if alias else tensor

        return tree_map_only(Tensor, read_only, result)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise NotImplementedError(f"{func} cannot read the weight of a low-rank layer; pass layer.weight.clone().")

    def detached_values(self) -> Tensor:
        """The values, without a gradient."""
        return self.values().detach()
