"""8-bit weights: a dense layer that has one, and quantize_ for the low-rank layers of a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling

from ..arguments import check_choice, checked
from ..factors.eight_bit import quantized
from ..factors.projections import Factors
from ..models.layers import (
    FilterFn,
    bias_vector,
    check_not_dispatched,
    check_not_wrapped,
    dimensions,
    has_transposed_weight,
    weight_matrix,
)
from ..policies import EIGHT_BIT
from ._base import LowRankLayer, copy_flags
from .linear import LowRankLinear


class EightBitLinear(LowRankLinear):
    """A ``torch.nn.Linear`` with an 8-bit weight: a layer of full rank, which is not factorized.

    The parameters are ``values`` (out_features, in_features), int8 or float8_e4m3fn, without gradients, and ``bias``
    (out_features,) or None. The buffer ``values_scale`` (out_features,) holds a float32 scale for each row. Casts,
    state dicts and checkpoints treat them as the 8-bit factors of a :class:`LowRankLinear`.

    Every call computes the weight in the layer's dtype, then the product with torch, on every device. So the layer
    saves memory and takes more time than a dense one.

    Args:
        in_features: size of the input's last dimension.
        out_features: size of the output's last dimension.
        form: ``"int8"``, or ``"fp8"``, which is float8_e4m3fn.
        bias: whether to learn a bias.
        device, dtype: of the parameters; the dtype is that of the weight and the bias.

    Raises:
        ValueError: ``form`` is unknown.

    Example:
        >>> import torch
        >>> import lowrank_ops as lro
        >>> layer = lro.layers.EightBitLinear(64, 32)
        >>> layer
        EightBitLinear(in_features=64, out_features=32, bias=True, values=int8)
        >>> layer(torch.randn(2, 5, 64)).shape, layer.weight.dtype
        (torch.Size([2, 5, 32]), torch.float32)
    """

    matrices = ("values",)
    values: nn.Parameter

    @checked()
    def __init__(
        self,
        in_features: int,
        out_features: int,
        form: str = "int8",
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_choice("form", form, tuple(EIGHT_BIT))
        super().__init__(in_features, out_features, min(in_features, out_features), bias, device, dtype)
        self._set_quantized(self._quantized((form,)))

    def _create_parameters(self, down: Sequence[int], up: Sequence[int], bias: int | None, **factory: Any) -> None:
        self.values = nn.Parameter(torch.empty(self.out_features, self.in_features, **factory))
        self.register_parameter("bias", None if bias is None else nn.Parameter(torch.empty(bias, **factory)))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw a random weight and bias, as ``nn.Linear`` does."""
        self._refuse_eight_bit("reset_parameters")
        bound = max(self.in_features, 1) ** -0.5
        for parameter in self.parameters():
            parameter.uniform_(-bound, bound)

    @classmethod
    @checked()
    def from_linear(cls, linear: nn.Module, form: str = "int8") -> EightBitLinear:  # type: ignore[override]
        """Round the weight of one ``nn.Linear`` or transformers' ``Conv1D`` to 8 bits, with a scale for each row.

        Args:
            linear: the layer, of any float dtype and on any device; not changed.
            form: ``"int8"`` or ``"fp8"``.

        Returns:
            A layer with the dtype, device and training flag of ``linear``, and its bias.

        Raises:
            TypeError: ``linear`` is not a linear layer.
            ValueError: ``form`` is unknown, or the weight holds NaN or inf.

        Example:
            >>> import torch
            >>> import lowrank_ops as lro
            >>> linear, x = torch.nn.Linear(64, 32), torch.randn(5, 64)
            >>> layer = lro.layers.EightBitLinear.from_linear(linear)
            >>> torch.testing.assert_close(layer(x), linear(x), atol=0.02, rtol=0.02)
        """
        if not isinstance(linear, nn.Linear) and not has_transposed_weight(linear):
            raise TypeError(f"linear must be a torch.nn.Linear; got {type(linear).__name__}.")
        check_choice("form", form, tuple(EIGHT_BIT))
        weight = weight_matrix(linear)
        return cls.from_factors(linear, Factors.of_weight(weight, bias_vector(linear), form))

    @classmethod
    def empty_like(cls, dense: nn.Module, rank: int, bias: bool) -> EightBitLinear:
        _, in_features, out_features = dimensions(dense)
        weight = dense.get_parameter("weight")
        layer = nn.utils.skip_init(cls, in_features, out_features, bias=bias, device=weight.device, dtype=weight.dtype)
        if has_transposed_weight(dense):
            layer.replaced_conv1d = type(dense)
        return copy_flags(layer, dense)

    @torch.no_grad()
    def filled_with(self, factors: Factors) -> EightBitLinear:
        """The same layer, with the weight of ``factors``, which are :meth:`Factors.of_weight`, in their format."""
        self._set_quantized({"values": quantized(factors.down, str(factors.formats[0]))})
        if self.bias is not None and factors.bias is not None:
            self.bias.copy_(factors.bias)
        return self

    def forward(self, x: Tensor) -> Tensor:  # (..., in_features) -> (..., out_features)
        return F.linear(x, self.product(), self.bias)

    def product(self) -> Tensor:
        """The weight (out_features, in_features) in the layer's dtype, computed in every call."""
        return self.float_factors()[0]

    def factors(self) -> tuple[Tensor, Tensor | None, Tensor | None] | None:
        """The weight, None and the bias while compiling; else None."""
        return (self.product(), None, self.bias) if type(self) is EightBitLinear and is_compiling() else None

    def dequantize_(self) -> EightBitLinear:
        """Not supported.

        Raises:
            ValueError: always.
        """
        self._refuse_eight_bit("dequantize_")
        return self

    def _refuse_eight_bit(self, operation: str) -> None:
        if self._dtype is not None:
            raise ValueError(f"{operation}: an EightBitLinear stays 8-bit; replace it by layer.to_dense().")

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bias={self.bias is not None}, values={self.formats[0]}"


