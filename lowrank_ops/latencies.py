"""Measured times of layers, as data with versioned JSON; ``layers/latency.py`` measures them."""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .arguments import checked
from .files import parse_json, write_whole

FORMAT_VERSION = 1


@dataclass(frozen=True)
class LatencyCurve:
    """Seconds of one call of a layer.

    Attributes:
        dense: of the layer as it is.
        ranks: stored ranks at which its replacement was timed, ascending; at least one.
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
        return {"version": FORMAT_VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LayerLatencies:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: values of another version, or that are not latencies.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"values must be a JSON object; got {type(values).__name__}.")
        if values.get("version", FORMAT_VERSION) != FORMAT_VERSION:
            raise ValueError(f"version must be {FORMAT_VERSION}; got {values['version']!r}. Update lowrank_ops.")
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
        write_whole(path, json.dumps(self.to_dict(), indent=1).encode() + b"\n")

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


def _check_latencies(curves: Mapping[str, LatencyCurve], layers: Mapping[str, Mapping[str, int]]) -> None:
    """Raise ValueError for times, ranks and numbers of calls that :func:`lowrank_ops.measure_latency` does not give."""
    for name, curve in curves.items():
        times, ranks = (curve.dense, *curve.seconds), curve.ranks
        if not all(type(value) in (int, float) and 0 <= float(value) < math.inf for value in times):
            raise ValueError(f"not the latencies of layers: {name!r} has times {times!r}.")
        if not all(type(rank) is int and 0 <= rank < 2**31 for rank in ranks) or list(ranks) != sorted(set(ranks)):
            raise ValueError(f"not the latencies of layers: {name!r} has ranks {ranks!r}, which must be ascending.")
    for fqn, calls in layers.items():
        if not all(type(count) is int and 0 < count < 2**31 for count in calls.values()):
            raise ValueError(f"not the latencies of layers: {fqn!r} has calls {calls!r}.")
