"""The memory that a calibration needs, and the passes over the batches that keep it within a bound."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import nn

from ..arguments import checked
from ..models.layers import FilterFn, device_of_layer, dimensions
from ..models.memory import free_memory, parse_bytes, size
from ..models.running import has_float64
from ..ops.covariance.reference import CHUNK_BYTES
from .experts import twin_name
from .objectives import Sensitivity, check_sensitivity
from .selection import SelectedLayers, select_layers
from .token_weights import MAX_ELEMENTS

OFFLOADS = (None, "cpu", "disk")
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


@checked()
def plan_calibration(
    model: nn.Module,
    *,
    filter_fn: FilterFn | None = None,
    side: str = "auto",
    dtype: torch.dtype = torch.float64,
    sensitivity: Sensitivity | None = None,
    token_weights: bool = True,
    max_state_bytes: int = 2 << 30,
    max_memory: int | str | None = None,
    offload: str | None = None,
) -> CalibrationPlan:
    """The memory that :func:`calibrate` will need with these arguments: bytes by layer and device, and passes.

    Layers that share their input will need less than planned, since sharing is known only when the model runs. The
    model's own activations are not counted, and output gradients per row of a batch, since its size is not known.

    Args:
        model: as for :func:`calibrate`; may be on the meta device, where no memory bound is known.
        filter_fn, side, dtype, sensitivity, token_weights, max_state_bytes, max_memory, offload: as for
            :func:`calibrate`.

    Raises:
        ValueError: as for :func:`calibrate`.

    Example:
        >>> import torch, lowrank_ops as lro
        >>> model = torch.nn.Sequential(torch.nn.Linear(1024, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1024))
        >>> print(lro.plan_calibration(model, sensitivity="fisher", max_memory="40MB").table())
        layer  device  side   activations  output_gradients  token_weighted  pass
        0      cpu     input  8.0 MiB      33.0 KiB          8.0 MiB         1
        2      cpu     input  33.0 KiB     8.0 MiB           33.0 KiB        2
        calibration: 2 passes over the batches, sums of at most 32.4 MiB on cpu, and 3.9 MiB for 1,000 rows of a \
batch; 12.4 MiB packed in the CPU's memory
    """
    if sensitivity is not None:
        check_sensitivity(sensitivity)
    gradients = sensitivity is not None
    selected = select_layers(
        model,
        output_gradients=gradients,
        filter_fn=filter_fn,
        side=side,
        dtype=dtype,
        max_state_bytes=max_state_bytes,
        needs_values=False,
    )
    return make_plan(
        selected, dtype, output_gradients=gradients, token_weights=token_weights, max_memory=max_memory, offload=offload
    )


def make_plan(
    selected: SelectedLayers,
    dtype: torch.dtype,
    *,
    output_gradients: bool,
    token_weights: bool,
    max_memory: int | str | None,
    offload: str | None,
) -> CalibrationPlan:
    """The plan of a calibration of these layers.

    Raises:
        ValueError: an invalid ``max_memory`` or ``offload``, or sums of one layer that exceed the bound.
    """
    if offload not in OFFLOADS:
        raise ValueError(f"offload must be None, 'cpu' or 'disk'; got {offload!r}.")
    planned, sides = [], selected.sides
    for fqn, layer in selected.layers.items():
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
    numbers, peak = _balanced(planned, bounds, place, numbers, peak)
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


def _balanced(
    planned: list[PlannedLayer],
    bounds: Mapping[torch.device, int | None],
    place: str | None,
    numbers: dict[str, int],
    peak: dict[torch.device, int],
) -> tuple[dict[str, int], dict[torch.device, int]]:
    """The same number of passes with smaller bounds, so that the last one is not smaller than the others need be."""
    low, high, passes = 0.0, 1.0, max(numbers.values())
    for _ in range(6):
        share = (low + high) / 2
        smaller = {device: None if bound is None else int(share * bound) for device, bound in bounds.items()}
        found, of_found, too_large = _passes(planned, smaller, place)
        if too_large is None and max(found.values()) == passes:
            numbers, peak, high = found, of_found, share
        else:
            low = share
    return numbers, peak


def _half(free: int | None) -> int | None:
    return None if free is None else max(free, 0) // 2
