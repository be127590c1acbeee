"""The hooks of one calibration, and the sums that they fill."""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable, Iterable, Mapping
from threading import get_ident
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..models.layers import (
    Conv,
    bias_vector,
    dimensions,
    images,
    input_of,
    is_conv,
    output_rows,
    over_images,
    pad_input,
)  # fmt: skip
from ..models.masks import Masks, real_rows
from ..models.running import has_float64, remove
from ..ops import conv_covariance_update_, covariance_finalize_, covariance_update_
from ..ops.covariance import output_size
from .distributed import rank_and_world
from .gradients import OutputGradient, OutputGradients
from .objectives import Sensitivity, objective
from .sampling import Sampler
from .statistics import (
    Covariances,
    LayerStatistics,
    Moments,
    NonFiniteActivationError,
    from_lower_triangle,
    lower_triangle,
)
from .token_weights import MAX_ELEMENTS, SavedActivation

# Sums are about a shift for features whose mean is more than SHIFT_RATIO of their standard deviations; others lose at
# most log2(1 + SHIFT_RATIO^2) bits. Both are estimated from about SHIFT_ROWS rows of a layer's first call.
SHIFT_RATIO = 2
SHIFT_ROWS = 4096
NO_ROWS = (
    "no row reached a layer: the batches are empty, the mask leaves no position, tokens takes too few rows, or the "
    "model calls none of the layers that filter_fn keeps."
)


