"""The layers of several parts of a calibration, and which of their moments are summed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from .statistics import MOMENTS, LayerStatistics, Moments, numbered


class Contents(NamedTuple):
    """What one part holds, without the sums."""

    layers: dict[str, tuple[str, dict[str, int]]]  # side, and the index of each field's moments
    moments: list[tuple[tuple[int, ...], torch.dtype, int, bool]]  # shape of the total, dtype, count, has a shift
    unreached: tuple[str, ...]
    samples: int | None  # of the output gradients; None without
    token_weights: bool

    @classmethod
    def of(cls, layers: Mapping[str, LayerStatistics], unreached: tuple[str, ...]) -> Contents:
        distinct, indices = numbered(layers)
        gradients = [layer.output_gradients for layer in layers.values() if layer.output_gradients is not None]
        return cls(
            {fqn: (layer.side, indices[fqn]) for fqn, layer in layers.items()},
            [(tuple(part.total.shape), part.total.dtype, part.count, part.shift is not None) for part in distinct],
            unreached,
            gradients[0].count if gradients else None,
            any(layer.token_weighted is not None for layer in layers.values()),
        )


class Key(NamedTuple):
    """Moments that are summed."""

    field: str
    indices: tuple[int | None, ...]  # in each part


class Union:
    """The layers of several parts of a calibration, and which of their moments are to be summed.

    Moments that are shared in every part stay shared. Output gradients are counted in samples, in all of which a layer
    that is not reached has the gradient 0.

    Raises:
        ValueError: the parts do not fit together; the message lacks the subject.
    """

    def __init__(self, parts: Sequence[Contents], same_dtype: bool = False) -> None:
        self._parts = parts
        self._keys: dict[str, tuple[str, dict[str, Key]]] = {}
        self.counts: dict[Key, int] = {}
        for what in ("samples", "token_weights"):
            if len({getattr(part, what) in (None, False) for part in parts if part.layers}) > 1:
                name = "output gradients" if what == "samples" else "token weights"
                raise ValueError(f"must all hold {name}, or none")
        samples = sum(part.samples or 0 for part in parts)
        wrong = []
        for fqn in _merged_order([list(part.layers) for part in parts]):
            found = [part.layers[fqn] for part in parts if fqn in part.layers]
            known = all(fqn in part.layers or fqn in part.unreached for part in parts)
            fields = [name for name in MOMENTS if any(name in indices for _, indices in found)]
            keys = {
                name: Key(name, tuple(part.layers.get(fqn, ("", {}))[1].get(name) for part in parts)) for name in fields
            }
            kinds = [self._kinds(key, same_dtype) for key in keys.values()]
            if not known or len({side for side, _ in found}) > 1 or any(len(kind) > 1 for kind in kinds):
                wrong.append(fqn)
                continue
            self._keys[fqn] = (found[0][0], keys)
            for name, key in keys.items():
                rows = sum(parts[i].moments[index][2] for i, index in enumerate(key.indices) if index is not None)
                self.counts[key] = samples if name == "output_gradients" else rows
        if wrong:
            dtypes = ", dtypes" if same_dtype else ""
            raise ValueError(f"must hold the same layers, sides, shapes{dtypes}; they differ at {', '.join(wrong)}")
        reached = self._keys.keys()
        self.unreached = tuple(
            fqn for fqn in _merged_order([list(part.unreached) for part in parts]) if fqn not in reached
        )

    def _kinds(self, key: Key, same_dtype: bool) -> set[Any]:
        found = [part.moments[index] for part, index in zip(self._parts, key.indices, strict=True) if index is not None]
        return {(shape, dtype if same_dtype else None) for shape, dtype, *_ in found}

    def shape_and_dtype(self, key: Key) -> tuple[tuple[int, ...], torch.dtype]:
        """Of the total of summed moments."""
        part, index = next((part, i) for part, i in zip(self._parts, key.indices, strict=True) if i is not None)
        shape, dtype, *_ = part.moments[index]
        return shape, dtype

    def is_shifted(self, key: Key) -> bool:
        """Whether the sums of some part are about a shift."""
        indexed = zip(self._parts, key.indices, strict=True)
        return any(part.moments[index][3] for part, index in indexed if index is not None)

    def layers(self, moments: Mapping[Key, Moments]) -> dict[str, LayerStatistics]:
        """The statistics of every layer, from the summed moments."""
        return {
            fqn: LayerStatistics(side, **{name: moments[key] for name, key in keys.items()})
            for fqn, (side, keys) in self._keys.items()
        }


def _merged_order(orders: Sequence[Sequence[str]]) -> list[str]:
    """All names, each behind the one that it follows in its own order."""
    merged = list(orders[0])
    for order in orders[1:]:
        known = set(merged)
        for before, name in zip([None, *order], order, strict=False):
            if name not in known:
                merged.insert(0 if before is None else merged.index(before) + 1, name)
    return merged
