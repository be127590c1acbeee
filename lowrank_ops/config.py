"""What to compress and how far: frozen dataclasses that go to and from versioned JSON."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FORMAT_VERSION = 1
LATENCIES_VERSION = 1
PROJECTIONS = ("output", "loss", "utilized", "input", "weight")
ALLOCATIONS = ("uniform", "energy", "loss")
SEARCHES = ("budget", "layers")
REFITS = (None, "sequential")


@dataclass(frozen=True)
class ExplainedVariance:
    """Each layer keeps its utilized rank: the directions that hold ``threshold`` of the variance.

    Args:
        threshold: share of the variance in (0, 1]; 1 keeps every direction that is numerically not zero.
    """

    threshold: float = 0.99

    def __post_init__(self) -> None:
        check_share("threshold", self.threshold)


@dataclass(frozen=True)
class ParameterBudget:
    """All considered layers together keep at most ``fraction`` of their parameters.

    Args:
        fraction: share of the parameters of the considered layers in (0, 1]; met exactly or from below.
        allocation: ``"uniform"`` gives every layer the same share; ``"energy"`` gives parameters where they
            save the largest share of a layer's output variance; ``"loss"`` where they save most of the loss, which
            needs covariances with a sensitivity.
    """

    fraction: float
    allocation: str = "uniform"

    def __post_init__(self) -> None:
        check_share("fraction", self.fraction)
        check_choice("allocation", self.allocation, ALLOCATIONS)


@dataclass(frozen=True)
class FlopBudget:
    """All considered layers together keep at most ``fraction`` of their multiplications.

    A layer's multiplications are those of its weight times the rows that calibration saw, so that layers which run at
    many positions, or several times per forward, count accordingly.

    Args:
        fraction: share of the multiplications in (0, 1]; met exactly or from below.
        allocation: as in :class:`ParameterBudget`, per multiplication.
    """

    fraction: float
    allocation: str = "uniform"

    def __post_init__(self) -> None:
        check_share("fraction", self.fraction)
        check_choice("allocation", self.allocation, ALLOCATIONS)


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
        """Seconds at a stored rank, None for the dense layer; on a line through the two nearest points."""
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
        device: that was timed, by its name.
        threads: of torch on the CPU.
        curves: ``{"Linear 768 -> 3072, 16 x 197 x 768, float32": LatencyCurve}``, one for each distinct call.
        layers: ``{fqn: {curve: calls in one forward}}``.
    """

    device: str
    threads: int
    curves: Mapping[str, LatencyCurve]
    layers: Mapping[str, Mapping[str, int]]

    def seconds(self, fqn: str, rank: int | None) -> float:
        """All calls of a layer in one forward, at a stored rank or dense.

        Raises:
            KeyError: a layer that was not timed.
        """
        return sum(calls * self.curves[name].at(rank) for name, calls in self.layers[fqn].items())

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
            ValueError: values of another version, or no times of layers at all.
        """
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
                raise ValueError("not the latencies of layers: curves and layers do not belong together.")
            return cls(values["device"], values["threads"], curves, layers)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not the latencies of layers: {type(error).__name__} {error}.") from None

    def save(self, path: str | Path) -> None:
        """Write the times to a JSON file."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> LayerLatencies:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: no such content.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{str(path)!r} is no JSON text: {error}") from None
        if not isinstance(values, dict):
            raise ValueError(f"{str(path)!r} does not hold the latencies of layers.")
        return cls.from_dict(values)


@dataclass(frozen=True)
class LatencyBudget:
    """All considered layers together take at most ``fraction`` of the time that they take dense, as predicted.

    The sum of the measured times of the layers is what is kept within the budget, not the time of a whole model,
    which does other things as well. The ranks are the solution of a multiple-choice knapsack over aligned ranks and
    dense layers (to within its steps, each at most 1/2000 of what the layers may spend above the least).

    Args:
        fraction: share of the dense layers' time in (0, 1]; met exactly or from below.
        latencies: from :func:`lowrank_ops.measure_latency`, on the device and with the batch size that count.
        allocation: ``"loss"`` keeps as much of the loss as the time allows, which needs covariances with a
            sensitivity; ``"energy"`` the most of the layers' shares of output variance; ``"uniform"`` gives every
            layer the same share of its time.
    """

    fraction: float
    latencies: LayerLatencies
    allocation: str = "loss"

    def __post_init__(self) -> None:
        check_share("fraction", self.fraction)
        if isinstance(self.latencies, Mapping):  # from JSON
            object.__setattr__(self, "latencies", LayerLatencies.from_dict(self.latencies))
        if not isinstance(self.latencies, LayerLatencies):
            raise TypeError(
                f"latencies must come from measure_latency(model, batch) or LayerLatencies.load; got "
                f"{type(self.latencies).__name__}."
            )
        check_choice("allocation", self.allocation, ALLOCATIONS)


