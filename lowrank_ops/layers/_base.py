"""The base of the low-rank layers: padded factors, initialization, conversion from and to dense layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from ..arguments import check_choice
from ..calibration.statistics import LayerStatistics, Moments
from ..config import PROJECTIONS
from ..factors.projections import Factors, factorize, rounded, stored_as
from ..models.layers import dimensions, find_layers, weight_matrix, with_values
from ..models.running import warn_of_few_rows
from ..ranks.costs import PLAIN, stored_rank
from ..subspaces.layer import LayerSubspaces
from .weight import ProductWeight, lost_write

Layer = TypeVar("Layer", bound=nn.Module)
LowRank = TypeVar("LowRank", bound="LowRankLayer")


class LowRankLayer(nn.Module):
    """Low-rank factors ``down`` and ``up``, zero-padded to ``stored_rank``, and an optional bias."""

    down: nn.Parameter
    up: nn.Parameter
    bias: nn.Parameter | None
    rank: int
    matrices: ClassVar[tuple[str, ...]] = ("down", "up")  # the parameters of which the weight is made

    @property
    def stored_rank(self) -> int:
        """``rank`` rounded up to a positive multiple of 8; the padding is zero and receives zero gradients."""
        return stored_rank(self.rank)

    @property
    def weight(self) -> Tensor:
        """The product of the factors, for code that reads the weight of a dense layer; same shape as that.

        Reading shape, dtype and device is free; an operation on the values computes the product. Writes raise.
        """
        if is_dynamo_compiling():  # which drops a product that is not used
            return self.product()
        parts = [part for part in map(self._parameters.get, self.matrices) if isinstance(part, Tensor)]
        if len(parts) < len(self.matrices):  # torch.fx has no tensors, parametrized factors are no parameters
            return self.product()
        return ProductWeight(self._weight_shape(*parts), self._like_weight(parts[-1]), self.product)

    @weight.setter
    def weight(self, value: object) -> None:
        raise lost_write("setting a tensor")

    def _weight_shape(self, *parts: Tensor) -> tuple[int, ...]:
        return (parts[-1].shape[0], *parts[0].shape[1:])

    def _like_weight(self, up: Tensor) -> Tensor:
        """A tensor with the dtype, device and gradient flag of the weight."""
        return up

    def quantize_(self, form: str = "int8", *, down: bool = True, up: bool = True) -> LowRankLayer:
        """Round the factors to 8 bits, in place.

        Raises:
            ValueError: a kind of layer that runs with factors in the dtype of its input only.
        """
        raise ValueError(
            f"a {type(self).__name__} has no 8-bit factors; a LowRankLinear has. Leave the layer out with filter_fn."
        )

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name == "weight" or isinstance(param, ProductWeight):  # pruning registers the old weight by another name
            raise lost_write(f"registering the parameter {name!r}")
        super().register_parameter(name, param)

    def reset_parameters(self) -> None:
        """Draw random factors; the entries of their product have the variance of a new dense layer's weight."""
        raise NotImplementedError

    def product(self) -> Tensor:
        """The product of the factors in the shape of the dense layer's weight, computed in every call."""
        raise NotImplementedError

    def to_dense(self) -> nn.Module:
        """The dense layer with the product as its weight and the same dtype, device and flags."""
        raise NotImplementedError

    @classmethod
    def empty_like(cls: type[LowRank], dense: nn.Module, rank: int, bias: bool) -> LowRank:
        """A layer with uninitialized factors and the sizes, dtype, device, training and gradient flags of ``dense``."""
        raise NotImplementedError

    @classmethod
    def from_factors(cls: type[LowRank], dense: nn.Module, factors: Factors) -> LowRank:
        """A layer that holds ``factors``, with dtype, device, training and gradient flags of ``dense``."""
        return cls.empty_like(dense, factors.rank, bias=factors.bias is not None).filled_with(factors)

    @torch.no_grad()
    def filled_with(self: LowRank, factors: Factors) -> LowRank:
        """The same layer, with the values of ``factors``."""
        padding = self.stored_rank - factors.rank
        self.down.copy_(F.pad(factors.down, (0, 0, 0, padding)).reshape(self.down.shape))
        self.up.copy_(F.pad(factors.up, (0, padding)).reshape(self.up.shape))
        if self.bias is not None and factors.bias is not None:
            self.bias.copy_(factors.bias)
        return self

    def _create_parameters(self, down: Sequence[int], up: Sequence[int], bias: int | None, **factory: Any) -> None:
        """Register ``down``, ``up`` and ``bias`` with the given shapes; a missing bias is registered as None."""
        self.down = nn.Parameter(torch.empty(down, **factory))
        self.up = nn.Parameter(torch.empty(up, **factory))
        self.register_parameter("bias", None if bias is None else nn.Parameter(torch.empty(bias, **factory)))

    @torch.no_grad()
    def _fill_dense(self, dense: Layer) -> Layer:
        """Copy the product of the factors, the bias and the flags into ``dense``."""
        dense.get_parameter("weight").copy_(self.product())
        if self.bias is not None:
            dense.get_parameter("bias").copy_(self.bias)
        return copy_flags(dense, self)


