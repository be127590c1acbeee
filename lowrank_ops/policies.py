"""Policies that choose a rank per layer: what a model may keep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .arguments import check_choice, check_names, check_share
from .latencies import LayerLatencies

ALLOCATIONS = ("uniform", "variance", "loss")
EIGHT_BIT = {"int8": 127.0, "fp8": 448.0}  # 8-bit formats, with their largest magnitudes


@dataclass(frozen=True)
class ExplainedVariance:
    """Each layer keeps its utilized rank: the directions that hold ``threshold`` of the variance.

    Args:
        threshold: share of the variance in (0, 1]; 1 keeps every direction that is numerically nonzero.
    """

    threshold: float = 0.99

    def __post_init__(self) -> None:
        check_share("threshold", self.threshold)


class _Budget:
    """The checks of a budget; its subclasses declare the fields in their order."""

    fraction: float
    allocation: str | None

    def __post_init__(self) -> None:
        check_share("fraction", self.fraction)
        check_choice("allocation", self.allocation, (None, *ALLOCATIONS))


@dataclass(frozen=True)
class ParameterBudget(_Budget):
    """All considered layers together keep at most ``fraction`` of their parameters.

    Args:
        fraction: share of the parameters of the considered layers in (0, 1]; met exactly or from below.
        allocation: how layers share the budget. ``"uniform"``: every layer keeps the same share. ``"variance"``:
            parameters go where each explains the largest share of a layer's output variance. ``"loss"``: where each
            reduces the predicted loss most; needs output gradients (``calibrate(..., sensitivity=...)``). None:
            ``"loss"`` if all layers have output gradients, else ``"uniform"``.

    Example:
        >>> import lowrank_ops as lro
        >>> lro.ParameterBudget(0.5)
        ParameterBudget(fraction=0.5, allocation=None)
    """

    fraction: float
    allocation: str | None = None


@dataclass(frozen=True)
class FlopBudget(_Budget):
    """All considered layers together keep at most ``fraction`` of their multiply-accumulates (MACs).

    A layer's MACs are the elements of its weight times the rows that calibration saw, so layers that run at many
    positions, or several times per forward, count accordingly.

    Args:
        fraction: share of the MACs in (0, 1]; met exactly or from below.
        allocation: as in :class:`ParameterBudget`, per MAC.
    """

    fraction: float
    allocation: str | None = None


@dataclass(frozen=True)
class ByteBudget(_Budget):
    """All considered layers together keep at most ``fraction`` of their bytes, with 8 bits per element where better.

    A layer stays dense, in its dtype or with an 8-bit weight (:class:`lowrank_ops.layers.EightBitLinear`), or gets
    factors, each in its dtype or in 8 bits. Rank and formats are chosen together, and the predicted loss includes that
    of rounding. Convolutions, layers in ``overrides`` and layers whose output was streamed keep their dtype. Ranks may
    exceed the one at which the factors have as many parameters as the dense layer; such a layer saves bytes and takes
    more MACs.

    Args:
        fraction: share of the bytes of the considered layers, in the model's dtype, in (0, 1]; met exactly or from
            below.
        form: of 8-bit factors and weights, ``"int8"`` or ``"fp8"`` (float8_e4m3fn), with a float32 scale per row.
        allocation: as in :class:`ParameterBudget`, per byte. With ``"uniform"``, every factor that can be 8-bit is.

    Example:
        >>> import torch, lowrank_ops as lro
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 64))
        >>> covariances = lro.calibrate(model, [torch.randn(256, 64)])
        >>> report = lro.compress_(model, covariances, lro.ByteBudget(0.25))
        >>> report.layer_bytes / report.layer_bytes_before <= 0.25
        True
        >>> model[0].formats
        ('int8', 'int8')
    """

    fraction: float
    form: str = "int8"
    allocation: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("form", self.form, tuple(EIGHT_BIT))


@dataclass(frozen=True)
class LatencyBudget(_Budget):
    """All considered layers together take at most ``fraction`` of the time of the dense ones, as measured.

    The budget holds for the sum of the layers' measured times, not for the whole model, which does other work as well.
    Ranks are the solution of a multiple-choice knapsack over aligned ranks and dense layers. It is exact up to the
    knapsack's steps, which are at most 1/2000 of what the budget leaves beyond the smallest ranks.

    Args:
        fraction: share of the dense layers' time in (0, 1]; met exactly or from below.
        latencies: from :func:`lowrank_ops.measure_latency`, on the device and with the batch size that matter.
        allocation: as in :class:`ParameterBudget`, per second.
    """

    fraction: float
    latencies: LayerLatencies
    allocation: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.latencies, Mapping):  # from JSON
            object.__setattr__(self, "latencies", LayerLatencies.from_dict(self.latencies))
        if not isinstance(self.latencies, LayerLatencies):
            raise TypeError(
                f"latencies must come from measure_latency(model, batch) or LayerLatencies.load; got "
                f"{type(self.latencies).__name__}."
            )


@dataclass(frozen=True)
class UniformRank:
    """One rank for every layer where it saves parameters; the others stay dense."""

    rank: int

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"rank must be a positive integer; got {self.rank!r}.")


@dataclass(frozen=True)
class Ranks:
    """Ranks by hand: ``{fqn or "re:pattern": rank}``; layers that are not named stay dense.

    Args:
        ranks: by layer.
        channels: number of channels that an MLP keeps, by its consumer, the layer that reads the channels; see
            :class:`CompressionConfig`.
    """

    ranks: Mapping[str, int]
    channels: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_names("ranks", self.ranks)
        check_names("channels", self.channels)


RankPolicy = ExplainedVariance | ParameterBudget | FlopBudget | ByteBudget | LatencyBudget | UniformRank | Ranks
POLICIES: dict[str, type[RankPolicy]] = {
    "explained_variance": ExplainedVariance,
    "parameter_budget": ParameterBudget,
    "flop_budget": FlopBudget,
    "byte_budget": ByteBudget,
    "latency_budget": LatencyBudget,
    "uniform_rank": UniformRank,
    "ranks": Ranks,
}
