"""The sums of one activation or output gradient while the batches run."""

from __future__ import annotations

import copy
import math
import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.layers import Conv, device_of_layer, dimensions, images, is_conv, over_images, pad_input
from ..models.running import has_float64
from ..ops import conv_covariance_update_, covariance_update_
from ..ops.covariance import output_size
from ..ops.covariance.reference import MIN_CHUNK_BYTES
from .sampling import Sampler
from .statistics import Moments
from .token_weights import elements_at_a_time

# Sums are about a shift for features whose mean is more than SHIFT_RATIO of their standard deviations; others lose at
# most log2(1 + SHIFT_RATIO^2) bits. Both are estimated from about SHIFT_ROWS rows of a layer's first call.
SHIFT_RATIO = 2
SHIFT_ROWS = 4096


class Sums:
    """The moments of one tensor's consumers: the leader updates, the followers check that they get the same tensor.

    Args:
        leader: the first consumer's name.
        layer: the first consumer.
        side: of the layer that the rows are on, ``"input"`` or ``"output"``.
        dtype: of the sums.
        what: name of the rows in messages.
        of_loss: the rows are added after a loss, not during a forward.
    """

    def __init__(
        self, leader: str, layer: nn.Module, side: str, dtype: torch.dtype, what: str, of_loss: bool = False
    ) -> None:
        self.leader, self.what, self.of_loss = leader, what, of_loss
        self.geometry = geometry_of(layer)
        groups, in_features, out_features = dimensions(layer)
        features = in_features if side == "input" else out_features
        device = device_of_layer(layer)
        dtype = dtype if has_float64(device) else torch.float32
        with torch.inference_mode(False):  # sums created in inference mode could not be updated outside it
            self.moments = Moments.zeros((features,) if groups == 1 else (groups, features), dtype, device)
        self.calls = {leader: 0}
        self._last: weakref.ref[Tensor] | None = None
        self._last_version = 0
        self.sampler = Sampler(1.0, "")
        self._largest: Tensor | None = None  # magnitude of all rows, where not all are added; NaN if one holds that
        self._before: Moments | None = None  # the leader's latest call, if it had called before in the first forward

    def join(self, fqn: str) -> None:
        """Add ``fqn`` to the consumers."""
        self.calls[fqn] = 0

    def has_only_seen(self, x: Tensor) -> bool:
        """Whether the leader was called once so far, with ``x``."""
        return self.calls[self.leader] == 1 and self._is_last(x)

    def parting(self, fqn: str, x: Tensor) -> list[str]:
        """The layers that receive other tensors from this call of ``fqn`` on."""
        if fqn == self.leader:
            return self.lagging()
        calls, leader_calls = self.calls[fqn], self.calls[self.leader]
        if self._is_last(x) and calls + 1 == leader_calls:
            return []
        return [fqn] if calls == leader_calls or fqn in self.lagging() else []

    def lagging(self) -> list[str]:
        """The layers that did not receive the leader's latest tensor, where the moments before it are known."""
        behind = [fqn for fqn, calls in self.calls.items() if calls == self.calls[self.leader] - 1]
        return behind if self._before is not None else []

    def of_its_own(self, fqn: str, layer: nn.Module) -> Sums:
        """Remove a follower, and return its own sums so far."""
        calls = self.calls.pop(fqn)
        moments = self.moments if self._before is None or calls == self.calls[self.leader] else self._before
        own = Sums(fqn, layer, "input", self.moments.total.dtype, self.what)
        own.moments, own.calls, own.sampler = copy.deepcopy(moments), {fqn: calls}, copy.copy(self.sampler)
        return own

    def keep_before(self, fqn: str) -> None:
        """Keep the moments before another call of the leader until all followers have received its tensor."""
        if fqn == self.leader:
            shared = len(self.calls) > 1 and self.calls[fqn] > 0
            self._before = copy.deepcopy(self.moments) if shared else None

    def forget_before(self) -> None:
        """End of the first forward: from now on no layer gets sums of its own."""
        self._before = None

    def is_repeated(self, fqn: str, x: Tensor) -> bool:
        """Count the call; True if the leader has added this tensor already.

        Raises:
            ValueError: a follower receives another tensor than its leader; its sums would be wrong.
        """
        if fqn == self.leader:
            self.check_followers()
            self._last, self._last_version = weakref.ref(x), 0 if x.is_inference() else x._version
        elif not self._is_last(x) or self.calls[fqn] + 1 != self.calls[self.leader]:
            raise ValueError(self._diverged(fqn))
        self.calls[fqn] += 1
        return fqn != self.leader

    def check_followers(self) -> None:
        """Raise if a follower missed the leader's last call."""
        for fqn, calls in self.calls.items():
            if calls != self.calls[self.leader]:
                raise ValueError(self._diverged(fqn))

    def update(self, rows: Tensor) -> None:
        """Add rows (..., groups * features)."""
        second_moment, total = self.moments.second_moment, self.moments.total
        features = total.shape[-1]
        if rows.shape[-1] != total.numel():
            raise ValueError(
                f"layer {self.leader!r} has an {self.what} of {total.numel()} features; a batch has "
                f"{rows.shape[-1]}. Check the shape of the batches."
            )
        rows = rows.to(total.device)  # accelerate's hooks move inputs after ours have seen them
        if not self.moments.count and not self.of_loss:  # gradients are never centered
            self.moments.shift = shift_of(rows.reshape(-1, *total.shape), total.dtype)
        if self.sampler.share < 1:
            self._see(rows)
            rows = self.sampler.of(rows.reshape(-1, total.numel()))
        shift, parts = self.moments.shift, (rows,)
        if shift is not None:
            parts = rows.reshape(-1, total.numel()).split(max(1, elements_at_a_time(total) // total.numel()))
        groups = list(zip(second_moment.view(-1, features, features), total.view(-1, features), strict=True))
        for part in parts:
            shifted = part if shift is None else part - shift.flatten()
            for (group_moment, group_total), of_group in zip(groups, shifted.split(features, dim=-1), strict=True):
                covariance_update_(group_moment, group_total, of_group)
        self.moments.count += rows.numel() // total.numel()

    def update_conv(self, layer: Conv, x: Tensor) -> None:
        """Add the patches of a convolution's input."""
        x, padding = pad_input(layer, x.to(self.moments.total.device))
        x = images(layer, x)
        settings: dict[str, Any] = {
            "kernel_size": over_images(layer.kernel_size, 1),
            "stride": over_images(layer.stride, 1),
            "padding": over_images(padding, 0),
            "dilation": over_images(layer.dilation, 1),
        }
        height, width = output_size(x.shape[2:], **settings)
        second_moment, total = self.moments.second_moment, self.moments.total
        features, kernel = total.shape[-1], math.prod(layer.kernel_size)
        if not self.moments.count:
            pixels = x.flatten(2)[..., :: max(1, x.shape[0] * x.shape[2:].numel() // SHIFT_ROWS)]
            shift = shift_of(pixels.movedim(1, -1).flatten(0, 1), total.dtype)  # the same at all places of the kernel
            self.moments.shift = None if shift is None else shift.repeat_interleave(kernel).view_as(total)
        if self.moments.shift is not None:
            vertical, horizontal = settings["padding"]
            x = F.pad(x, (horizontal, horizontal, vertical, vertical))  # zeros are shifted as well
            x = x - self.moments.shift.view(-1, kernel)[:, :1].unsqueeze(-1)
            settings["padding"] = (0, 0)
        if self.sampler.share < 1:  # of the lines of the outputs
            self._see(x)
            vertical, horizontal = settings["padding"]
            chosen = self.sampler.choose(x.shape[0] * height)
            assert chosen is not None
            chosen = chosen.to(x.device).unsqueeze(1)
            reach = settings["dilation"][0] * (settings["kernel_size"][0] - 1) + 1
            lines = chosen % height * settings["stride"][0] + torch.arange(reach, device=x.device)
            x = F.pad(x, (0, 0, vertical, vertical))[chosen // height, :, lines].transpose(1, 2)
            height, settings["padding"] = 1, (0, horizontal)
        conv_covariance_update_(second_moment.view(-1, features, features), total.view(-1, features), x, **settings)
        self.moments.count += x.shape[0] * height * width

    def _see(self, rows: Tensor) -> None:
        """Notice NaN and inf in rows that are not added: they spoil the model's output all the same."""
        if rows.numel():
            low, high = rows.aminmax()  # 20 times faster than isfinite and norms on a CPU
            largest = torch.maximum(high, -low)
            self._largest = largest if self._largest is None else torch.maximum(self._largest, largest)

    def is_finite(self) -> Tensor:
        """A boolean scalar on the device of the sums."""
        diagonal = self.moments.second_moment.diagonal(dim1=-2, dim2=-1)
        finite = (self.moments.total.abs().sum() + diagonal.sum()).isfinite()
        return finite if self._largest is None else finite & self._largest.isfinite()

    def _is_last(self, x: Tensor) -> bool:
        if x.is_inference():  # has no version counter, so an in-place change between two layers would go unseen
            return False
        return self._last is not None and self._last() is x and self._last_version == x._version

    def _diverged(self, fqn: str) -> str:
        return (
            f"layer {fqn!r} received the same tensor as {self.leader!r} at first and a different one later, so the two "
            "cannot share a covariance. Calibrate again with share_inputs=False."
        )


@torch.inference_mode(False)
def shift_of(rows: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The means of the features that need a shift, 0 for the others; None if no feature does.

    Subtracting them is exact on CPUs, where rows are converted to the dtype of the sums anyway. Elsewhere it is exact
    within a factor of two of the shift, and rounds as the rows were rounded beyond.

    Args:
        rows: (rows, ...), the first ones of a layer.
        dtype: of the sums.
    """
    if not len(rows):
        return None
    some = rows[:: max(1, len(rows) // SHIFT_ROWS)].flatten(1)
    columns = some.split(max(1, MIN_CHUNK_BYTES // (len(some) * dtype.itemsize)), 1)
    parts = [torch.std_mean(part.to(dtype), 0, correction=0) for part in columns]
    deviation, mean = (torch.cat(each) for each in zip(*parts, strict=True))
    large = mean.abs() > SHIFT_RATIO * deviation  # false for NaN
    mean = torch.where(large, mean, 0).to(rows.dtype).view(rows.shape[1:])
    return mean.to(dtype if rows.device.type == "cpu" else rows.dtype) if bool(large.any()) else None


def geometry_of(layer: nn.Module) -> object:
    """What besides the input tensor decides the rows: two layers may share sums only if this is equal."""
    if is_conv(layer):
        return (layer.kernel_size, layer.stride, layer.padding, layer.padding_mode, layer.dilation, layer.groups)
    return "linear"
