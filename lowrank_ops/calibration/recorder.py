"""The hooks of one calibration, and the sums that they fill."""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..models.layers import bias_vector, dimensions, input_of, output_rows, pad_input
from ..models.masks import Mask, read_mask, real_rows
from ..ops import conv_covariance_update_, covariance_finalize_, covariance_update_
from ..ops.covariance import output_size
from .objectives import GradientTaps, Sensitivity, objective
from .statistics import GRADIENT, SIDES, WEIGHTED, Covariance, Covariances, NonFiniteActivationError
from .token_weights import KeptRows


class Recorder:
    """The hooks of one calibration and the sums that they fill."""

    def __init__(self, layers: Mapping[str, nn.Module], mask: Mask | None, share: bool) -> None:
        self._layers = layers
        self._mask_source = mask
        self._mask: Tensor | None = None  # of this forward
        self._last_mask: Tensor | None = None  # of the forward that a loss follows
        self._share = share
        self._states: dict[str, _State] = {}  # by layer; a layer that shares its input has its leader's
        self._touched: dict[str, _State] = {}  # in this forward, in the order of the calls
        self._taps = GradientTaps()
        self._gradients: dict[str, _State] = {}
        self._weighted: dict[str, _State] = {}
        self._samples = 0
        self._batch = 0
        self._in_forward = False
        self._in_backward = False  # where gradient checkpointing calls layers again, with rows that were seen already
        self._handles: list[RemovableHandle] = []

    def attach(self, model: nn.Module, sides: Mapping[str, str], dtype: torch.dtype) -> None:
        """Hook the model around its layers; the model may itself be the layer, so the order matters."""
        self._sides = sides
        self._handles.append(model.register_forward_pre_hook(self._before_forward, with_kwargs=True))
        for fqn, layer in self._layers.items():
            self._handles.append(self._hook(fqn, layer, sides[fqn], dtype))
        self._handles.append(model.register_forward_hook(self._after_forward))

    def _hook(self, fqn: str, layer: nn.Module, side: str, dtype: torch.dtype) -> RemovableHandle:
        """See the input after all hooks that change it, or the output before any of them."""
        if side == "output":
            return layer.register_forward_hook(
                lambda module, args, y: self._see_output(fqn, module, y, dtype), prepend=True
            )
        return layer.register_forward_pre_hook(
            lambda module, args, kwargs: self._see_input(fqn, module, input_of(args, kwargs), dtype),
            with_kwargs=True,
        )

    def attach_taps(self, dtype: torch.dtype, weigh_rows: bool) -> None:
        """Hook the outputs of all layers, to differentiate by them; with ``weigh_rows`` keep the rows until then."""
        self._gradient_dtype, self._weigh_rows = dtype, weigh_rows
        for fqn, layer in self._layers.items():
            self._handles.append(
                layer.register_forward_hook(
                    lambda module, args, kwargs, y, fqn=fqn: self._tap(fqn, input_of(args, kwargs), y),
                    prepend=True,
                    with_kwargs=True,
                )
            )

    def _tap(self, fqn: str, x: Tensor, y: Tensor) -> Tensor | None:
        weigh = self._weigh_rows and not self._in_backward
        return self._taps.tap(fqn, y, self._mask, (lambda: KeptRows(x, y, self._sides[fqn])) if weigh else None)

    def see_loss(self, sensitivity: Sensitivity, output: Any, batch: Any, keep: bool) -> None:
        """Add the gradients of a batch's loss; ``keep`` where another loss of this batch follows."""
        loss, samples = objective(sensitivity, output, batch, self._last_mask)
        self.see_gradients(loss, samples, keep)

    def see_gradients(self, loss: Tensor, samples: int, keep: bool) -> None:
        """Add the gradients at all outputs that ``loss``, summed over ``samples``, depends on.

        Inputs are shared by layers; outputs are not: every call of a layer makes a tensor of its own, with its own
        gradient, and a module that is called at several places is one layer. So there is nothing to find twice.
        """
        self._in_backward = True
        try:
            gradients = self._taps.gradients(loss, keep)
        finally:
            self._in_backward = False
        for fqn, values, mask, kept in gradients:
            layer = self._layers[fqn]
            state = self._state_of_loss(self._gradients, fqn, GRADIENT)
            rows = output_rows(layer, values)
            with torch.no_grad():
                state.update(rows if isinstance(layer, nn.Conv2d) else real_rows(fqn, rows, mask))
                if kept is not None:
                    weighted = self._state_of_loss(self._weighted, fqn, WEIGHTED + self._sides[fqn])
                    kept.add_to(weighted.covariance, fqn, layer, values, mask)
        self._samples += samples
        self.check_finite()

    def _state_of_loss(self, states: dict[str, _State], fqn: str, side: str) -> _State:
        if fqn not in states:
            states[fqn] = _new_state(fqn, self._layers[fqn], side, self._gradient_dtype)
            states[fqn].join(fqn)
        self._touched[f"{side} of {fqn}"] = states[fqn]
        return states[fqn]

    def detach(self) -> None:
        """Remove every hook."""
        for handle in self._handles:
            handle.remove()

    def finish(self, covariances: Covariances) -> None:
        """Mirror the triangles, take biases out of streamed outputs, and hand the sums over."""
        for fqn, state in self._states.items():
            if fqn == state.leader and state.covariance.count:
                state.check_followers()
                covariance = state.covariance
                covariance_finalize_(covariance.second_moment)
                if covariance.side == "output":
                    _remove_bias(covariance, self._layers[fqn])
                covariances._add(covariance)
        for state in self._gradients.values():
            covariance_finalize_(state.covariance.second_moment)
            state.covariance.count = self._samples
            covariances._add(state.covariance)
        for state in self._weighted.values():
            covariance_finalize_(state.covariance.second_moment)
            covariances._add(state.covariance)
        covariances._sort(list(self._layers))
        covariances.unreached = tuple(fqn for fqn in self._layers if fqn not in covariances)

    def check_finite(self) -> None:
        """Raise for the first layer of this forward whose sums are not finite: one synchronisation for all."""
        if not self._touched:
            return
        each = [state.is_finite() for state in self._touched.values()]
        finite = torch.stack([one.to(each[0].device) for one in each])
        if not bool(finite.all()):
            state = list(self._touched.values())[int(finite.int().argmin())]
            of_loss = state.covariance.side not in SIDES  # the forward is over by then
            batch = f"batch {self._batch - of_loss} (counted from 0)"
            where = batch if self._in_forward or of_loss else "a call beside the model's forward"
            raise NonFiniteActivationError(
                f"layer {state.leader!r}: its {state.covariance.side} holds NaN or inf (or overflows the sums) "
                f"in {where}. "
                "Check that batch, or run the model in a wider dtype."
            )
        self._touched.clear()

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._in_forward = True
        self._mask = read_mask(self._mask_source, args, kwargs)

    def _after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        self.check_finite()
        self._last_mask, self._mask = self._mask, None
        self._in_forward = False
        self._batch += 1

    def _see_input(self, fqn: str, layer: nn.Module, x: Tensor, dtype: torch.dtype) -> None:
        if self._in_backward:
            return
        state = self._state(fqn, layer, x, "input", dtype)
        if not state.is_repeated(fqn, x):
            self._touched[state.leader] = state
            with torch.no_grad():
                if isinstance(layer, nn.Conv2d):
                    state.update_conv(layer, x.detach())
                else:
                    state.update(self._real_rows(fqn, x.detach()))

    def _see_output(self, fqn: str, layer: nn.Module, y: Tensor, dtype: torch.dtype) -> None:
        if self._in_backward:
            return
        state = self._state(fqn, layer, None, "output", dtype)
        self._touched[fqn] = state
        with torch.no_grad():
            if isinstance(layer, nn.Conv2d):
                state.update(output_rows(layer, y.detach()))
            else:
                state.update(self._real_rows(fqn, y.detach()))

    def _real_rows(self, fqn: str, x: Tensor) -> Tensor:
        """The rows of ``x`` (..., features) at which the mask (batch, positions) of this forward is true."""
        return real_rows(fqn, x, self._mask, known=self._mask_source is None or self._in_forward)

    def _state(self, fqn: str, layer: nn.Module, x: Tensor | None, side: str, dtype: torch.dtype) -> _State:
        if fqn not in self._states:
            leader = self._leader_of(layer, x) if self._share and x is not None else None
            if leader is None:
                leader = _new_state(fqn, layer, side, dtype)
            leader.join(fqn)
            self._states[fqn] = leader
        return self._states[fqn]

    def _leader_of(self, layer: nn.Module, x: Tensor) -> _State | None:
        """The state of an earlier layer that has received just this tensor, in its one call so far."""
        for state in self._touched.values():
            if state.has_only_seen(x) and state.geometry == _geometry(layer):
                return state
        return None


