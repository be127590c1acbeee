"""Tuned tables: ``tuned/<op>.<arch>.json``, looked up by nearest shape. Nothing is timed here.

A table is a JSON object ``{"op", "arch", "device", "entries": [{"shape": {...}, "impl": ..., "config": {...}}]}``.
"""

from __future__ import annotations

import functools
import inspect
import json
import math
from collections.abc import Callable, Iterable, Mapping
from importlib.resources import files
from typing import Any, TypeVar

_KEYS = {"shape": True, "impl": True, "config": True, "us": False}  # of an entry; whether it must have them

Config = TypeVar("Config")


@functools.cache
def load(op: str, arch: str) -> tuple[dict[str, Any], ...]:
    """The entries of an op's table for an arch such as ``"sm90"``, with their file as ``"table"``; empty without one.

    Raises:
        ValueError: an entry has keys that are not known, or lacks some.
    """
    path = files("lowrank_ops.ops") / "tuned" / f"{op}.{arch}.json"
    if not path.is_file():
        return ()
    listed = json.loads(path.read_text())["entries"]
    entries = tuple({**entry, "table": path} for entry in listed)
    for own, entry in zip(listed, entries, strict=True):
        _check(entry, "", own, _KEYS)
    return entries


def nearest(op: str, arch: str, shape: Mapping[str, Any]) -> dict[str, Any] | None:
    """The entry nearest in shape: equal in every non-number, least in the summed squares of log2 ratios.

    Args:
        op: name of the op.
        arch: ``"sm80"``, ``"sm90"`` or ``"sm100"``.
        shape: the dimensions, dtype name and other keys by which the table is indexed.

    Raises:
        ValueError: an entry has keys that are not known, in its shape for one, or lacks some.
    """
    best, least = None, math.inf
    keys = dict.fromkeys(shape, False)
    for entry in load(op, arch):
        _check(entry, "shape ", entry["shape"], keys)
        distance = _distance(entry["shape"], shape)
        if distance < least:
            best, least = entry, distance
    return best


def configured(entry: Mapping[str, Any] | None, impl: str, kind: Callable[..., Config]) -> Config | None:
    """What a table's entry says of an implementation; None where it speaks of another one, or leaves it its own choice.

    Args:
        entry: of :func:`load` or :func:`nearest`.
        impl: name of the implementation, such as ``"triton"``, which stands for ``"triton.decode"`` as well.
        kind: the dataclass of its configurations.

    Raises:
        ValueError: the configuration has keys that ``kind`` does not take, or lacks some that it needs.
    """
    if entry is None or not f"{entry['impl']}.".startswith(f"{impl}.") or not entry["config"]:
        return None
    parameters = inspect.signature(kind).parameters.values()
    keys = {parameter.name: parameter.default is parameter.empty for parameter in parameters}
    _check(entry, "config ", entry["config"], keys)
    return kind(**entry["config"])


def _check(entry: Mapping[str, Any], part: str, found: Iterable[str], keys: Mapping[str, bool]) -> None:
    """Hold the keys found in a part of an entry against those there are, True for those that must be there."""
    found = list(found)
    unknown = [key for key in found if key not in keys]
    lacking = [key for key, needed in keys.items() if needed and key not in found]
    if not unknown and not lacking:
        return
    wrong = [f"the unknown {part}key {key!r}" for key in unknown] + [f"no {part}key {key!r}" for key in lacking]
    place = f"{entry.get('impl')!r} at the shape {entry.get('shape')}"
    raise ValueError(
        f"{entry['table']}: the entry for {place} has {' and '.join(wrong)}; accepted are {', '.join(keys)}. "
        "Correct it, have python -m benchmarks.tune write the table anew on a GPU of its arch, or remove the file: "
        "kernels that are not tuned take their own choice."
    )


def _distance(have: Mapping[str, Any], want: Mapping[str, Any]) -> float:
    total = 0.0
    for key, value in have.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            total += math.log2((value + 1) / (want[key] + 1)) ** 2
        elif want[key] != value:
            return math.inf
    return total
