"""How far to compress and how: rank policies and the configuration, frozen dataclasses with versioned JSON."""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from .arguments import checked
from .files import parse_json, replacing

FORMAT_VERSION = 2
LATENCIES_VERSION = 1
PROJECTIONS = ("output", "loss", "utilized", "input", "weight")
ALLOCATIONS = ("uniform", "variance", "loss")
RECONSTRUCTIONS = (None, "sequential", "blocks")
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


@dataclass(frozen=True)
class ParameterBudget:
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

    def __post_init__(self) -> None:
        check_share("fraction", self.fraction)
        check_allocation(self.allocation)


@dataclass(frozen=True)
class FlopBudget:
    """All considered layers together keep at most ``fraction`` of their multiply-accumulates (MACs).

    A layer's MACs are the elements of its weight times the rows that calibration saw, so layers that run at many
    positions, or several times per forward, count accordingly.

    Args:
        fraction: share of the MACs in (0, 1]; met exactly or from below.
        allocation: as in :class:`ParameterBudget`, per MAC.
    """

    fraction: float
    allocation: str | None = None

    def __post_init__(self) -> None:
        check_share("fraction", self.fraction)
        check_allocation(self.allocation)


@dataclass(frozen=True)
class ByteBudget:
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
        check_share("fraction", self.fraction)
        check_choice("form", self.form, tuple(EIGHT_BIT))
        check_allocation(self.allocation)


@dataclass(frozen=True)
class LatencyCurve:
    """Seconds of one call of a layer.

    Attributes:
        dense: of the layer as it is.
        ranks: stored ranks at which its replacement was timed, rising; at least one.
        seconds: of the replacement at each of them.
    """

    dense: float
    ranks: tuple[int, ...]
    seconds: tuple[float, ...]

    def at(self, rank: int | None) -> float:
        """Seconds at a stored rank, interpolated linearly between the two nearest ones; of the dense layer for None."""
        if rank is None:
            return self.dense
        if len(self.ranks) == 1:
            return self.seconds[0]
        right = min(max(bisect_left(self.ranks, rank), 1), len(self.ranks) - 1)
        (x0, x1), (y0, y1) = self.ranks[right - 1 : right + 1], self.seconds[right - 1 : right + 1]
        return max(0.0, y0 + (y1 - y0) * (rank - x0) / (x1 - x0))