def factorize_layer(
    layer: nn.Module,
    rank: int,
    statistics: LayerStatistics | None,
    projection: str | None,
    centered: bool,
    pivoted: bool = False,
) -> Factors:
    """Factors of one dense layer from its calibration statistics, or by truncated SVD of its weight without them."""
    found, skipped = find_layers(layer)
    skipped |= with_values(found)[1]
    if "" in skipped:
        raise ValueError(f"a {type(layer).__name__} cannot be factorized: {skipped['']}.")
    _, in_features, out_features = dimensions(layer)
    check_rank(rank, in_features, out_features)
    check_choice("projection", projection, (None, *PROJECTIONS))
    if statistics is None and projection not in (None, "weight"):
        raise ValueError(
            f"projection={projection!r} needs statistics, such as covariances['name']; without them the factors are "
            "the truncated SVD, projection='weight'."
        )
    if projection == "loss" and statistics is not None and statistics.output_gradients is None:
        raise ValueError(
            "projection='loss' needs output gradients, which statistics lack; use calibrate(..., sensitivity=...), or "
            "projection='output'."
        )
    if statistics is None:
        weight = weight_matrix(layer)
        none = Moments.zeros((*weight.shape[:-2], in_features), torch.float64, weight.device)
        statistics, projection, centered = LayerStatistics("input", none), "weight", False
    if projection is None:
        projection = "output" if statistics.output_gradients is None else "loss"
    spaces = LayerSubspaces.of_layer(layer, statistics, centered=centered)
    rows, features = statistics.activations.count, min(in_features, out_features)
    if projection != "weight" and rows < features:
        warn_of_few_rows([f"{type(layer).__name__} ({rows:,} of {features:,})"])
    factors = rounded(factorize(spaces, rank, projection), spaces, spaces.dtype)
    return stored_as(factors, spaces, PLAIN, 0.0, 0.0, pivoted=True) if pivoted else factors


def check_rank(rank: int, in_features: int, out_features: int) -> None:
    """Raise ValueError unless ``rank`` is an integer in [0, min(in_features, out_features)]."""
    largest = min(in_features, out_features)
    if largest < 0:
        raise ValueError(f"in_features and out_features must not be negative; got {in_features} and {out_features}.")
    if isinstance(rank, bool) or not isinstance(rank, int) or not 0 <= rank <= largest:
        raise ValueError(
            f"rank must be an integer in [0, {largest}] for {in_features} -> {out_features} features; got {rank!r}."
        )


def initialize(down: Tensor, up: Tensor, bias: Tensor | None, rank: int, fan_in: int) -> None:
    """Uniform factors whose product has entries of variance 1 / (3 fan_in), as the default of ``nn.Linear`` has.

    Args:
        down: (..., stored_rank, fan_in); zero from row ``rank`` on.
        up: (out_features, stored_rank); zero from column ``rank`` on.
        bias: (out_features,) or None.
        rank: the true rank.
        fan_in: input features of one group.
    """
    fan_in = max(fan_in, 1)
    bound = (9 / max(rank, 1) / (3 * fan_in)) ** 0.25
    for factor in (down, up):
        factor.uniform_(-bound, bound)
    down[..., rank:, :] = 0
    up[..., rank:] = 0
    if bias is not None:
        bias.uniform_(-(fan_in**-0.5), fan_in**-0.5)


def copy_flags(layer: Layer, source: nn.Module) -> Layer:
    """Copy training and gradient flags: float factors follow the weight of ``source``, the bias follows its bias."""
    flags = {name: parameter.requires_grad for name, parameter in source.named_parameters(recurse=False)}
    weight = any(flag for name, flag in flags.items() if name != "bias")
    for name, parameter in layer.named_parameters(recurse=False):
        parameter.requires_grad_(flags.get("bias", weight) if name == "bias" else weight and parameter.itemsize > 1)
    return layer.train(source.training)
