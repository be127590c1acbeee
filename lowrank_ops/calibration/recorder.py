"""The hooks of one calibration, and the sums that they fill."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..models.layers import bias_vector, input_of, is_conv, output_rows
from ..models.masks import Masks, real_rows
from ..models.running import in_layer
from ..ops import covariance_finalize_
from .covariances import Covariances
from .distributed import rank_and_world
from .gradients import OutputGradient, OutputGradients
from .objectives import Sensitivity, objective
from .packing import from_lower_triangle
from .sampling import Sampler
from .statistics import LayerStatistics, Moments, NonFiniteActivationError
from .sums import Sums, geometry_of
from .token_weights import SavedActivation

_MEMORY = "Pass max_memory or offload, calibrate fewer layers with filter_fn, or use smaller batches."
NO_ROWS = (
    "no row reached a layer: the batches are empty, the mask excludes all positions, tokens is too small, or the "
    "model calls none of the layers that filter_fn keeps."
)


class Recorder:
    """Hooks on a model and its layers, and the sums that they fill.

    Args:
        layers: ``{fqn: layer}``.
        masks: of the model.
        share: layers that receive the same tensor share its sums.
        partial: other layers are recorded elsewhere, so a loss need not depend on these.
        tokens: the share of the rows that is added.

    Attributes:
        seed: decides which rows are chosen.
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
        self._activations: dict[str, Sums] = {}  # by layer; a layer that shares its input has its leader's
        self._touched: dict[str, Sums] = {}  # since the last check, in the order of the calls
        self._gradients = OutputGradients()
        self._output_gradients: dict[str, Sums] = {}
        self._token_weighted: dict[str, Sums] = {}
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

    def gradients_of(
        self, sensitivity: Sensitivity, output: Any, batch: Any, retain_graph: bool = False
    ) -> tuple[list[OutputGradient], int]:
        """The gradients of the last forward's objective at the layers' outputs, call by call, and its samples."""
        loss, samples = objective(sensitivity, output, batch, self._masks.of_output())
        return self._differentiate(loss, retain_graph), samples

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
            if saved is not None:
                side = self._sides[fqn]
                weighted = self._sums_of_loss(self._token_weighted, fqn, side, f"token-weighted {side}")
            with torch.no_grad(), in_layer(fqn, _MEMORY):
                rows = output_rows(layer, values)
                sums.update(rows if is_conv(layer) else real_rows(rows, mask))
                if saved is not None:
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

    def _sums_of_loss(self, sums: dict[str, Sums], fqn: str, side: str, what: str) -> Sums:
        if fqn not in sums:
            sums[fqn] = self._new_sums(fqn, side, self._gradient_dtype, what, of_loss=True)
        self._touched[f"{what} of {fqn}"] = sums[fqn]
        return sums[fqn]

    def detach(self) -> None:
        """Remove every hook, and drop the graphs of forwards that no loss was observed for."""
        for handle in self._handles:
            handle.remove()
        self._gradients = OutputGradients()

    def _new_sums(self, fqn: str, side: str, dtype: torch.dtype, what: str, of_loss: bool = False) -> Sums:
        with in_layer(fqn, _MEMORY):
            sums = Sums(fqn, self._layers[fqn], side, dtype, what, of_loss)
        sums.sampler = Sampler(self._tokens, f"{self.seed} {what}")  # alike in all passes
        return sums

    def _all_sums(self) -> list[tuple[str, Sums]]:
        kinds: dict[str, Mapping[Any, Sums]] = {
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
            tensors[f"{i}.second_moment"] = sums.moments.packed("disk")  # half of the sums, beside them in memory
            shifted = sums.moments.shift is not None
            draws = [sums.sampler.calls, sums.sampler.seen]
            part = {"kind": kind, "calls": sums.calls, "count": sums.moments.count, "shifted": shifted, "draws": draws}
            parts.append(part)
        return {"samples": self._samples, "batch": self._batch, "parts": parts}, tensors

    def restore(self, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Restore the :meth:`state` of a recorder with the same layers and arguments."""
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
            sums.moments.to_float64_device_()

        def moments(of: Mapping[str, Sums], fqn: str) -> Moments | None:
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
            with torch.no_grad(), in_layer(fqn, _MEMORY):
                if is_conv(layer):
                    sums.update_conv(layer, x.detach())
                else:
                    sums.update(real_rows(x.detach(), self._mask_of(fqn, x)))

    def _part(self, sums: Sums, layers: Iterable[str]) -> None:
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
        with torch.no_grad(), in_layer(fqn, _MEMORY):
            if is_conv(layer):
                sums.update(output_rows(layer, y.detach()))
            else:
                sums.update(real_rows(y.detach(), self._mask_of(fqn, x)))

    def _mask_of(self, fqn: str, x: Tensor) -> Tensor | None:
        """The mask of the rows of a layer's input and output; None where all count."""
        layer = self._layers[fqn]
        return None if is_conv(layer) else self._masks.of(fqn, layer, x)

    def _sums_of_input(self, fqn: str, layer: nn.Module, x: Tensor, dtype: torch.dtype) -> Sums:
        if fqn not in self._activations:
            leader = self._leader_of(fqn, layer, x) if self._share else None
            if leader is None:
                leader = self._new_sums(fqn, "input", dtype, "input")
            else:
                leader.join(fqn)
            self._activations[fqn] = leader
        return self._activations[fqn]

    def _leader_of(self, fqn: str, layer: nn.Module, x: Tensor) -> Sums | None:
        """The sums of an earlier layer that has received this very tensor, in its one call so far."""
        for sums in self._touched.values():
            if sums.has_only_seen(x) and sums.geometry == geometry_of(layer) and self._masks.same(fqn, sums.leader):
                return sums
        return None


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