def _new_state(fqn: str, layer: nn.Module, side: str, dtype: torch.dtype) -> _State:
    groups, in_features, out_features = dimensions(layer)
    features = in_features if side.endswith("input") else out_features
    shape = (features,) if groups == 1 else (groups, features)
    device = layer.weight.device
    assert isinstance(device, torch.device)
    with torch.inference_mode(False):  # sums made in inference mode could not be updated outside it
        second_moment = torch.zeros(*shape, features, dtype=dtype, device=device)
        total = torch.zeros(shape, dtype=dtype, device=device)
    return _State(fqn, _geometry(layer), Covariance(second_moment, total, side=side))


class _State:
    """The sums of one tensor's consumers: the leader updates, the followers check that they get the same tensor."""

    def __init__(self, leader: str, geometry: object, covariance: Covariance) -> None:
        self.leader = leader
        self.geometry = geometry
        self.covariance = covariance
        self._calls: dict[str, int] = {}
        self._last: weakref.ref[Tensor] | None = None
        self._last_version = 0

    def join(self, fqn: str) -> None:
        """Take ``fqn`` among the consumers."""
        self._calls[fqn] = 0
        self.covariance.layers.append(fqn)

    def has_only_seen(self, x: Tensor) -> bool:
        """Whether the leader was called once so far, with ``x``."""
        return self._calls[self.leader] == 1 and self._is_last(x)

    def is_repeated(self, fqn: str, x: Tensor) -> bool:
        """Count the call; True where the leader has added this tensor already.

        Raises:
            ValueError: a follower receives another tensor than its leader; its sums would be wrong.
        """
        if fqn == self.leader:
            self.check_followers()
            self._last, self._last_version = weakref.ref(x), 0 if x.is_inference() else x._version
        elif not self._is_last(x) or self._calls[fqn] + 1 != self._calls[self.leader]:
            raise ValueError(self._diverged(fqn))
        self._calls[fqn] += 1
        return fqn != self.leader

    def check_followers(self) -> None:
        """Raise if a follower missed the leader's last call."""
        for fqn, calls in self._calls.items():
            if calls != self._calls[self.leader]:
                raise ValueError(self._diverged(fqn))

    def update(self, rows: Tensor) -> None:
        """Add rows (..., groups * features)."""
        second_moment, total = self.covariance.second_moment, self.covariance.total
        features = total.shape[-1]
        if rows.shape[-1] != total.numel():
            raise ValueError(
                f"layer {self.leader!r} takes {total.numel()} features on its {self.covariance.side} side; a batch "
                f"brought {rows.shape[-1]}. Check the shape of the batches."
            )
        groups = zip(second_moment.view(-1, features, features), total.view(-1, features), strict=True)
        for (group_moment, group_total), part in zip(groups, rows.split(features, dim=-1), strict=True):
            covariance_update_(group_moment, group_total, part)
        self.covariance.count += rows.numel() // total.numel()

    def update_conv(self, layer: nn.Conv2d, x: Tensor) -> None:
        """Add the patches of a convolution's input."""
        x, padding = pad_input(layer, x if x.dim() == 4 else x.unsqueeze(0))
        second_moment, total = self.covariance.second_moment, self.covariance.total
        features = total.shape[-1]
        conv_covariance_update_(
            second_moment.view(-1, features, features),
            total.view(-1, features),
            x,
            kernel_size=layer.kernel_size,
            stride=layer.stride,
            padding=padding,
            dilation=layer.dilation,
        )
        positions = output_size(x.shape[2:], layer.kernel_size, layer.stride, padding, layer.dilation)
        self.covariance.count += x.shape[0] * math.prod(positions)

    def is_finite(self) -> Tensor:
        """A boolean scalar on the device of the sums."""
        diagonal = self.covariance.second_moment.diagonal(dim1=-2, dim2=-1)
        return (self.covariance.total.abs().sum() + diagonal.sum()).isfinite()

    def _is_last(self, x: Tensor) -> bool:
        if x.is_inference():  # counts no versions, so a change in place between two layers would go unseen
            return False
        return self._last is not None and self._last() is x and self._last_version == x._version

    def _diverged(self, fqn: str) -> str:
        return (
            f"layer {fqn!r} received the tensor of {self.leader!r} at first and another one later, so the two cannot "
            "share a covariance. Calibrate again with share_inputs=False."
        )


def _remove_bias(covariance: Covariance, layer: nn.Module) -> None:
    """Turn the sums of y = W x + b into those of W x."""
    bias = bias_vector(layer)
    if bias is None:
        return
    total = covariance.total.double()
    bias = bias.double().view_as(total)
    cross = bias.unsqueeze(-1) * total.unsqueeze(-2)
    own = bias.unsqueeze(-1) * bias.unsqueeze(-2)
    corrected = covariance.second_moment.double() - cross - cross.mT + covariance.count * own
    covariance.second_moment.copy_(corrected)
    covariance.total.copy_(total - covariance.count * bias)


def _geometry(layer: nn.Module) -> object:
    """What besides the input tensor decides the rows: two layers may share only where this is equal."""
    if isinstance(layer, nn.Conv2d):
        return (layer.kernel_size, layer.stride, layer.padding, layer.padding_mode, layer.dilation, layer.groups)
    return "linear"