class Recorder:
    """Hooks on a model and its layers, and the sums of what they see.

    Args:
        layers: ``{fqn: layer}``.
        masks: of the model.
        share: layers that receive the same tensor share its sums.
        partial: other layers are recorded elsewhere, so a loss need not depend on these.
        tokens: the share of the rows that is added.

    Attributes:
        seed: of the choice of rows.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        masks: Masks,
        share: bool,
        partial: bool = False,
        tokens: float = 1.0,
    ) -> None:
        self._layers, self.partial, self._tokens, self.seed = layers, partial, tokens, ""
        self._masks = masks
        self._share = share
        self._sides: Mapping[str, str] = {}
        self._activations: dict[str, _Sums] = {}  # by layer; a layer that shares its input has its leader's
        self._touched: dict[str, _Sums] = {}  # since the last check, in the order of the calls
        self._gradients = OutputGradients()
        self._output_gradients: dict[str, _Sums] = {}
        self._token_weighted: dict[str, _Sums] = {}
        self._samples = 0
        self._batch = 0
        self._in_forward = False
        self._in_backward = False  # gradient checkpointing calls layers again, with rows that were seen already
        self._handles: list[RemovableHandle] = []
        self._thread = 0  # whose calls count; set by attach
        self._other_threads = False  # called the model

    def attach(self, model: nn.Module, sides: Mapping[str, str], dtype: torch.dtype) -> None:
        """Hook ``model`` and the streamed side of each layer in ``sides``.

        The model's own hooks come first and last, because the model may itself be the layer.
        """
        self._sides, self._dtype, self._thread = sides, dtype, get_ident()
        self._handles.append(model.register_forward_pre_hook(self._before_forward, with_kwargs=True))
        self._masks.attach(self._handles)
        for fqn, side in sides.items():
            self._handles.append(self._hook(fqn, self._layers[fqn], side, dtype))
        self._handles.append(model.register_forward_hook(self._after_forward))

    def _hook(self, fqn: str, layer: nn.Module, side: str, dtype: torch.dtype) -> RemovableHandle:
        """See the input after all hooks that change it, or the output before any of them."""
        if side == "output":
            return layer.register_forward_hook(
                lambda module, args, kwargs, y: self._see_output(fqn, module, input_of(args, kwargs), y, dtype),
                prepend=True,
                with_kwargs=True,
            )
        return layer.register_forward_pre_hook(
            lambda module, args, kwargs: self._see_input(fqn, module, input_of(args, kwargs), dtype),
            with_kwargs=True,
        )

    def attach_output_gradients(self, dtype: torch.dtype, token_weights: bool) -> None:
        """Hook the outputs of all layers, to differentiate at them and to add the moments of their gradients."""
        self._gradient_dtype = dtype
        self._attach_outputs(save_activations=token_weights)

    def attach_gradient_reader(self, save_inputs: bool = False) -> None:
        """Hook the outputs of all layers for :meth:`gradients_of`, with their inputs if wanted; no sums are kept."""
        self._attach_outputs(save_activations=save_inputs)

    def _attach_outputs(self, save_activations: bool) -> None:
        def watch(fqn: str, x: Tensor, y: Tensor) -> Tensor | None:
            if self._is_foreign():
                return None
            save: Callable[[], SavedActivation] | None = None
            if save_activations and not self._in_backward:
                save = lambda: SavedActivation(x, y, self._sides.get(fqn, "input"))  # noqa: E731
            return self._gradients.watch(fqn, y, None if self._in_backward else self._mask_of(fqn, x), save)

        for fqn, layer in self._layers.items():
            self._handles.append(
                layer.register_forward_hook(
                    lambda module, args, kwargs, y, fqn=fqn: watch(fqn, input_of(args, kwargs), y),
                    prepend=True,
                    with_kwargs=True,
                )
            )

    def gradients_of(self, sensitivity: Sensitivity, output: Any, batch: Any) -> tuple[list[OutputGradient], int]:
        """The gradients of the last forward's objective at the layers' outputs, call by call, and its samples."""
        loss, samples = objective(sensitivity, output, batch, self._masks.of_output())
        return self._differentiate(loss, retain_graph=False), samples

    def add_loss(self, sensitivity: Sensitivity, output: Any, batch: Any, retain_graph: bool) -> None:
        """Add the output gradients of a batch's objective."""
        loss, samples = objective(sensitivity, output, batch, self._masks.of_output())
        self.add_gradients(loss, samples, retain_graph)

    def add_gradients(self, loss: Tensor, samples: int, retain_graph: bool) -> None:
        """Add the gradients of ``loss``, summed over ``samples``, at all outputs that it depends on.

        Layers share inputs but not outputs: every call of a layer creates a tensor of its own, and a module called at
        several places is one layer. So no gradient is counted twice.
        """
        for fqn, values, mask, saved in self._differentiate(loss, retain_graph):
            layer = self._layers[fqn]
            sums = self._sums_of_loss(self._output_gradients, fqn, "output", "output gradient")
            rows = output_rows(layer, values)
            with torch.no_grad():
                sums.update(rows if is_conv(layer) else real_rows(rows, mask))
                if saved is not None:
                    side = self._sides[fqn]
                    weighted = self._sums_of_loss(self._token_weighted, fqn, side, f"token-weighted {side}")
                    if not weighted.moments.count:
                        weighted.moments.shift = self._activations[fqn].moments.shift
                    saved.add_to(weighted.moments, fqn, layer, values, mask, weighted.sampler)
        self._samples += samples
        self.check_finite()

    def _differentiate(self, loss: Tensor, retain_graph: bool) -> list[OutputGradient]:
        self._in_backward = True
        try:
            return self._gradients.of(loss, retain_graph, required=not self.partial)
        finally:
            self._in_backward = False

    def _sums_of_loss(self, sums: dict[str, _Sums], fqn: str, side: str, what: str) -> _Sums:
        if fqn not in sums:
            sums[fqn] = self._new_sums(fqn, side, self._gradient_dtype, what, of_loss=True)
        self._touched[f"{what} of {fqn}"] = sums[fqn]
        return sums[fqn]

    def detach(self) -> None:
        """Remove every hook, and drop the graphs of forwards that no loss was observed for."""
        remove(self._handles)
        self._gradients = OutputGradients()

    def _new_sums(self, fqn: str, side: str, dtype: torch.dtype, what: str, of_loss: bool = False) -> _Sums:
        sums = _Sums(fqn, self._layers[fqn], side, dtype, what, of_loss)
        sums.sampler = Sampler(self._tokens, f"{self.seed} {what}")  # alike in all passes
        return sums

    def _all_sums(self) -> list[tuple[str, _Sums]]:
        kinds: dict[str, Mapping[Any, _Sums]] = {
            "activations": {id(sums): sums for sums in self._activations.values()},
            "output_gradients": self._output_gradients,
            "token_weighted": self._token_weighted,
        }
        return [(kind, sums) for kind, found in kinds.items() for sums in found.values()]

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What was added so far, between two batches: a header for JSON, and tensors."""
        tensors: dict[str, Tensor] = {}
        parts = []
        for i, (kind, sums) in enumerate(self._all_sums()):
            tensors |= {f"{i}.{name}": tensor for name, tensor in sums.moments.tensors().items()}
            tensors[f"{i}.second_moment"] = lower_triangle(sums.moments.second_moment)
            shifted = sums.moments.shift is not None
            draws = [sums.sampler.calls, sums.sampler.seen]
            part = {"kind": kind, "calls": sums.calls, "count": sums.moments.count, "shifted": shifted, "draws": draws}
            parts.append(part)
        return {"samples": self._samples, "batch": self._batch, "parts": parts}, tensors

    def restore(self, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Go on from a :meth:`state` of the same layers and arguments."""
        self._samples, self._batch = header["samples"], header["batch"]
        for i, part in enumerate(header["parts"]):
            kind, leader = part["kind"], next(iter(part["calls"]))
            side = "output" if kind == "output_gradients" else self._sides[leader]
            if kind == "activations":
                sums = self._new_sums(leader, side, self._dtype, side)
                self._activations |= dict.fromkeys(part["calls"], sums)
            else:
                of = self._output_gradients if kind == "output_gradients" else self._token_weighted
                what = "output gradient" if kind == "output_gradients" else f"token-weighted {side}"
                sums = self._sums_of_loss(of, leader, side, what)
            sums.calls, sums.moments.count = dict(part["calls"]), part["count"]
            sums.sampler.calls, sums.sampler.seen = part["draws"]
            moments, device = sums.moments, sums.moments.total.device
            packed = tensors[f"{i}.second_moment"].to(device)
            moments.second_moment.copy_(from_lower_triangle(packed, moments.total.shape[-1]))
            moments.total.copy_(tensors[f"{i}.total"])
            moments.shift = tensors[f"{i}.shift"].to(device) if part["shifted"] else None
        self._touched.clear()

    def finish(self, skipped: Mapping[str, str]) -> Covariances:
        """Mirror the triangles, subtract biases from streamed outputs, and return the sums.

        Raises:
            RuntimeError: the model ran in other threads only, whose rows are not counted.
            ValueError: no row reached a layer.
        """
        self._part_lagging()
        if self._other_threads and not self._batch:
            raise RuntimeError(
                "the model ran in other threads only, whose rows are not counted; run the batches in the thread that "
                "opened the block."
            )
        for sums in {id(sums): sums for sums in self._activations.values()}.values():
            sums.check_followers()
            covariance_finalize_(sums.moments.second_moment)
        for sums in [*self._activations.values(), *self._token_weighted.values()]:
            if self._sides[sums.leader] == "output":
                _remove_bias(sums.moments, self._layers[sums.leader])
        for sums in [*self._output_gradients.values(), *self._token_weighted.values()]:
            covariance_finalize_(sums.moments.second_moment)
        for sums in self._output_gradients.values():
            if sums.sampler.share < 1:  # sums over all rows of a sample, estimated from the chosen ones
                scale = sums.sampler.seen / max(sums.moments.count, 1)
                sums.moments.second_moment, sums.moments.total = (
                    part.mul_(scale) for part in (sums.moments.second_moment, sums.moments.total)
                )
            sums.moments.count = self._samples
        for _, sums in self._all_sums():
            if not has_float64(sums.moments.total.device):
                sums.moments.to_cpu_()

        def moments(of: Mapping[str, _Sums], fqn: str) -> Moments | None:
            return of[fqn].moments if fqn in of else None

        layers = {
            fqn: LayerStatistics(
                self._sides[fqn],
                self._activations[fqn].moments,
                moments(self._output_gradients, fqn),
                moments(self._token_weighted, fqn),
            )
            for fqn in self._layers
            if fqn in self._activations and self._activations[fqn].moments.count
        }
        if not layers and not self.partial and rank_and_world()[1] == 1:  # other processes may have rows
            raise ValueError(NO_ROWS)
        return Covariances(layers, tuple(fqn for fqn in self._layers if fqn not in layers), skipped)

    def check_finite(self) -> None:
        """Raise for the first layer whose sums are not finite since the last check: one synchronization for all."""
        if not self._touched:
            return
        each = [sums.is_finite() for sums in self._touched.values()]
        finite = torch.stack([one.to(each[0].device) for one in each])
        if not bool(finite.all()):
            sums = list(self._touched.values())[int(finite.int().argmin())]
            batch = f"batch {self._batch - sums.of_loss} (counted from 0)"  # a loss follows the end of its forward
            where = batch if self._in_forward or sums.of_loss else "a call outside the model's forward"
            raise NonFiniteActivationError(
                f"layer {sums.leader!r}: its {sums.what} holds NaN or inf (or overflows the sums) in {where}. "
                "Check that batch, or run the model in a wider dtype."
            )
        self._touched.clear()

    def _is_foreign(self) -> bool:
        """Whether this call runs in another thread, as requests to a served model do; autograd has its own threads."""
        return get_ident() != self._thread and not self._in_backward

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._is_foreign():
            self._other_threads = True
            return
        self._in_forward = True

    def _after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._is_foreign():
            return
        self.check_finite()
        if not self._batch:
            self._part_lagging()
            for sums in self._activations.values():
                sums.forget_before()
        self._in_forward = False
        self._batch += 1

    def _see_input(self, fqn: str, layer: nn.Module, x: Tensor, dtype: torch.dtype) -> None:
        if self._in_backward or self._is_foreign() or not isinstance(x, Tensor):  # the layer raises
            return
        _check_activation(fqn, x)
        sums = self._sums_of_input(fqn, layer, x, dtype)
        if not self._batch:  # in the first forward layers may turn out to share some of their inputs only
            self._part(sums, sums.parting(fqn, x))
            sums = self._activations[fqn]
            sums.keep_before(fqn)
        if not sums.is_repeated(fqn, x):
            self._touched[sums.leader] = sums
            with torch.no_grad():
                if is_conv(layer):
                    sums.update_conv(layer, x.detach())
                else:
                    sums.update(real_rows(x.detach(), self._mask_of(fqn, x)))

    def _part(self, sums: _Sums, layers: Iterable[str]) -> None:
        for fqn in layers:
            self._activations[fqn] = sums.of_its_own(fqn, self._layers[fqn])

    def _part_lagging(self) -> None:
        for sums in {id(sums): sums for sums in self._activations.values()}.values():
            self._part(sums, sums.lagging())

    def _see_output(self, fqn: str, layer: nn.Module, x: Tensor, y: Tensor, dtype: torch.dtype) -> None:
        if self._in_backward or self._is_foreign():
            return
        if fqn not in self._activations:
            self._activations[fqn] = self._new_sums(fqn, "output", dtype, "output")
        sums = self._touched[fqn] = self._activations[fqn]
        with torch.no_grad():
            if is_conv(layer):
                sums.update(output_rows(layer, y.detach()))
            else:
                sums.update(real_rows(y.detach(), self._mask_of(fqn, x)))

    def _mask_of(self, fqn: str, x: Tensor) -> Tensor | None:
        """The mask of the rows of a layer's input and output; None where all count."""
        layer = self._layers[fqn]
        return None if is_conv(layer) else self._masks.of(fqn, layer, x)

    def _sums_of_input(self, fqn: str, layer: nn.Module, x: Tensor, dtype: torch.dtype) -> _Sums:
        if fqn not in self._activations:
            leader = self._leader_of(fqn, layer, x) if self._share else None
            if leader is None:
                leader = self._new_sums(fqn, "input", dtype, "input")
            else:
                leader.join(fqn)
            self._activations[fqn] = leader
        return self._activations[fqn]

    def _leader_of(self, fqn: str, layer: nn.Module, x: Tensor) -> _Sums | None:
        """The sums of an earlier layer that has received this very tensor, in its one call so far."""
        for sums in self._touched.values():
            if sums.has_only_seen(x) and sums.geometry == _geometry(layer) and self._masks.same(fqn, sums.leader):
                return sums
        return None


