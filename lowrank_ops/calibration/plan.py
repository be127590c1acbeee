"""The memory that a calibration needs, and the passes over the batches that keep it within a bound."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import torch
from torch import nn

from ..models.layers import device_of_layer, dimensions
from ..models.running import has_float64
from ..ops.covariance.reference import CHUNK_BYTES
from .experts import twin_name
from .token_weights import MAX_ELEMENTS

OFFLOADS = (None, "cpu", "disk")
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class PlannedLayer:
    """The memory of one layer's sums during its pass.

    Attributes:
        fqn: the layer's name.
        device: of the layer's weight and of its sums.
        side: which activation is streamed.
        sums: bytes by field of ``LayerStatistics``; less where the layer shares its input with another.
        gradients: bytes of each row's output gradient, which is kept until the backward pass of a batch ends.
        number: the pass that streams this layer, counted from 0.
    """

    fqn: str
    device: torch.device
    side: str
    sums: Mapping[str, int]
    gradients: int = 0
    number: int = 0

    @property
    def total(self) -> int:
        return sum(self.sums.values())

    @property
    def packed(self) -> int:
        """Bytes of the lower triangles; with some room for the sums of rows."""
        return self.total // 2 + self.total // 64

    @property
    def largest(self) -> int:
        return max(self.sums.values())

    @property
    def copies(self) -> int:
        """Bytes of rows that are copied at a time: shifted or weighted, and in the dtype of the sums."""
        if self.device.type == "cpu":
            return 2 * min(CHUNK_BYTES, self.largest)
        return 16 * min(MAX_ELEMENTS, self.largest // 8)


@dataclass(frozen=True)
class CalibrationPlan:
    """What a calibration needs, from :func:`plan_calibration`.

    Attributes:
        layers: each with its bytes and its pass.
        passes: number of passes over the batches.
        peak: maximum bytes of the sums and of the copies of rows that are added to them, by device.
        gradients: bytes of output gradients for each row (token, position) of a batch, in the pass that has most.
        kept: bytes of the result.
        bounds: bytes that the sums may take, by device; None if unknown.
        offload: where finished sums are stored as lower triangles, ``"cpu"`` or ``"disk"``; None: whole, on the device.
    """

    layers: tuple[PlannedLayer, ...]
    passes: int
    peak: Mapping[torch.device, int]
    gradients: int
    kept: int
    bounds: Mapping[torch.device, int | None]
    offload: str | None

    def __str__(self) -> str:
        peaks = ", ".join(f"{size(peak)} on {device}" for device, peak in self.peak.items())
        where = {None: "beside the model", "cpu": "packed in the CPU's memory", "disk": "packed on the disk"}
        passes = "1 pass" if self.passes == 1 else f"{self.passes} passes"
        rows = f", and {size(1000 * self.gradients)} for 1,000 rows of a batch" if self.gradients else ""
        kept = f"{size(self.kept)} {where[self.offload]}"
        return f"calibration: {passes} over the batches, sums of at most {peaks}{rows}; {kept}"

    def table(self) -> str:
        """One line per layer: device, side, bytes by kind of sums, and pass. The last line is the total."""
        names = list(dict.fromkeys(name for layer in self.layers for name in layer.sums))
        rows = [["layer", "device", "side", *names, "pass"]]
        for layer in self.layers:
            sizes = [size(layer.sums[name]) if name in layer.sums else "-" for name in names]
            rows.append([layer.fqn or "(the model)", str(layer.device), layer.side, *sizes, str(layer.number + 1)])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*lines, str(self)])


def make_plan(
    layers: Mapping[str, nn.Module],
    sides: Mapping[str, str],
    dtype: torch.dtype,
    *,
    output_gradients: bool,
    token_weights: bool,
    max_memory: int | str | None,
    offload: str | None,
) -> CalibrationPlan:
    """The plan of a calibration of ``layers``, each with its side.

    Raises:
        ValueError: an invalid ``max_memory`` or ``offload``, or sums of one layer that exceed the bound.
    """
    if offload not in OFFLOADS:
        raise ValueError(f"offload must be None, 'cpu' or 'disk'; got {offload!r}.")
    planned = []
    for fqn, layer in layers.items():
        groups, in_features, out_features = dimensions(layer)
        features = in_features if sides[fqn] == "input" else out_features
        sums = {"activations": features}
        if output_gradients:
            sums |= {"output_gradients": out_features} | ({"token_weighted": features} if token_weights else {})
        if twin_name(fqn) in sides:
            groups *= 2
        device = device_of_layer(layer)
        itemsize = (dtype if has_float64(device) else torch.float32).itemsize
        sizes = {name: itemsize * groups * (n * n + 2 * n) for name, n in sums.items()}
        weight = layer.get_parameter("weight")
        gradients = groups * out_features * weight.element_size() if output_gradients else 0
        planned.append(PlannedLayer(fqn, device, sides[fqn], sizes, gradients))
    devices = dict.fromkeys(one.device for one in planned)
    given = None if max_memory is None else parse_bytes(max_memory)
    bounds = {device: _half(free_memory(device)) if given is None else given for device in devices}
    here = {device: [one for one in planned if one.device == device] for device in devices}
    whole = {device: sum(one.total for one in of) + max(one.copies for one in of) for device, of in here.items()}
    if all(bound is None or whole[device] <= bound for device, bound in bounds.items()):
        kept, gradients = (sum(getattr(one, name) for one in planned) for name in ("total", "gradients"))
        return CalibrationPlan(tuple(planned), 1, whole, gradients, kept, bounds, offload)
    places: list[str | None] = [offload]
    if offload is None:
        places = ["cpu", "disk"]
        free = _half(free_memory(_CPU))
        if _CPU not in bounds and free is not None and sum(one.packed for one in planned) > free:
            places = ["disk"]
    for place in places:
        numbers, peak, too_large = _passes(planned, bounds, place)
        if too_large is None:
            break
    if too_large is not None:
        one, needed = too_large
        raise ValueError(
            f"the sums of layer {one.fqn!r} need {size(needed)} on {one.device}, with what is kept there, more "
            f"than max_memory ({size(bounds[one.device] or 0)}). Pass a larger max_memory, offload='disk', "
            "side='output' or dtype=torch.float32, or leave the layer out with filter_fn."
        )
    numbered = tuple(replace(one, number=numbers[one.fqn]) for one in planned)
    passes = max(numbers.values()) + 1
    by_pass = [sum(one.gradients for one in numbered if one.number == number) for number in range(passes)]
    return CalibrationPlan(numbered, passes, peak, max(by_pass), sum(one.packed for one in planned), bounds, place)


def _passes(
    planned: list[PlannedLayer], bounds: Mapping[torch.device, int | None], place: str | None
) -> tuple[dict[str, int], dict[torch.device, int], tuple[PlannedLayer, int] | None]:
    """The pass of each layer, the most bytes on each device, and the layer that exceeds a bound with its bytes.

    Layers of one parent with equally wide sums, which may share their input, are in one pass if that fits.
    """
    numbers: dict[str, int] = {}
    peak = dict.fromkeys(bounds, 0)
    kept = dict.fromkeys(bounds, 0)  # of earlier passes
    current: list[PlannedLayer] = []
    number = 0

    packed_here = place is None or (place == "cpu" and _CPU in bounds)  # beside the whole ones

    def needed(layers: list[PlannedLayer], device: torch.device) -> int:
        here = [layer for layer in layers if layer.device == device]
        beside = [max(layer.copies, packed_here * layer.largest // 2) for layer in here]
        return kept[device] + sum(layer.total for layer in here) + max(beside, default=0)

    def fits(layers: list[PlannedLayer]) -> bool:
        return all(bound is None or needed(layers, device) <= bound for device, bound in bounds.items())

    def finish() -> None:
        nonlocal number, current
        for device in bounds:
            peak[device] = max(peak[device], needed(current, device))
        for layer in current:
            numbers[layer.fqn] = number
            home = _CPU if place == "cpu" else layer.device
            if place != "disk" and home in kept:
                kept[home] += layer.packed
        number, current = number + 1, []

    siblings = [
        list(group)
        for _, group in groupby(planned, lambda layer: (layer.fqn.rpartition(".")[0], layer.sums["activations"]))
    ]
    for unit in siblings:
        for part in [unit] if fits(unit) else [[layer] for layer in unit]:
            if current and not fits([*current, *part]):
                finish()
            if not fits(part):
                return numbers, peak, (part[0], needed(part, part[0].device))
            current += part
    finish()
    return numbers, peak, None


def parse_bytes(given: int | str) -> int:
    """Bytes of ``max_memory``: a number, or text such as ``"8GB"`` or ``"500 MiB"``."""
    found = re.fullmatch(r"\s*([\d.]+)\s*([KMGT]?I?)B?\s*", given.upper()) if isinstance(given, str) else None
    with contextlib.suppress(ValueError, KeyError):
        if found is not None:
            given = int(float(found[1]) * _UNITS[found[2]])
    if isinstance(given, bool) or not isinstance(given, int) or given <= 0:
        raise ValueError(f"max_memory must be a positive number of bytes or text such as '8GB'; got {given!r}.")
    return given


def size(count: int) -> str:
    """Bytes as text, such as ``"1.5 GiB"``."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} B"


def free_memory(device: torch.device) -> int | None:
    """Bytes that can be allocated on a device; None if that is not known."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type != "cpu":
        return None
    found = []
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found.append(1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]))
    with contextlib.suppress(OSError, ValueError, StopIteration):  # the limit of a container; its caches can be dropped
        group = Path("/sys/fs/cgroup")
        lines = (group / "memory.stat").read_text().splitlines()
        caches = int(next(line for line in lines if line.startswith("inactive_file ")).split()[1])
        used = int((group / "memory.current").read_text()) - caches
        found.append(int((group / "memory.max").read_text()) - used)
    return min(found, default=None)


def _half(free: int | None) -> int | None:
    return None if free is None else max(free, 0) // 2
