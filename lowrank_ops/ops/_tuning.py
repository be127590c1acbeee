"""Reads the tuned tables ``tuned/<op>.<arch>.json`` and looks up the entry of the nearest shape.

A table is a JSON object ``{"op", "arch", "device", "entries": [{"shape": {...}, "impl": ..., "config": {...}}]}``,
written by ``python -m benchmarks.tune``. No table ships yet.
"""

from __future__ import annotations

import functools
import inspect
import json
import math
from collections.abc import Callable, Iterable, Mapping
from importlib.resources import files
from typing import Any, TypeVar

_ENTRY_KEYS = {"shape": True, "impl": True, "config": True, "us": False}  # key -> whether it is required

Config = TypeVar("Config")


@functools.cache
def load(op: str, arch: str) -> tuple[dict[str, Any], ...]:
    """The entries of an op's table for an arch such as ``"sm90"``, each with its file as ``"table"``; () without one.

    Raises:
        ValueError: an entry has unknown keys or lacks required ones.
    """
    path = files("lowrank_ops.ops") / "tuned" / f"{op}.{arch}.json"
    if not path.is_file():
        return ()
    listed = json.loads(path.read_text())["entries"]
    entries = tuple({**entry, "table": path} for entry in listed)
    for original, entry in zip(listed, entries, strict=True):
        _check(entry, "", original, _ENTRY_KEYS)
    return entries


def nearest(op: str, arch: str, shape: Mapping[str, Any]) -> dict[str, Any] | None:
    """The entry nearest in shape: equal in every non-number, with the smallest sum of squared log2 ratios.

    Args:
        op: name of the op.
        arch: ``"sm80"``, ``"sm90"`` or ``"sm100"``.
        shape: the dimensions, dtype name and other keys by which the table is indexed.

    Raises:
        ValueError: an entry, or its shape, has unknown keys or lacks required ones.
    """
    best, best_distance = None, math.inf
    keys = dict.fromkeys(shape, False)
    for entry in load(op, arch):
        _check(entry, "shape ", entry["shape"], keys)
        distance = _distance(entry["shape"], shape)
        if distance < best_distance:
            best, best_distance = entry, distance
    return best


def configured(entry: Mapping[str, Any] | None, impl: str, kind: Callable[..., Config]) -> Config | None:
    """An entry's configuration for ``impl``; None if the entry is for another implementation or has no configuration.

    Args:
        entry: from :func:`load` or :func:`nearest`.
        impl: name of the implementation. ``"cuda"`` also matches entries of ``"cuda.decode"``.
        kind: the dataclass of its configurations.

    Raises:
        ValueError: the configuration has keys that ``kind`` does not accept, or lacks required ones.
    """
    if entry is None or not f"{entry['impl']}.".startswith(f"{impl}.") or not entry["config"]:
        return None
    parameters = inspect.signature(kind).parameters.values()
    keys = {parameter.name: parameter.default is parameter.empty for parameter in parameters}
    _check(entry, "config ", entry["config"], keys)
    return kind(**entry["config"])


def _check(entry: Mapping[str, Any], part: str, found: Iterable[str], keys: Mapping[str, bool]) -> None:
    """Check the keys found in a part of an entry against the accepted ones, True for those that are required."""
    found = list(found)
    unknown = [key for key in found if key not in keys]
    missing = [key for key, required in keys.items() if required and key not in found]
    if not unknown and not missing:
        return
    wrong = [f"the unknown {part}key {key!r}" for key in unknown] + [f"no {part}key {key!r}" for key in missing]
    place = f"{entry.get('impl')!r} at the shape {entry.get('shape')}"
    raise ValueError(
        f"{entry['table']}: the entry for {place} has {' and '.join(wrong)}; accepted are {', '.join(keys)}. "
        "Correct it, regenerate the table with python -m benchmarks.tune on a GPU of its arch, or remove the file: "
        "kernels without a tuned table choose their own configuration."
    )


def _distance(have: Mapping[str, Any], want: Mapping[str, Any]) -> float:
    total = 0.0
    for key, value in have.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            total += math.log2((value + 1) / (want[key] + 1)) ** 2
        elif want[key] != value:
            return math.inf
    return total
