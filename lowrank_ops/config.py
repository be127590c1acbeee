"""What to compress and how far: frozen dataclasses that go to and from versioned JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

FORMAT_VERSION = 1
PROJECTIONS = ("output", "utilized", "weight")
ALLOCATIONS = ("uniform", "energy")


@dataclass(frozen=True)
class ExplainedVariance:
    """Each layer keeps its utilized rank: the directions that hold ``threshold`` of the variance.

    Args:
        threshold: share of the variance in (0, 1]; 1 keeps every direction that is numerically not zero.
    """

    threshold: float = 0.99

    def __post_init__(self) -> None:
        _check_share("threshold", self.threshold)


@dataclass(frozen=True)
class ParameterBudget:
    """All considered layers together keep at most ``fraction`` of their parameters.

    Args:
        fraction: share of the parameters of the considered layers in (0, 1]; met exactly or from below.
        allocation: ``"uniform"`` gives every layer the same share; ``"energy"`` gives parameters where they
            save the largest share of a layer's output variance.
    """

    fraction: float
    allocation: str = "uniform"

    def __post_init__(self) -> None:
        _check_share("fraction", self.fraction)
        _check_choice("allocation", self.allocation, ALLOCATIONS)


@dataclass(frozen=True)
class Ranks:
    """Ranks by hand: ``{fqn or "re:pattern": rank}``; layers that are not named stay dense."""

    ranks: Mapping[str, int]


RankPolicy = ExplainedVariance | ParameterBudget | Ranks
_POLICIES: dict[str, type[ExplainedVariance] | type[ParameterBudget] | type[Ranks]] = {
    "explained_variance": ExplainedVariance,
    "parameter_budget": ParameterBudget,
    "ranks": Ranks,
}


@dataclass(frozen=True)
class CompressionConfig:
    """How :func:`lowrank_ops.compress_` chooses ranks and factors.

    Args:
        rank: the policy that chooses a rank per layer.
        projection: ``"output"``, output principal components, the least output error at a given rank;
            ``"utilized"``, W' = P_T W P_S of Garg et al. 2024; ``"weight"``, the truncated SVD of the weight,
            which ignores the data and is there to compare with.
        centered: use the covariance about the mean and fold the mean into the bias (never a larger output
            error); False uses the second moment and leaves the bias as it is.
        overrides: ``{fqn or "re:pattern": rank}``, which wins over the policy; a rank of None keeps a layer dense.
    """

    rank: RankPolicy = field(default_factory=ExplainedVariance)
    projection: str = "output"
    centered: bool = True
    overrides: Mapping[str, int | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.rank, tuple(_POLICIES.values())):
            accepted = ", ".join(policy.__name__ for policy in _POLICIES.values())
            raise TypeError(f"rank must be one of {accepted}; got {self.rank!r}.")
        _check_choice("projection", self.projection, PROJECTIONS)
        if not isinstance(self.centered, bool):
            raise TypeError(f"centered must be a bool; got {self.centered!r}.")

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain JSON types."""
        name = next(name for name, policy in _POLICIES.items() if type(self.rank) is policy)
        return {
            "version": FORMAT_VERSION,
            "rank": {"policy": name, **asdict(self.rank)},
            "projection": self.projection,
            "centered": self.centered,
            "overrides": dict(self.overrides),
        }

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
            _check_choice("policy", name, tuple(_POLICIES))
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


def _check_share(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
        raise ValueError(f"{name} must be a number in (0, 1]; got {value!r}.")


def _check_choice(name: str, value: str, accepted: tuple[str, ...]) -> None:
    if value not in accepted:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, accepted))}; got {value!r}.")
