"""Tuned tables: ``tuned/<op>.<arch>.json``, looked up by nearest shape. Nothing is timed here.

A table is a JSON object ``{"op", "arch", "device", "entries": [{"shape": {...}, "impl": ..., "config": {...}}]}``.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from importlib.resources import files
from typing import Any


@functools.cache
def load(op: str, arch: str) -> tuple[dict[str, Any], ...]:
    """The entries of an op's table for an arch such as ``"sm90"``; empty where none ships."""
    path = files("lowrank_ops.ops") / "tuned" / f"{op}.{arch}.json"
    return tuple(json.loads(path.read_text())["entries"]) if path.is_file() else ()


def nearest(op: str, arch: str, shape: Mapping[str, Any]) -> dict[str, Any] | None:
    """The entry nearest in shape: equal in every non-number, least in the summed squares of log2 ratios.

    Args:
        op: name of the op.
        arch: ``"sm80"``, ``"sm90"`` or ``"sm100"``.
        shape: the dimensions, dtype name and other keys by which the table is indexed.
    """
    best, least = None, math.inf
    for entry in load(op, arch):
        distance = _distance(entry["shape"], shape)
        if distance < least:
            best, least = entry, distance
    return best


def _distance(have: Mapping[str, Any], want: Mapping[str, Any]) -> float:
    total = 0.0
    for key, value in have.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            total += math.log2((value + 1) / (want[key] + 1)) ** 2
        elif want[key] != value:
            return math.inf
    return total