@dataclass(frozen=True)
class AccuracyGuided:
    """The smallest model, by a search with trial compressions, whose accuracy stays within a tolerance.

    Args:
        evaluate: ``evaluate(model) -> float``, higher is better; is called with the compressed model many times.
        max_drop: how much less than the dense model's value is accepted, in the units of ``evaluate``.
        search: ``"budget"`` bisects one parameter budget for all layers. With ``allocation="loss"`` that is a
            bisection of one threshold for all layers, on the loss that a parameter saves: the ranks within a
            budget are those of a threshold, filled up with what still fits. ``"layers"`` bisects the rank of one
            layer after another, the largest first, each with a part of the tolerance and those before it
            compressed: up to log2(ranks) evaluations per layer (Garg et al. 2024 choose a threshold per layer).
        allocation: how ``"budget"`` spends, as in :class:`ParameterBudget`.
        evaluations: at most this many for ``"budget"``, the dense model's included.
        journal: file that keeps the accuracy of every trial; a search that finds its trials there does not repeat
            them, be it the same one interrupted or another over the same model. Trials of other weights,
            covariances or projections are refused; that ``evaluate`` is the same is up to you.
    """

    evaluate: Callable[[Any], float]
    max_drop: float
    search: str = "budget"
    allocation: str = "loss"
    evaluations: int = 10
    journal: str | Path | None = None

    def __post_init__(self) -> None:
        if not callable(self.evaluate):
            raise TypeError(f"evaluate must be a function of the model that returns a number; got {self.evaluate!r}.")
        if isinstance(self.max_drop, bool) or not isinstance(self.max_drop, (int, float)) or not self.max_drop >= 0:
            raise ValueError(f"max_drop must be a number that is not negative; got {self.max_drop!r}.")
        check_choice("search", self.search, SEARCHES)
        check_choice("allocation", self.allocation, ALLOCATIONS)
        if isinstance(self.evaluations, bool) or not isinstance(self.evaluations, int) or self.evaluations < 2:
            raise ValueError(f"evaluations must be an integer of at least 2; got {self.evaluations!r}.")
        if self.journal is not None and not isinstance(self.journal, (str, Path)):
            raise TypeError(f"journal must be the path of a file, or None; got {self.journal!r}.")


@dataclass(frozen=True)
class Ranks:
    """Ranks by hand: ``{fqn or "re:pattern": rank}``; layers that are not named stay dense."""

    ranks: Mapping[str, int]

    def __post_init__(self) -> None:
        _check_names("ranks", self.ranks)


_Storable = ExplainedVariance | ParameterBudget | FlopBudget | LatencyBudget | Ranks
RankPolicy = _Storable | AccuracyGuided
_POLICIES: dict[str, type[_Storable]] = {
    "explained_variance": ExplainedVariance,
    "parameter_budget": ParameterBudget,
    "flop_budget": FlopBudget,
    "latency_budget": LatencyBudget,
    "ranks": Ranks,
}