class _Sums:
    """The moments of one tensor's consumers: the leader updates, the followers check that they get the same tensor.

    Args:
        leader: the first consumer's name.
        layer: the first consumer.
        side: of the layer that the rows are on, ``"input"`` or ``"output"``.
        dtype: of the sums.
        what: the rows are, for messages.
        of_loss: they follow a loss, not a forward.
    """

    def __init__(
        self, leader: str, layer: nn.Module, side: str, dtype: torch.dtype, what: str, of_loss: bool = False
    ) -> None:
        self.leader, self.what, self.of_loss = leader, what, of_loss
        self.geometry = _geometry(layer)
        groups, in_features, out_features = dimensions(layer)
        features = in_features if side == "input" else out_features
        device = layer.get_parameter("weight").device
        dtype = dtype if has_float64(device) else torch.float32
        with torch.inference_mode(False):  # sums created in inference mode could not be updated outside it
            self.moments = Moments.zeros((features,) if groups == 1 else (groups, features), dtype, device)
        self.calls = {leader: 0}
        self._last: weakref.ref[Tensor] | None = None
        self._last_version = 0
        self.sampler = Sampler(1.0, "")
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

    def of_its_own(self, fqn: str, layer: nn.Module) -> _Sums:
        """Take a follower out, with what it has received."""
        calls = self.calls.pop(fqn)
        moments = self.moments if self._before is None or calls == self.calls[self.leader] else self._before
        own = _Sums(fqn, layer, "input", self.moments.total.dtype, self.what)
        own.moments, own.calls, own.sampler = copy.deepcopy(moments), {fqn: calls}, copy.copy(self.sampler)
        return own

    def keep_before(self, fqn: str) -> None:
        """Keep the moments before another call of the leader until all followers have received its tensor."""
        if fqn == self.leader:
            shared = len(self.calls) > 1 and self.calls[fqn] > 0
            self._before = copy.deepcopy(self.moments) if shared else None

    def forget_before(self) -> None:
        """End of the first forward: layers part no more."""
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
        if not self.moments.count and not self.of_loss:  # gradients are never centered
            self.moments.shift = shift_of(rows.reshape(-1, *total.shape), total.dtype)
        if self.sampler.share < 1:
            rows = self.sampler.of(rows.reshape(-1, total.numel()))
        shift, parts = self.moments.shift, (rows,)
        if shift is not None:
            parts = rows.reshape(-1, total.numel()).split(max(1, MAX_ELEMENTS // total.numel()))
        groups = list(zip(second_moment.view(-1, features, features), total.view(-1, features), strict=True))
        for part in parts:
            shifted = part if shift is None else part - shift.flatten()
            for (group_moment, group_total), of_group in zip(groups, shifted.split(features, dim=-1), strict=True):
                covariance_update_(group_moment, group_total, of_group)
        self.moments.count += rows.numel() // total.numel()

    def update_conv(self, layer: Conv, x: Tensor) -> None:
        """Add the patches of a convolution's input."""
        x, padding = pad_input(layer, x)
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

    def is_finite(self) -> Tensor:
        """A boolean scalar on the device of the sums."""
        diagonal = self.moments.second_moment.diagonal(dim1=-2, dim2=-1)
        return (self.moments.total.abs().sum() + diagonal.sum()).isfinite()

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
    deviation, mean = torch.std_mean(rows[:: max(1, len(rows) // SHIFT_ROWS)].to(dtype), 0, correction=0)
    large = mean.abs() > SHIFT_RATIO * deviation  # false for NaN
    mean = torch.where(large, mean, 0).to(rows.dtype)
    return mean.to(dtype if rows.device.type == "cpu" else rows.dtype) if bool(large.any()) else None


def _check_activation(fqn: str, x: Tensor) -> None:
    """Raise ValueError for the input of a layer that no rows can be read from."""
    dense = x.layout in (torch.strided, torch.jagged)
    if not dense or not x.dim() or x.is_meta or not x.is_floating_point():
        raise ValueError(
            f"layer {fqn!r} received a tensor of {x.dtype} and shape {tuple(x.shape)}, {x.layout}, on {x.device}; it "
            "must be a dense float tensor with values, of at least one dimension. Check the batches."
        )


def _remove_bias(moments: Moments, layer: nn.Module) -> None:
    """Turn the sums of y = W x + b into those of W x: about a shift that is smaller by b."""
    bias = bias_vector(layer)
    if bias is not None:
        bias = bias.to(moments.total).view_as(moments.total)
        moments.shift = -bias if moments.shift is None else moments.shift - bias


def _geometry(layer: nn.Module) -> object:
    """What besides the input tensor decides the rows: two layers may share sums only if this is equal."""
    if is_conv(layer):
        return (layer.kernel_size, layer.stride, layer.padding, layer.padding_mode, layer.dilation, layer.groups)
    return "linear"
