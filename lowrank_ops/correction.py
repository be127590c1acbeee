"""correct_predictions: predicted losses that include how errors add up over the rows of a sample.

K-FAC's statistics treat rows (tokens, positions) as independent. Attention averages its values over tokens, so errors
that tokens have in common add up there, and the loss predicted for such a layer may be far too small. One more
pass measures, for every direction, the second moment over samples of the loss's derivative along it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from .arguments import check_positive, checked
from .calibration.call_weights import SEED
from .calibration.covariances import Covariances
from .calibration.gradients import OutputGradient
from .calibration.objectives import Sensitivity, check_sensitivity
from .calibration.recorder import NO_ROWS, Recorder
from .calibration.statistics import NonFiniteActivationError
from .config import check_channels
from .considered import considered_layers
from .models.experts import on_listed_experts
from .models.layers import FilterFn, find_layers, images, input_rows, is_conv
from .models.mask_sources import Mask
from .models.masks import Masks
from .models.running import EMPTY, ProgressBar, call_model, device_of, differentiable, in_layer, move, warn_caller
from .subspaces.channels import check_apart, with_channels
from .subspaces.layer import LayerSubspaces

_MEMORY = "Pass a smaller max_state_bytes, or leave the layer out with filter_fn."
PRIOR_SAMPLES = 8  # weight of the prediction, in measured samples


@checked()
@on_listed_experts
@torch.inference_mode(False)  # tensors made in inference mode could not be updated in the batches' passes
def correct_predictions(
    model: nn.Module,
    covariances: Covariances,
    batches: Iterable[Any],
    *,
    sensitivity: Sensitivity = "fisher",
    num_probes: int = 1,
    filter_fn: FilterFn | None = None,
    mask: Mask | None = None,
    unmasked_rows: str = "count",
    forward: Callable[[nn.Module, Any], Any] | None = None,
    centered: bool = True,
    channels: bool | Sequence[str] = False,
    max_state_bytes: int = 4 << 30,
    progress: bool = False,
) -> dict[str, LayerSubspaces]:
    """Subspaces whose predicted losses are measured along their directions, for ranks by loss.

    The predicted loss of dropping a direction is a product of two means over rows: of the squared output gradients, and
    of the squared activations. Here it is the mean over samples of the squared derivative of the sample's loss along
    the direction, in which the rows of a sample add up (eigenvalue-corrected K-FAC, George et al. 2018, arXiv
    1806.03884). Factors stay the same; allocations by loss, :func:`lowrank_ops.measured_ranks` and reports use it.
    Costs a forward and a backward pass of the dense model, and one decomposition of every layer, which compression
    then reuses.

    Args:
        model: the model that was calibrated; run in eval mode and returned to its previous state.
        covariances: from :func:`lowrank_ops.calibrate` with a sensitivity.
        batches: as for :func:`lowrank_ops.calibrate`, the same ones or some of them. A few dozen samples (sequences,
            images) are enough: the prediction counts as much as 8 of them.
        sensitivity: as for :func:`lowrank_ops.calibrate`. It may differ from the calibration's, as drawn labels from
            true ones, and may have any scale: gradients are rescaled to those of the statistics.
        num_probes: random draws per batch for a sensitivity given by name, with one backward pass each. Each draw of a
            sample counts as a sample.
        mask, unmasked_rows, forward: as for :func:`lowrank_ops.calibrate`.
        filter_fn: as for :func:`lowrank_ops.compress_`.
        centered, channels: as in the configuration of the compression.
        max_state_bytes: bound on the directions held; with fewer bytes than all layers need, batches run several times.
        progress: show progress bars.

    Returns:
        ``{fqn: LayerSubspaces}``, for the ``subspaces=`` of :func:`lowrank_ops.compress_` and of searches.

    Raises:
        NonFiniteActivationError: NaN or inf in an input or in a gradient.
        ValueError: covariances without output gradients or of another model, no sample, an invalid argument, channels
            that are read outside their MLP.

    Example:
        >>> import torch, lowrank_ops as lro
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 64))
        >>> batches = [torch.randn(64, 64)]
        >>> covariances = lro.calibrate(model, batches, sensitivity="fisher")
        >>> subspaces = lro.correct_predictions(model, covariances, batches)
        >>> report = lro.compress_(model, covariances, lro.ParameterBudget(0.5), subspaces=subspaces)
    """
    check_sensitivity(sensitivity)
    check_positive(num_probes=num_probes, max_state_bytes=max_state_bytes)
    if not covariances.has_output_gradients:
        raise ValueError("covariances hold no output gradients to correct; use calibrate(..., sensitivity=...) first.")
    given, _ = considered_layers(model, covariances, filter_fn, None, centered=centered)
    subspaces = with_channels(model, given, channels if isinstance(channels, bool) else check_channels(channels))
    found, _ = find_layers(model)
    layers = {fqn: found[fqn] for fqn in subspaces}
    batches = list(batches)
    if not batches:
        raise ValueError(EMPTY)
    run, device = forward or call_model, device_of(model)
    check_apart(model, subspaces, lambda: run(model, move(batches[0], device)))
    warning, differs = None, False
    for part in _parts(subspaces, max_state_bytes):
        directions: dict[str, _Directions] = {}
        for fqn in ProgressBar(part, desc="decomposing", unit="layer", disable=not progress):
            with in_layer(fqn, _MEMORY):
                directions[fqn] = _Directions(fqn, layers[fqn], subspaces[fqn])
        samples = 0
        masks = Masks(model, mask, unmasked_rows)
        recorder = Recorder(layers, masks, share=False)
        with ExitStack() as stack:
            stack.enter_context(differentiable(model, SEED))
            stack.callback(recorder.detach)
            recorder.attach(model, {}, torch.float64)
            recorder.attach_gradient_reader(save_inputs=True)
            for batch in ProgressBar(batches, desc="directions", unit="batch", disable=not progress):
                moved = move(batch, device)
                output = run(model, moved)
                for probe in range(num_probes):
                    retain = probe + 1 < num_probes
                    gradients, count = recorder.gradients_of(sensitivity, output, moved, retain)
                    samples += count
                    for gradient in gradients:
                        if gradient.fqn in directions:
                            directions[gradient.fqn].add(gradient)
                    gradients.clear()
                    for each in directions.values():
                        each.finish_draw()
                del output  # which would keep this batch's graph during the next forward
        if not samples:
            raise ValueError(NO_ROWS)
        for fqn, each in directions.items():
            each.correct(subspaces[fqn])
            differs |= bool(each.squares.any())
        warning = masks.finish()  # the same for all parts
    if not differs:
        raise ValueError(NO_ROWS)
    if warning is not None:
        warn_caller(warning)
    return given


def _parts(subspaces: Mapping[str, LayerSubspaces], max_bytes: int) -> Iterator[list[str]]:
    """Layers with output gradients whose directions fit into ``max_bytes``, at least one at a time."""
    part: list[str] = []
    held = 0
    for fqn, space in subspaces.items():
        if space.loss is None:
            continue
        groups, in_features, out_features = space.dimensions
        size = 4 * groups * space.max_rank * (in_features + out_features)
        if part and held + size > max_bytes:
            yield part
            part, held = [], 0
        part.append(fqn)
        held += size
    if part:
        yield part


class _Directions:
    """The directions of one layer, and the squared derivatives of samples' losses along them."""

    def __init__(self, fqn: str, layer: nn.Module, space: LayerSubspaces) -> None:
        assert space.loss is not None
        self.fqn, self.layer = fqn, layer
        self.groups = space.dimensions.groups
        left, down, up = space.loss.projection(space.max_rank)
        offset = torch.zeros_like(down[..., :1])
        if space.centered and space.statistics.side == "input":
            offset = down @ space.mean.unsqueeze(-1)
        elif space.centered and left is not None:
            offset = left @ space.output_mean.unsqueeze(-1)
        weight = layer.get_parameter("weight")
        self.down, self.up, self.offset = (  # groups first
            part.reshape(self.groups, *part.shape[-2:]).to(weight.device, weight.dtype)
            for part in (down, up, offset.mT)
        )
        space.release(directions=False)
        self.squares = torch.zeros(self.groups, down.shape[-2], dtype=torch.float64)
        self.samples = 0
        self.gradient_squares = 0.0  # sum of |g|^2
        self.calls: list[Tensor] = []  # of the batch, (groups, samples, directions)

    @torch.no_grad()
    def add(self, gradient: OutputGradient) -> None:
        """Add one call: the sum over a sample's rows of (up^T g) (down (x - mean)), direction by direction."""
        if gradient.activation is None or not gradient.values.numel():
            return
        x, g, mask = gradient.activation.values(self.fqn), gradient.values, gradient.mask
        if is_conv(self.layer):
            g, mask = images(self.layer, g).movedim(1, -1), None
        elif g.is_nested:  # padded rows have no gradient
            x, g = (torch.nested.to_padded_tensor(part, 0.0) for part in (x, g))
        samples = len(g) if g.dim() > 1 else 1
        keep = None
        if mask is not None and g.shape[:-1] in (mask.shape, (mask.numel(),)):
            samples, keep = len(mask), mask.to(g.device).reshape(1, len(mask), -1, 1)
        rows = (part.reshape(-1, self.groups, part.shape[-1] // self.groups) for part in (input_rows(self.layer, x), g))
        x, g = (part.movedim(1, 0).to(self.down.dtype) for part in rows)  # (groups, rows, features)
        products = ((x @ self.down.mT - self.offset) * (g @ self.up)).float().unflatten(1, (samples, -1))
        self.calls.append((products if keep is None else products.where(keep, 0.0)).sum(2))
        squares = g.float().square().sum(-1, keepdim=True).unflatten(1, (samples, -1))
        self.gradient_squares += float((squares if keep is None else squares.where(keep, 0.0)).sum(dtype=torch.float64))

    def finish_draw(self) -> None:
        """Sum the calls of a batch's forward, and add the squares."""
        alike = {part.shape for part in self.calls}
        for part in [torch.stack(self.calls).sum(0)] if len(alike) == 1 else self.calls:
            self.squares += part.double().square().sum(1).cpu()
            self.samples += part.shape[1]
        self.calls.clear()

    def correct(self, space: LayerSubspaces) -> None:
        """Store the corrected spectrum, with gradients rescaled to the mean square of the statistics.

        So the units do not depend on the sensitivity, such as a mean over rows instead of a sum.
        """
        assert space.loss is not None and space.statistics.output_gradients is not None
        if not self.samples:
            return
        if not bool(self.squares.isfinite().all()):
            raise NonFiniteActivationError(
                f"layer {self.fqn!r}: its input or its output gradient holds NaN or inf. Check the batches, or run the "
                "model in a wider dtype."
            )
        spectrum = space.loss.subspace.spectrum
        expected = float(space.statistics.output_gradients.mean_square.sum())
        scale = expected / self.gradient_squares if self.gradient_squares else 0.0
        measured = (self.squares * scale).to(spectrum).view(spectrum.shape)
        trust = self.samples / (self.samples + PRIOR_SAMPLES)
        space.loss.corrected = trust * measured + (1 - trust) * spectrum
