"""LowRankLinear: a drop-in for torch.nn.Linear whose weight is a product of two low-rank factors."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from ..arguments import check_choice, checked
from ..calibration.statistics import LayerStatistics
from ..factors.eight_bit import DTYPES, empty_quantized, quantized
from ..factors.projections import Factors
from ..models.layers import dimensions, has_transposed_weight
from ..models.old_optimizers import note_replaced
from ..ops import lowrank_linear
from ..ops.linear.reference import dequantized
from ..ranks.costs import Formats
from ._base import LowRankLayer, check_rank, copy_flags, factorize_layer, initialize

if TYPE_CHECKING:
    from .group import LowRankGroup


class LowRankLinear(LowRankLayer):
    """``y = (x down^T) up^T + bias``, a drop-in for ``torch.nn.Linear``.

    The parameters are ``down`` (stored_rank, in_features), ``up`` (out_features, stored_rank) and ``bias``
    (out_features,) or None. ``stored_rank`` is ``rank`` rounded up to a multiple of 8, so that every kernel can run
    the layer. The padding is zero and receives zero gradients, so training keeps the rank.

    :meth:`quantize_` makes factors 8-bit; the buffers ``down_scale`` (stored_rank,) and ``up_scale`` (out_features,)
    then hold a float32 scale for each row. They are None otherwise.

    Args:
        in_features: size of the input's last dimension.
        out_features: size of the output's last dimension.
        rank: true rank, in [0, min(in_features, out_features)].
        bias: whether to learn a bias.
        device, dtype: of the parameters.

    Raises:
        ValueError: ``rank`` is out of range.

    Example:
        >>> import torch
        >>> import lowrank_ops as lro
        >>> layer = lro.LowRankLinear(64, 32, rank=12)
        >>> layer
        LowRankLinear(in_features=64, out_features=32, rank=12, bias=True)
        >>> tuple(layer.down.shape), tuple(layer.up.shape)
        ((16, 64), (32, 16))
        >>> layer(torch.randn(2, 5, 64)).shape
        torch.Size([2, 5, 32])
    """

    replaced_conv1d: type[nn.Module] | None = None  # transformers' class, where the layer took the place of one
    pivoted: ClassVar[bool] = False  # it stores pivot rows
    group: LowRankGroup | None = None  # of layers with the same input; see group_
    place: int = 0  # in the group
    _dtype: torch.dtype | None = None  # of the layer before its factors became 8-bit

    @checked()
    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_rank(rank, in_features, out_features)
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self._create_parameters(*self._factor_shapes(), out_features if bias else None, device=device, dtype=dtype)
        for name in self.matrices:
            self.register_buffer(f"{name}_scale", None)
        self.reset_parameters()

    def _factor_shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        return (self.stored_rank, self.in_features), (self.out_features, self.stored_rank)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw random factors; the entries of their product have the variance of a new ``nn.Linear``'s weight."""
        self._refuse_eight_bit("reset_parameters")
        initialize(self.down, self.up, self.bias, self.rank, self.in_features)

    @classmethod
    @checked()
    def from_linear(
        cls,
        linear: nn.Module,
        rank: int,
        statistics: LayerStatistics | None = None,
        *,
        projection: str | None = None,
        centered: bool = True,
    ) -> LowRankLinear:
        """Factorize one ``nn.Linear`` or transformers' ``Conv1D``.

        With statistics, ``projection="output"`` minimizes the mean squared output error over the calibration inputs
        by principal components of the output (Zhang et al. 2015, arXiv 1505.06798). Without, the factors are the
        truncated SVD of the weight. Factors are computed in float64 and stored in the dtype of ``linear``.

        Args:
            linear: the layer, of any float dtype and on any device; not changed.
            rank: in [0, min(in_features, out_features)].
            statistics: of the layer, such as ``covariances["name"]`` from :func:`lowrank_ops.calibrate`; None for the
                truncated SVD.
            projection, centered: as in :class:`lowrank_ops.CompressionConfig`.

        Returns:
            A layer with the dtype, device, training and gradient flags of ``linear``.

        Raises:
            TypeError: ``linear`` is not a linear layer, or ``statistics`` is not the statistics of one layer.
            ValueError: ``rank`` is out of range, ``projection`` is unknown, or the statistics are of another layer.

        Example:
            >>> import torch
            >>> import lowrank_ops as lro
            >>> model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU())
            >>> x = torch.randn(256, 4) @ torch.randn(4, 64)  # inputs in a subspace of 4 dimensions
            >>> covariances = lro.calibrate(model, [x])
            >>> layer = lro.LowRankLinear.from_linear(model[0], 4, covariances["0"])
            >>> torch.testing.assert_close(layer(x), model[0](x), atol=1e-4, rtol=1e-4)
        """
        if not isinstance(linear, nn.Linear) and not has_transposed_weight(linear):
            raise TypeError(f"linear must be a torch.nn.Linear; got {type(linear).__name__}.")
        factors = factorize_layer(linear, rank, statistics, projection, centered, pivoted=cls.pivoted)
        return cls.from_factors(linear, factors)

    @classmethod
    def empty_like(cls, dense: nn.Module, rank: int, bias: bool) -> LowRankLinear:
        _, in_features, out_features = dimensions(dense)
        weight = dense.get_parameter("weight")
        layer = nn.utils.skip_init(
            cls, in_features, out_features, rank, bias=bias, device=weight.device, dtype=weight.dtype
        )
        if has_transposed_weight(dense):
            layer.replaced_conv1d = type(dense)
        return copy_flags(layer, dense)

    def forward(self, x: Tensor) -> Tensor:  # (..., in_features) -> (..., out_features)
        if not is_compiling() and self.group is not None and (y := self.group.output(self, x)) is not None:
            return y
        # nn.Module.__getattr__ is slow; read _parameters directly.
        parameters = self._parameters
        if self._dtype is not None:
            (down, down_scale), (up, up_scale) = self._parts()
            return lowrank_linear(x, down, up, self.bias, down_scale=down_scale, up_scale=up_scale)
        if "down" in parameters and "up" in parameters and "bias" in parameters:
            return lowrank_linear(x, parameters["down"], parameters["up"], parameters["bias"])  # type: ignore[arg-type]
        return lowrank_linear(x, self.down, self.up, self.bias)  # parametrized, pruned or sharded

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Let a copy, also by pickle, join the copy of its group."""
        super().__setstate__(state)
        if self.group is not None:
            self.group.join(self)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weight, which is that of the factors unless these are 8-bit."""
        return self._dtype or self._parts()[0][0].dtype

    @property
    def formats(self) -> Formats:
        """``"int8"`` or ``"fp8"`` for each of ``matrices``, ``down`` and ``up``; None for one that is not 8-bit."""
        names = {dtype: name for name, dtype in DTYPES.items()}
        return tuple(None if scale is None else names[part.dtype] for part, scale in self._parts())

    def _parts(self) -> list[tuple[Tensor, Tensor | None]]:
        """The matrices with their scales."""
        return [(getattr(self, name), self._buffers.get(f"{name}_scale")) for name in self.matrices]

    def float_factors(self) -> tuple[Tensor, ...]:
        """``down`` and ``up``, 8-bit ones as tensors of the layer's dtype, computed in every call."""
        dtype = self._dtype or torch.float32  # not used without scales
        return tuple(dequantized(part, scale, dtype) for part, scale in self._parts())

    @torch.no_grad()
    @checked()
    def quantize_(self, form: str = "int8", *, down: bool = True, up: bool = True) -> LowRankLinear:
        """Round the factors to 8 bits with a scale for each of their rows, in place.

        8-bit factors are parameters without gradients; gradients of the input and of the bias are as before, so an
        adapter can be trained on top. Casts such as ``layer.half()`` leave 8-bit factors and scales as they are.

        Args:
            form: ``"int8"``, or ``"fp8"``, which is float8_e4m3fn: its error is about three times as large, and
                Triton's kernels run it from compute capability 8.9 on.
            down, up: whether to round each factor.

        Returns:
            The layer.

        Raises:
            ValueError: the factors are 8-bit already, are parametrized, or hold NaN or inf; or ``form`` is unknown. The
                layer is unchanged.

        Example:
            >>> import lowrank_ops as lro
            >>> lro.LowRankLinear(64, 32, rank=12).quantize_("int8")
            LowRankLinear(in_features=64, out_features=32, rank=12, bias=True, down=int8, up=int8)
        """
        check_choice("form", form, tuple(DTYPES))
        self._set_quantized(self._quantized((form if down else None, form if up else None)))
        return self

    def _quantized(self, formats: Formats) -> dict[str, tuple[Tensor, Tensor]]:
        """Values and scales of the matrices that have a format, by name."""
        self._refuse_eight_bit("quantize_")
        if not self._parameters.keys() >= {*self.matrices}:
            raise ValueError("the factors are parametrized; call torch.nn.utils.parametrize.remove_parametrizations.")
        named = zip(self.matrices, formats, strict=True)
        return {name: quantized(self.get_parameter(name).detach(), form) for name, form in named if form is not None}

    def set_formats_(self, formats: Formats) -> None:
        """Replace the factors by 8-bit ones without content, for a state dict that is loaded next."""
        named = zip(self.matrices, formats, strict=True)
        self._set_quantized(
            {name: empty_quantized(self.get_parameter(name).detach(), form) for name, form in named if form is not None}
        )

    def follow_dtype_(self, dtype: torch.dtype | None = None) -> None:
        """Take the dtype of a factor that is not 8-bit, or of the bias, or ``dtype``, after tensors were replaced.

        transformers gives each parameter of a floating-point dtype a gradient, also those in fp8.
        """
        if self._dtype is not None:
            for factor, scale in self._parts():
                factor.requires_grad_(factor.requires_grad and scale is None)
            pairs = [*self._parts(), (self.bias, None)]
            others = [tensor.dtype for tensor, scale in pairs if tensor is not None and scale is None]
            self._dtype = (*others, dtype or self._dtype)[0]

    def _set_quantized(self, parts: dict[str, tuple[Tensor, Tensor]]) -> None:
        """Take what :meth:`_quantized` returned."""
        self._dtype = self.dtype if parts else None
        for name, (values, scale) in parts.items():
            note_replaced([self.get_parameter(name)])
            setattr(self, name, nn.Parameter(values, requires_grad=False))
            setattr(self, f"{name}_scale", scale)

    @torch.no_grad()
    def dequantize_(self) -> LowRankLinear:
        """Replace 8-bit factors by parameters of the layer's dtype, which can be trained, in place.

        Example:
            >>> import lowrank_ops as lro
            >>> layer = lro.LowRankLinear(64, 32, rank=12).quantize_()
            >>> layer.dequantize_().down.dtype
            torch.float32
        """
        for name, factor, form in zip(self.matrices, self.float_factors(), self.formats, strict=True):
            if form is not None:
                note_replaced([self.get_parameter(name)])
                setattr(self, name, nn.Parameter(factor))
                setattr(self, f"{name}_scale", None)
        self._dtype = None
        return self

    def _refuse_eight_bit(self, operation: str) -> None:
        if self._dtype is not None:
            raise ValueError(f"{operation} needs factors that are not 8-bit; call dequantize_ first.")

    def filled_with(self, factors: Factors) -> LowRankLinear:
        """The same layer, with the values of ``factors``, in their formats."""
        self._refuse_eight_bit("filled_with")
        super().filled_with(factors)
        self._set_quantized(self._quantized(factors.formats))
        return self

    def _like_weight(self, part: Tensor) -> Tensor:
        return part if self._dtype is None else torch.empty(0, dtype=self._dtype, device=part.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LowRankLinear:
        """Casts reach float factors and the bias; 8-bit factors, scales and other buffers only change their device."""
        kept = {id(tensor) for tensor in self._buffers.values() if tensor is not None}
        if not kept:
            return super()._apply(fn, recurse)
        pairs = self._parts()
        kept |= {id(factor) for factor, scale in pairs if scale is not None}

        def applied(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return tensor.to(result.device) if id(tensor) in kept and result.dtype != tensor.dtype else result

        if self._dtype is not None:
            self._dtype = fn(torch.empty(0, dtype=self._dtype, device=pairs[0][0].device)).dtype
        return super()._apply(applied, recurse)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        errors = args[-1]
        for name in self.matrices:
            given, held = state_dict.get(prefix + name), self._parameters.get(name)
            dtypes = [tensor.dtype for tensor in (given, held) if isinstance(tensor, Tensor)]
            if len(set(dtypes)) == 2 and not set(dtypes).isdisjoint(DTYPES.values()):
                errors.append(
                    f"{prefix}{name} is {dtypes[0]} in the state dict and {dtypes[1]} in the model; call quantize_ "
                    "with the same form, or dequantize_, before the state dict is loaded."
                )
        if not errors:
            super()._load_from_state_dict(state_dict, prefix, *args)

    def factors(self) -> tuple[Tensor, Tensor | None, Tensor | None] | None:
        """Down, up and bias, if a call of this layer computes only their product; None for a subclass.

        Also None for 8-bit factors, except while compiling: then they are dequantized.
        """
        plain = type(self) is LowRankLinear and {"down", "up", "bias"} <= self._parameters.keys()
        if not plain or (self._dtype is not None and not is_compiling()):
            return None
        down, up = self.float_factors()
        return down, up, self.bias

    def product(self) -> Tensor:
        """The product (out_features, in_features), computed in every call."""
        down, up = self.float_factors()
        return up @ down

    def to_dense(self) -> nn.Linear:
        """An ``nn.Linear`` with the product as its weight and the same dtype, device and flags.

        Example:
            >>> import torch
            >>> import lowrank_ops as lro
            >>> layer = lro.LowRankLinear(64, 32, rank=12)
            >>> layer.to_dense()
            Linear(in_features=64, out_features=32, bias=True)
            >>> x = torch.randn(5, 64)
            >>> torch.testing.assert_close(layer.to_dense()(x), layer(x))
        """
        return self._fill_dense(
            nn.utils.skip_init(
                nn.Linear,
                self.in_features,
                self.out_features,
                bias=self.bias is not None,
                device=self._parts()[0][0].device,
                dtype=self.dtype,
            )
        )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"bias={self.bias is not None}"
            + "".join(f", {name}={form}" for name, form in zip(self.matrices, self.formats, strict=True) if form)
        )
