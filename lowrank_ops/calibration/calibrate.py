"""Stream a model's activations through the covariance op: model + batches -> Covariances.

Hooks see every call of every layer; the model is handed back as it was: training flags, gradients, random state.
With a loss, one backward pass per batch streams the gradients at the layers' outputs as well.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..models.layers import FilterFn, dimensions, find_layers
from ..models.masks import Mask
from ..models.running import call_model, device_of, evaluating, move, random_state_kept, without_fast_path
from .objectives import Sensitivity, check_sensitivity
from .recorder import Recorder
from .statistics import Covariances

# Past this ratio of input to output features, ``side="auto"`` streams the output, whose moment is (ratio)^2 smaller,
# unless the input's moment is too small to matter.
OUTPUT_SIDE_RATIO = 16
SMALL_STATE_BYTES = 64 << 20


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    filter_fn: FilterFn | None = None,
    mask: Mask | None = None,
    side: str = "auto",
    dtype: torch.dtype = torch.float64,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    sensitivity: Sensitivity | None = None,
    probes: int = 1,
    weigh_rows: bool = True,
    max_state_bytes: int = 2 << 30,
    share_inputs: bool = True,
    progress: bool = False,
) -> Covariances:
    """Run ``batches`` through ``model`` and collect the second moments of its layers' activations.

    Args:
        model: any module; evaluated in eval mode and handed back as it was.
        batches: what the model takes: tensors, tuples or lists (positional arguments) or mappings (keyword
            arguments). Tensors are moved to the device of the model's first parameter.
        filter_fn: ``filter_fn(module, fqn) -> bool`` chooses layers; None takes all that can be compressed.
        mask: which positions count, for padded sequences: the name of a keyword argument of the model's
            forward (``"attention_mask"``) or ``mask(args, kwargs) -> Tensor | None``; (batch, positions), true or
            non-zero where a token is real. Does not apply to convolutions.
        side: ``"input"`` streams layer inputs, which gives every measure; ``"output"`` streams outputs, which is
            enough for ``projection="output"``; ``"auto"`` takes the input unless the output is narrower and the
            input's moment would take more than ``max_state_bytes``, or more than 64 MiB where the input is over 16
            times as wide as the output.
        dtype: dtype of the sums, float64 or float32.
        forward: ``forward(model, batch)`` replaces the call of the model, to drop labels for instance.
        sensitivity: also stream the gradients at the layers' outputs, which ``projection="loss"`` and
            ``allocation="loss"`` need, by one backward pass per batch. ``"fisher"``: of the log-likelihood of labels
            drawn from the model's own output distribution (logits); ``"output"``: of random signs times the model's
            output, for models without one; ``"pooled"``: the same for outputs (batch, positions, features) that are
            averaged over the positions afterwards, such as sentence embeddings; or ``loss(output, batch)``, a scalar
            summed (not averaged) over samples or a tensor of losses by sample. Gradients of parameters are left as
            they are.
        probes: draws, and backward passes, per batch for the named ones.
        weigh_rows: with a sensitivity, also stream every layer's rows (tokens, positions of an image) with weights
            |g|^2, g being the row's gradient, relative to their mean over the sample (an index of the first
            dimension), by which ``projection="loss"`` and ``allocation="loss"`` know what the loss feels of a row.
            Takes one more moment for each layer, shared by none, one more update per batch, and inputs kept until
            the backward pass. False: all rows alike.
        max_state_bytes: bound on one layer's input moment under ``side="auto"``.
        share_inputs: keep one covariance for layers that receive the same tensor (q, k, v; gate, up). Tensors made
            under ``torch.inference_mode`` are not shared: nothing tells whether they were changed in between.
        progress: show a progress bar.

    Returns:
        The covariances, with ``unreached`` and ``skipped`` layers named. A warning names the skipped ones, unless
        ``filter_fn`` chose the layers.

    Raises:
        NonFiniteActivationError: NaN or inf in an activation or a gradient.
        ValueError: a bad argument, no batch, no layer to calibrate, or with ``weigh_rows`` a layer's input that was
            changed in place before the backward pass.
    """
    if isinstance(batches, (Tensor, Mapping, str)):
        raise TypeError(
            f"batches must be a collection of batches; got one {type(batches).__name__}. Pass [batch] for a single one."
        )
    if sensitivity is not None:
        check_sensitivity(sensitivity)
    if isinstance(probes, bool) or not isinstance(probes, int) or probes < 1:
        raise ValueError(f"probes must be a positive integer, the number of draws per batch; got {probes!r}.")
    run = forward or call_model
    device = device_of(model)
    seen = 0
    with (
        torch.inference_mode(False) if sensitivity is not None else nullcontext(),
        torch.set_grad_enabled(sensitivity is not None),
        without_fast_path(sensitivity is not None),
        _recording(model, filter_fn, mask, side, dtype, max_state_bytes, share_inputs) as (recorder, covariances),
    ):
        _warn_of_skipped(covariances, filter_fn, stacklevel=3)
        if sensitivity is not None:
            recorder.attach_taps(dtype, weigh_rows)
        for batch in tqdm(batches, desc="calibrating", unit="batch", disable=not progress):
            moved = move(batch, device)
            output = run(model, moved)
            if sensitivity is not None:
                for probe in range(probes):
                    recorder.see_loss(sensitivity, output, moved, keep=probe + 1 < probes)
            seen += 1
    if not seen:
        raise ValueError("batches was empty; pass at least one batch.")
    return covariances


class Calibration(Covariances):
    """The covariances that :func:`Calibrator` fills when its block ends."""

    _recorder: Recorder | None = None  # while the block runs and gradients are wanted

    def observe(self, loss: Tensor, samples: int, *, keep: bool = False) -> None:
        """Add the gradients of a loss at the layers' outputs, by one backward pass that leaves ``.grad`` alone.

        Args:
            loss: scalar, summed (not averaged) over the samples of the forwards since the last call.
            samples: how many samples that are.
            keep: another loss of the same forwards follows.

        Raises:
            RuntimeError: outside the block, or without ``sensitivity=True``.
            ValueError: the loss is no scalar, or depends on no layer.
        """
        if self._recorder is None:
            raise RuntimeError("observe works inside a with block of Calibrator(model, sensitivity=True).")
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
            given = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"loss must be a scalar tensor, summed over samples; got {given}.")
        if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
            raise ValueError(f"samples must be a positive integer; got {samples!r}.")
        self._recorder.see_gradients(loss.sum(), samples, keep)


@contextmanager
def Calibrator(
    model: nn.Module,
    *,
    filter_fn: FilterFn | None = None,
    mask: Mask | None = None,
    side: str = "auto",
    dtype: torch.dtype = torch.float64,
    sensitivity: bool = False,
    weigh_rows: bool = True,
    max_state_bytes: int = 2 << 30,
    share_inputs: bool = True,
) -> Iterator[Calibration]:
    """Collect covariances from whatever runs inside the ``with`` block; arguments as for :func:`calibrate`.

    The object that it gives is filled when the block ends. If the block raises, the model is restored all the same.
    With ``sensitivity=True`` it also takes losses of your own, where the forwards run with gradients::

        with lro.Calibrator(model, sensitivity=True) as covariances:
            for images, labels in batches:
                loss = cross_entropy(model(images), labels, reduction="sum")
                covariances.observe(loss, samples=len(labels))

    Each forward's graph is kept until ``observe`` takes a loss of it. A warning tells if none was taken.

    Raises:
        TypeError: ``sensitivity`` is no bool; the named ones are for :func:`calibrate`, which knows the batches.
    """
    if not isinstance(sensitivity, bool):
        raise TypeError(
            f"sensitivity must be True or False here; got {sensitivity!r}. Pass your losses to observe, or use "
            "calibrate(model, batches, sensitivity=...)."
        )
    found = Calibration()
    with (
        without_fast_path(sensitivity),
        _recording(model, filter_fn, mask, side, dtype, max_state_bytes, share_inputs, found) as (recorder, _),
    ):
        _warn_of_skipped(found, filter_fn, stacklevel=4)
        if sensitivity:
            recorder.attach_taps(dtype, weigh_rows)
            found._recorder = recorder
        try:
            yield found
        finally:
            found._recorder = None
    if sensitivity and not found.sensitivities:
        warnings.warn("Calibrator(sensitivity=True) was given no loss; call observe inside its block.", stacklevel=3)


@contextmanager
def _recording(
    model: nn.Module,
    filter_fn: FilterFn | None,
    mask: Mask | None,
    side: str,
    dtype: torch.dtype,
    max_state_bytes: int,
    share_inputs: bool,
    into: Covariances | None = None,
) -> Iterator[tuple[Recorder, Covariances]]:
    if side not in ("auto", "input", "output"):
        raise ValueError(f"side must be 'auto', 'input' or 'output'; got {side!r}.")
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype must be torch.float32 or torch.float64, the dtype of the sums; got {dtype}.")
    if hasattr(model, "_orig_mod") or model._compiled_call_impl is not None:
        raise ValueError("model is compiled, which hides its layers; calibrate and compress it before torch.compile.")
    layers, skipped = find_layers(model, filter_fn)
    if not layers:
        reasons = "".join(f"\n  {fqn or '(the model)'}: {reason}" for fqn, reason in skipped.items())
        raise ValueError(f"model has no Linear, Conv2d or Conv1D that filter_fn keeps and that can be seen.{reasons}")

    covariances = Covariances() if into is None else into
    covariances.skipped = skipped
    recorder = Recorder(layers, mask, share_inputs)
    with evaluating(model), random_state_kept(model):
        try:
            sides = {fqn: _side(layer, side, dtype, max_state_bytes) for fqn, layer in layers.items()}
            recorder.attach(model, sides, dtype)
            yield recorder, covariances
            recorder.check_finite()
        finally:
            recorder.detach()
    recorder.finish(covariances)


def _warn_of_skipped(covariances: Covariances, filter_fn: FilterFn | None, stacklevel: int) -> None:
    if covariances.skipped and filter_fn is None:
        reasons = "".join(f"\n  {fqn}: {reason}" for fqn, reason in covariances.skipped.items())
        warnings.warn(f"calibration leaves out what it cannot see into:{reasons}", stacklevel=stacklevel)


def _side(layer: nn.Module, side: str, dtype: torch.dtype, max_state_bytes: int) -> str:
    if side != "auto":
        return side
    groups, in_features, out_features = dimensions(layer)
    state_bytes = groups * in_features**2 * dtype.itemsize
    if out_features >= in_features:
        return "input"
    much_wider = in_features > OUTPUT_SIDE_RATIO * out_features and state_bytes > SMALL_STATE_BYTES
    return "output" if much_wider or state_bytes > max_state_bytes else "input"