@dataclass(frozen=True)
class CompressionConfig:
    """How :func:`lowrank_ops.compress_` chooses ranks and factors.

    Args:
        rank: the policy that chooses a rank per layer.
        projection: ``"output"``, output principal components, the least output error at a given rank;
            ``"loss"``, the least error in the metric of the loss's gradient, which needs covariances with a
            sensitivity (layers without one get ``"output"``, and the report says so); ``"utilized"``,
            W' = P_T W P_S of Garg et al. 2024; to compare with, ``"input"``, input principal components, W' = W P_S,
            and ``"weight"``, the truncated SVD of the weight, which ignores the data.
        centered: use the covariance about the mean and fold the mean into the bias (never a larger output
            error); False uses the second moment and leaves the bias as it is.
        overrides: ``{fqn or "re:pattern": rank}``, which wins over the policy; a rank of None keeps a layer dense.
        bounds: ``{fqn or "re:pattern": (least, most)}``, ranks that the policy stays within; ``most`` of None is no
            bound, and the layer may stay dense. What is said by hand, in ``overrides`` or ``Ranks``, is not bounded.
            Bounds win over the tolerance of ``AccuracyGuided``.
        refit: ``"sequential"`` fits the factors anew, layer by layer, to the dense model's outputs from the
            compressed model's inputs, which needs batches (:func:`lowrank_ops.refit_factors`); None does not.
    """

    rank: RankPolicy = field(default_factory=ExplainedVariance)
    projection: str = "output"
    centered: bool = True
    overrides: Mapping[str, int | None] = field(default_factory=dict)
    refit: str | None = None
    bounds: Mapping[str, tuple[int, int | None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_names("overrides", self.overrides)
        _check_names("bounds", self.bounds)
        object.__setattr__(self, "bounds", {name: check_bound(name, pair) for name, pair in self.bounds.items()})
        policies = (*_POLICIES.values(), AccuracyGuided)
        if not isinstance(self.rank, policies):
            accepted = ", ".join(policy.__name__ for policy in policies)
            raise TypeError(f"rank must be one of {accepted}; got {self.rank!r}.")
        check_choice("projection", self.projection, PROJECTIONS)
        if not isinstance(self.centered, bool):
            raise TypeError(f"centered must be a bool; got {self.centered!r}.")
        check_choice("refit", self.refit, REFITS)
        if self.refit is not None and self.projection == "weight":
            raise ValueError("refit fits to the data and projection='weight' ignores it; choose one of the two.")

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain JSON types.

        Raises:
            ValueError: the policy is AccuracyGuided, which holds a function.
        """
        if isinstance(self.rank, AccuracyGuided):
            raise ValueError("rank=AccuracyGuided holds a function; the report's config holds the ranks that it found.")
        name = next(name for name, policy in _POLICIES.items() if type(self.rank) is policy)
        values = {
            "version": FORMAT_VERSION,
            "rank": {"policy": name, **asdict(self.rank)},
            "projection": self.projection,
            "centered": self.centered,
            "overrides": dict(self.overrides),
        }
        if self.refit is not None:
            values["refit"] = self.refit
        if self.bounds:
            values["bounds"] = {name: list(pair) for name, pair in self.bounds.items()}
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CompressionConfig:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: an unknown version, policy or field.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"a compression configuration must be a JSON object; got {type(values).__name__}.")
        values = dict(values)
        version = values.pop("version", None)
        if version != FORMAT_VERSION:
            raise ValueError(f"version must be {FORMAT_VERSION}; got {version!r}. Update lowrank_ops for newer files.")
        try:
            policy = dict(values.pop("rank"))
            name = policy.pop("policy")
            check_choice("policy", name, tuple(_POLICIES))
            return cls(rank=_POLICIES[name](**policy), **values)
        except KeyError as error:
            raise ValueError(f"not a compression configuration: the field {error} is missing.") from None
        except TypeError as error:
            raise ValueError(f"not a compression configuration of version {FORMAT_VERSION}: {error}.") from None

    def to_json(self) -> str:
        """The configuration as a JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> CompressionConfig:
        """The inverse of :meth:`to_json`."""
        return cls.from_dict(json.loads(text))


def _check_names(name: str, value: object) -> None:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise TypeError(f'{name} must be a mapping {{fqn or "re:pattern": rank}} with strings for keys; got {value!r}.')


def check_bound(name: str, pair: Any) -> tuple[int, int | None]:
    """The pair, or ValueError where it is not ``(least, most)``."""
    if isinstance(pair, (tuple, list)) and len(pair) == 2:
        least, most = pair
        ranks = [least] if most is None else [least, most]
        whole = all(isinstance(rank, int) and not isinstance(rank, bool) for rank in ranks)
        if whole and least >= 0 and (most is None or most >= max(1, least)):
            return least, most
    raise ValueError(
        f"bounds[{name!r}] must be (least, most), ranks with 0 <= least <= most and most > 0, or None for no largest; "
        f"got {pair!r}."
    )


def check_share(name: str, value: float) -> None:
    """Raise ValueError where ``value`` is no number in (0, 1]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
        raise ValueError(f"{name} must be a number in (0, 1]; got {value!r}.")


def check_choice(name: str, value: object, accepted: Sequence[object]) -> None:
    """Raise ValueError where ``value`` is none of the names accepted."""
    if value not in accepted:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, accepted))}; got {value!r}.")
