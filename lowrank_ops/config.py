"""The configuration of a compression, a frozen dataclass with versioned JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from .arguments import check_choice, check_names, checked
from .files import parse_json
from .policies import POLICIES, ByteBudget, FlopBudget, LatencyBudget, ParameterBudget, RankPolicy, Ranks, UniformRank

FORMAT_VERSION = 2
PROJECTIONS = ("output", "loss", "utilized", "input", "weight")
RECONSTRUCTIONS = (None, "sequential", "blocks")


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
            must not use its channels, which only ``correct_predictions`` and ``measured_ranks`` verify. A sequence:
            names and "re:" patterns of consumers. In ``overrides`` and ``bounds``, the consumer stands for its MLP, and
            the values are numbers of channels. Needs a :class:`ParameterBudget`, a :class:`FlopBudget` or
            :class:`Ranks`, whose own ``channels`` are used instead.

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
        check_names("overrides", self.overrides)
        check_names("bounds", self.bounds)
        object.__setattr__(self, "bounds", {name: check_bound(name, pair) for name, pair in self.bounds.items()})
        rank: object = self.rank
        if isinstance(rank, int) and not isinstance(rank, bool):
            object.__setattr__(self, "rank", UniformRank(rank))
        if not isinstance(self.rank, tuple(POLICIES.values())):
            accepted = ", ".join(policy.__name__ for policy in POLICIES.values())
            raise TypeError(f"rank must be an int or one of {accepted}; got {self.rank!r}.")
        check_choice("projection", self.projection, (None, *PROJECTIONS))
        for name, value in (("centered", self.centered), ("pivoted", self.pivoted), ("group", self.group)):
            if not isinstance(value, bool):
                raise TypeError(f"{name} must be a bool; got {value!r}.")
        if self.pivoted and isinstance(self.rank, LatencyBudget):
            raise ValueError(
                "pivoted=True cannot be combined with a LatencyBudget, because measure_latency times layers of two "
                "factors; use a ParameterBudget or a FlopBudget."
            )
        if self.pivoted and self.group:
            raise ValueError(
                "pivoted=True cannot be combined with group=True, because the kernels of groups take two factors per "
                "layer; choose one of the two."
            )
        if self.group and isinstance(self.rank, ByteBudget):
            raise ValueError(
                "group=True cannot be combined with a ByteBudget, because no kernels run groups of 8-bit factors; "
                "choose one of the two."
            )
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
                f"channels cannot be combined with {type(self.rank).__name__}; use a ParameterBudget, a FlopBudget or "
                "Ranks."
            )
        if self.projection not in (None, "loss", "output"):
            raise ValueError(f"channels needs projection='loss' or 'output'; got {self.projection!r}.")
        if self.reconstruction == "sequential":
            raise ValueError(
                "channels cannot be combined with reconstruction='sequential', which fits factors; use 'blocks', or "
                "none: the weight of the layer that reads the channels is updated in any case."
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
        if isinstance(value, (int, *POLICIES.values())) and not isinstance(value, bool):
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
        name = next(name for name, policy in POLICIES.items() if type(self.rank) is policy)
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
            check_choice("policy", name, tuple(POLICIES))
            return cls(rank=POLICIES[name](**policy), **values)
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
