"""Measured times of layers, dense and at several ranks: what ``LatencyBudget`` spends."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FORMAT_VERSION = 1


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
        return {"version": FORMAT_VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LayerLatencies:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: values of another version, or no times of layers at all.
        """
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