@checked()
def quantize_(model: nn.Module, form: str = "int8", filter_fn: FilterFn | None = None) -> nn.Module:
    """Round the factors of a model's low-rank layers to 8 bits, in place; on an error the model is unchanged.

    Layers that are not low-rank stay as they are. :meth:`EightBitLinear.from_linear` rounds the weight of one, and a
    :class:`lowrank_ops.ByteBudget` rounds those of the layers that it leaves dense, where that is better. For other
    formats, convert the model with :func:`to_plain_layers` and use torchao's function of the same name.

    Args:
        model: any module.
        form: ``"int8"`` or ``"fp8"``, as for :meth:`lowrank_ops.LowRankLinear.quantize_`.
        filter_fn: ``filter_fn(module, fqn) -> bool`` selects among the low-rank layers. None selects those that can be
            8-bit and are not yet: no convolutions.

    Returns:
        ``model``.

    Raises:
        ValueError: no layer is selected, or a selected layer cannot be 8-bit, is 8-bit already, has PEFT adapters or
            has weights that accelerate moves on each call; the message names it.

    Example:
        >>> import torch, lowrank_ops as lro
        >>> model = torch.nn.Sequential(lro.LowRankLinear(64, 32, rank=8), torch.nn.ReLU())
        >>> lro.layers.quantize_(model, "int8")
        Sequential(
          (0): LowRankLinear(in_features=64, out_features=32, rank=8, bias=True, down=int8, up=int8)
          (1): ReLU()
        )
    """
    check_choice("form", form, tuple(EIGHT_BIT))
    check_not_wrapped(model)
    check_not_dispatched(model)
    layers = {fqn: layer for fqn, layer in model.named_modules() if isinstance(layer, LowRankLayer)}
    if filter_fn is None:
        chosen = {fqn: layer for fqn, layer in layers.items() if _can_be_eight_bit(layer)}
    else:
        chosen = {fqn: layer for fqn, layer in layers.items() if filter_fn(layer, fqn)}
    if not chosen:
        raise ValueError(
            "model has no low-rank layer that filter_fn selects and that can be 8-bit; call compress_ first."
        )
    found = {}
    for fqn, layer in chosen.items():
        try:
            if not isinstance(layer, LowRankLinear):
                layer.quantize_(form)  # refuses
            else:
                found[layer] = layer._quantized((form, form))
        except ValueError as error:
            raise ValueError(f"layer {fqn!r}: {error}") from None
    for lowrank, parts in found.items():
        lowrank._set_quantized(parts)
    return model


def _can_be_eight_bit(layer: LowRankLayer) -> bool:
    return isinstance(layer, LowRankLinear) and not any(layer.formats)