@dataclass(frozen=True)
class LayerLatencies:
    """How long the layers of a model take, from :func:`lowrank_ops.measure_latency`.

    Attributes:
        device: name of the device.
        threads: number of torch's CPU threads.
        curves: ``{"Linear 768 -> 3072, 16 x 197 x 768, float32": LatencyCurve}``, one for each distinct call.
        layers: ``{fqn: {curve: calls in one forward}}``.
    """

    device: str
    threads: int
    curves: Mapping[str, LatencyCurve]
    layers: Mapping[str, Mapping[str, int]]

    def seconds(self, fqn: str, rank: int | None) -> float:
        """Seconds of all calls of a layer in one forward, at a stored rank or dense.

        Raises:
            KeyError: a layer that was not timed.
        """
        return sum(calls * self.curves[name].at(rank) for name, calls in self.layers[fqn].items())

    @checked()
    def total(self, ranks: Mapping[str, int | None]) -> float:
        """Seconds of all layers named, each at its stored rank."""
        return sum(self.seconds(fqn, rank) for fqn, rank in ranks.items())

    def to_dict(self) -> dict[str, Any]:
        """The times as plain JSON types."""
        return {"version": LATENCIES_VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LayerLatencies:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: values of another version, or that are not latencies.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"values must be a JSON object; got {type(values).__name__}.")
        if values.get("version", LATENCIES_VERSION) != LATENCIES_VERSION:
            raise ValueError(f"version must be {LATENCIES_VERSION}; got {values['version']!r}. Update lowrank_ops.")
        try:
            curves = {
                name: LatencyCurve(float(curve["dense"]), tuple(curve["ranks"]), tuple(curve["seconds"]))
                for name, curve in values["curves"].items()
            }
            layers = {fqn: dict(calls) for fqn, calls in values["layers"].items()}
            unknown = {name for calls in layers.values() for name in calls} - set(curves)
            if unknown or any(not 0 < len(curve.ranks) == len(curve.seconds) for curve in curves.values()):
                raise ValueError("not the latencies of layers: layers name curves that are missing or empty.")
            _check_latencies(curves, layers)
            return cls(values["device"], values["threads"], curves, layers)
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"not the latencies of layers: {type(error).__name__} {error}.") from None

    @checked()
    def save(self, path: str | Path) -> None:
        """Write the times to a JSON file."""
        with replacing(Path(path)) as (file,):
            file.write(json.dumps(self.to_dict(), indent=1).encode() + b"\n")

    @classmethod
    @checked()
    def load(cls, path: str | Path) -> LayerLatencies:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: no such content.
        """
        try:
            return cls.from_dict(parse_json(Path(path).read_bytes()))
        except ValueError as error:
            raise ValueError(f"{str(path)!r} does not hold the latencies of layers: {error}") from None


@dataclass(frozen=True)
class LatencyBudget:
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
        check_share("fraction", self.fraction)
        if isinstance(self.latencies, Mapping):  # from JSON
            object.__setattr__(self, "latencies", LayerLatencies.from_dict(self.latencies))
        if not isinstance(self.latencies, LayerLatencies):
            raise TypeError(
                f"latencies must come from measure_latency(model, batch) or LayerLatencies.load; got "
                f"{type(self.latencies).__name__}."
            )
        check_allocation(self.allocation)


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
        _check_names("ranks", self.ranks)
        _check_names("channels", self.channels)


RankPolicy = ExplainedVariance | ParameterBudget | FlopBudget | ByteBudget | LatencyBudget | UniformRank | Ranks
_POLICIES: dict[str, type[RankPolicy]] = {
    "explained_variance": ExplainedVariance,
    "parameter_budget": ParameterBudget,
    "flop_budget": FlopBudget,
    "byte_budget": ByteBudget,
    "latency_budget": LatencyBudget,
    "uniform_rank": UniformRank,
    "ranks": Ranks,
}


@dataclass(frozen=True)
class CompressionConfig:
    """How :func:`lowrank_ops.compress_` chooses ranks and factors.

    Args:
        rank: the policy that chooses a rank per layer, or an int, one rank for all layers where it saves parameters.
        projection: ``"output"``: output principal components, the minimum output error at a given rank. ``"loss"``:
            the minimum error in the metric of the output gradients (layers without output gradients get ``"output"``,
            and the report says so). ``"utilized"``: W' = P_T W P_S of Garg et al. 2024. For comparison: ``"input"``,
            input principal components, W' = W P_S, and ``"weight"``, the truncated SVD of the weight, which ignores
            the data. None: ``"loss"`` if there are output gradients, else ``"output"``.
        centered: use the covariance about the mean and fold the mean into the bias, which for ``"output"`` never
            increases the output error; False uses the second moment and leaves the bias unchanged.
        overrides: ``{fqn or "re:pattern": rank}``, which takes precedence over the policy; None keeps a layer dense.
        reconstruction: ``"sequential"`` fits the factors, layer by layer, to the dense model's outputs, given the
            compressed model's inputs; needs ``compress_(..., reconstruction=SequentialReconstruction(batches))``,
            which also sets it. ``"blocks"`` trains the factors of one block at a time, by
            ``BlockReconstruction(batches)``.
        bounds: ``{fqn or "re:pattern": (min, max)}``, ranks that the policy stays within; a ``max`` of None is no
            bound, and the layer may stay dense. ``overrides`` and ``Ranks`` are not bounded.
        pivoted: store rows of each linear layer's weight and the coefficients of its other rows, by
            :class:`lowrank_ops.layers.PivotedLinear`: the same function with rank^2 parameters and as many MACs per
            row fewer, so a budget allows larger ranks. Rounding errors are 2 to 4 times those of two factors, and the
            fused kernels do not run these layers. With a :class:`ByteBudget` their factors can be 8-bit. Convolutions,
            and layers where rank^2 is below the number of outputs, whose order is stored as well, keep two factors.
        group: layers of one module that receive the same tensor, such as q, k and v, or gate and up, become low-rank
            all or none, and compute their outputs together where kernels do that (:func:`lowrank_ops.layers.group_`).
            Each layer keeps factors, ranks and names of its own. Layers that ``overrides`` or ``Ranks`` leave dense are
            in no group.
        channels: drop channels of MLPs instead of factorizing their layers. Channels are the features between the
            layers that compute them (such as gate and up) and the ``nn.Linear`` that reads them, the consumer (such as
            down). The layers stay dense, with fewer features. Channels are dropped one by one, each time the one whose
            loss (or output error, by ``projection``) is smallest after the weights of the others are updated. True: all
            MLPs, found by running their modules on random inputs; other layers get factors. Code outside such a module
            must not use its channels: that is not verified. A sequence: names and "re:" patterns of consumers. In
            ``overrides`` and ``bounds``, the consumer stands for its MLP, and the values are numbers of channels. Needs
            a :class:`ParameterBudget`, a :class:`FlopBudget` or :class:`Ranks`, whose own ``channels`` are used
            instead.

    Example:
        >>> import lowrank_ops as lro
        >>> config = lro.CompressionConfig(lro.ParameterBudget(0.5), overrides={"head": None})
        >>> lro.CompressionConfig.from_json(config.to_json()) == config
        True
    """

    rank: RankPolicy = field(default_factory=lambda: ParameterBudget(0.5))
    projection: str | None = None
    centered: bool = True
    overrides: Mapping[str, int | None] = field(default_factory=dict)
    reconstruction: str | None = None
    bounds: Mapping[str, tuple[int, int | None]] = field(default_factory=dict)
    pivoted: bool = False
    group: bool = False
    channels: bool | Sequence[str] = False

    def __post_init__(self) -> None:
        _check_names("overrides", self.overrides)
        _check_names("bounds", self.bounds)
        object.__setattr__(self, "bounds", {name: check_bound(name, pair) for name, pair in self.bounds.items()})
        rank: object = self.rank
        if isinstance(rank, int) and not isinstance(rank, bool):
            object.__setattr__(self, "rank", UniformRank(rank))
        if not isinstance(self.rank, tuple(_POLICIES.values())):
            accepted = ", ".join(policy.__name__ for policy in _POLICIES.values())
            raise TypeError(f"rank must be an int or one of {accepted}; got {self.rank!r}.")
        check_choice("projection", self.projection, (None, *PROJECTIONS))
        for name, value in (("centered", self.centered), ("pivoted", self.pivoted), ("group", self.group)):
            if not isinstance(value, bool):
                raise TypeError(f"{name} must be a bool; got {value!r}.")
        if self.pivoted and isinstance(self.rank, LatencyBudget):
            raise ValueError(
                "pivoted=True does not go with a LatencyBudget, because measure_latency times layers of two factors; "
                "use a ParameterBudget or a FlopBudget."
            )
        if self.pivoted and self.group:
            raise ValueError(
                "pivoted=True does not go with group=True, because the kernels of groups take two factors per layer; "
                "choose one of the two."
            )
        if self.group and isinstance(self.rank, ByteBudget):
            raise ValueError("group=True does not go with a ByteBudget: no kernels run groups of 8-bit factors.")
        check_choice("reconstruction", self.reconstruction, RECONSTRUCTIONS)
        self._check_channels()
        if self.reconstruction is not None and self.projection == "weight":
            raise ValueError("reconstruction fits the data and projection='weight' ignores it; choose one of the two.")

    def _check_channels(self) -> None:
        if not isinstance(self.channels, bool):
            object.__setattr__(self, "channels", check_channels(self.channels))
        if not self.channels_of:
            return
        if not isinstance(self.rank, ParameterBudget | FlopBudget | Ranks):
            raise ValueError(
                f"channels does not go with {type(self.rank).__name__}; use a ParameterBudget, a FlopBudget or Ranks."
            )
        if self.projection not in (None, "loss", "output"):
            raise ValueError(f"channels needs projection='loss' or 'output'; got {self.projection!r}.")
        if self.reconstruction == "sequential":
            raise ValueError(
                "channels does not go with reconstruction='sequential', which fits factors; use 'blocks', or none: the "
                "weight of the layer that reads the channels is updated in any case."
            )

    @property
    def channels_of(self) -> bool | Sequence[str]:
        """The MLPs whose channels are dropped: all, or those of these names."""
        return tuple(self.rank.channels) if isinstance(self.rank, Ranks) else self.channels

    @classmethod
    def of(cls, value: object) -> CompressionConfig:
        """A configuration from itself, a policy, an int, or None for the defaults.

        Raises:
            TypeError: anything else.
        """
        if value is None:
            return cls()
        if isinstance(value, cls):
            return value
        if isinstance(value, (int, *_POLICIES.values())) and not isinstance(value, bool):
            return cls(value)  # type: ignore[arg-type]
        raise TypeError(
            "config must be a CompressionConfig, a rank policy such as ParameterBudget(0.5), or an int, one rank for "
            f"all layers; got {type(value).__name__}."
        )

    def resolved(self, some_gradients: bool, all_gradients: bool) -> CompressionConfig:
        """The configuration with its open choices filled in, by whether some or all layers have output gradients."""
        projection = self.projection or ("loss" if some_gradients else "output")
        rank = self.rank
        if isinstance(rank, ParameterBudget | FlopBudget | ByteBudget | LatencyBudget) and rank.allocation is None:
            rank = replace(rank, allocation="loss" if all_gradients else "uniform")
        return replace(self, rank=rank, projection=projection)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain JSON types."""
        name = next(name for name, policy in _POLICIES.items() if type(self.rank) is policy)
        return {
            "version": FORMAT_VERSION,
            "rank": {"policy": name, **asdict(self.rank)},  # type: ignore[arg-type]
            "projection": self.projection,
            "centered": self.centered,
            "overrides": dict(self.overrides),
            "reconstruction": self.reconstruction,
            "bounds": {name: list(pair) for name, pair in self.bounds.items()},
            "pivoted": self.pivoted,
            "group": self.group,
            "channels": self.channels if isinstance(self.channels, bool) else list(self.channels),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CompressionConfig:
        """The inverse of :meth:`to_dict`; also reads version 1.

        Raises:
            ValueError: an unknown version, policy or field.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"a compression configuration must be a JSON object; got {type(values).__name__}.")
        values = dict(values)
        version = values.pop("version", None)
        if version not in (1, FORMAT_VERSION):
            raise ValueError(
                f"version must be 1 or {FORMAT_VERSION}; got {version!r}. Update lowrank_ops for newer files."
            )
        try:
            policy = dict(values.pop("rank"))
            name = policy.pop("policy")
            if version == 1:
                values = {"projection": "output", "reconstruction": values.pop("refit", None), **values}
                if name in ("parameter_budget", "flop_budget", "latency_budget"):
                    allocation = policy.get("allocation", "uniform")
                    policy["allocation"] = "variance" if allocation == "energy" else allocation
            check_choice("policy", name, tuple(_POLICIES))
            return cls(rank=_POLICIES[name](**policy), **values)
        except KeyError as error:
            raise ValueError(f"not a compression configuration: the field {error} is missing.") from None
        except TypeError as error:
            reason = str(error).rstrip(".")
            raise ValueError(f"not a compression configuration of version {version}: {reason}.") from None

    def to_json(self) -> str:
        """The configuration as a JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    @checked()
    def from_json(cls, text: str) -> CompressionConfig:
        """The inverse of :meth:`to_json`.

        Raises:
            ValueError: as for :meth:`from_dict`, or the text is not JSON.
        """
        try:
            values = parse_json(text)
        except ValueError as error:
            raise ValueError(f"not a compression configuration: {error}.") from None
        return cls.from_dict(values)


def _check_latencies(curves: Mapping[str, LatencyCurve], layers: Mapping[str, Mapping[str, int]]) -> None:
    """Raise ValueError for times, ranks and numbers of calls that :func:`lowrank_ops.measure_latency` does not give."""
    for name, curve in curves.items():
        times, ranks = (curve.dense, *curve.seconds), curve.ranks
        if not all(type(value) in (int, float) and 0 <= float(value) < math.inf for value in times):
            raise ValueError(f"not the latencies of layers: {name!r} has times {times!r}.")
        if not all(type(rank) is int and 0 <= rank < 2**31 for rank in ranks) or list(ranks) != sorted(set(ranks)):
            raise ValueError(f"not the latencies of layers: {name!r} has ranks {ranks!r}, which must be rising.")
    for fqn, calls in layers.items():
        if not all(type(count) is int and 0 < count < 2**31 for count in calls.values()):
            raise ValueError(f"not the latencies of layers: {fqn!r} has calls {calls!r}.")


def _check_names(name: str, value: object) -> None:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise TypeError(f'{name} must be a mapping {{fqn or "re:pattern": rank}} with strings for keys; got {value!r}.')


def check_bound(name: str, pair: Any) -> tuple[int, int | None]:
    """``pair`` as a tuple; ValueError unless it is ``(min, max)``."""
    if isinstance(pair, (tuple, list)) and len(pair) == 2:
        low, high = pair
        ranks = [low] if high is None else [low, high]
        whole = all(isinstance(rank, int) and not isinstance(rank, bool) for rank in ranks)
        if whole and low >= 0 and (high is None or high >= max(1, low)):
            return low, high
    raise ValueError(
        f"bounds[{name!r}] must be (min, max), ranks with 0 <= min <= max and max > 0, or None for no max; "
        f"got {pair!r}."
    )


def check_channels(value: object) -> tuple[str, ...]:
    """``value`` as a tuple; TypeError unless it is a sequence of strings."""
    if isinstance(value, (tuple, list)) and all(isinstance(name, str) for name in value):
        return tuple(value)
    raise TypeError(f'channels must be a bool, or names or "re:" patterns of layers; got {value!r}.')


def check_share(name: str, value: float) -> None:
    """Raise TypeError unless ``value`` is a number, ValueError unless it is in (0, 1]."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 < value <= 1:
        raise (ValueError if number else TypeError)(f"{name} must be a number in (0, 1]; got {value!r}.")


def check_choice(name: str, value: object, accepted: Sequence[object]) -> None:
    """Raise TypeError unless ``value`` is a string or None, ValueError unless it is among the accepted names."""
    named = value is None or isinstance(value, str)
    if not named or value not in accepted:
        raise (ValueError if named else TypeError)(
            f"{name} must be one of {', '.join(map(repr, accepted))}; got {value!r}."
        )


def check_allocation(allocation: object) -> None:
    """Raise ValueError unless ``allocation`` is one of ``ALLOCATIONS`` or None."""
    check_choice("allocation", allocation, (None, *ALLOCATIONS))
