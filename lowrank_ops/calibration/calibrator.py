"""Stream a model's activations into covariances: model + batches -> Covariances.

Forward hooks see every call of every layer. Training flags, gradients and the random state are restored afterwards.
With a sensitivity, one backward pass per batch also streams the gradients at the layers' outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..arguments import check_positive, checked
from ..models.experts import experts_listed, list_experts
from ..models.layers import (
    FilterFn,
    check_no_adapters,
    compiled_or_scripted,
    dimensions,
    find_layers,
    tied_layers,
    with_values,
)
from ..models.masks import Mask, Masks
from ..models.running import (
    EMPTY,
    call_model,
    device_of,
    evaluating,
    exclusive,
    in_batch,
    move,
    random_state_kept,
    warn_caller,
    without_fast_path,
)
from .distributed import failures_posted, post_failure
from .experts import pooling, pools_of, with_pooled_rows
from .objectives import Sensitivity, check_sensitivity
from .recorder import Recorder
from .statistics import Covariances

# ``side="auto"`` streams the output, whose moment is (ratio)^2 smaller, where in_features / out_features exceeds the
# ratio, unless the input's moment is small anyway.
OUTPUT_SIDE_RATIO = 16
SMALL_STATE_BYTES = 64 << 20


@failures_posted()
@checked(unmasked_rows="mask", num_probes="sensitivity")
def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    filter_fn: FilterFn | None = None,
    mask: Mask | None = None,
    unmasked_rows: str = "count",
    side: str = "auto",
    dtype: torch.dtype = torch.float64,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    sensitivity: Sensitivity | None = None,
    num_probes: int = 1,
    token_weights: bool = True,
    max_state_bytes: int = 2 << 30,
    share_inputs: bool = True,
    progress: bool = False,
) -> Covariances:
    """Run ``batches`` through ``model`` and collect the second moments of its layers' activations.

    Args:
        model: any module; run in eval mode and returned to its previous state.
        batches: each batch is passed to the model: a tensor, a tuple or list of positional arguments, or a mapping of
            keyword arguments. Tensors are moved to the device of the model's first parameter.
        filter_fn: ``filter_fn(module, fqn) -> bool`` selects layers; None selects all that can be compressed.
        mask: which positions count, for padded sequences: the name of an argument of the model's forward, or
            ``mask(args, kwargs) -> Tensor | None``, shape (batch, positions), true or non-zero for real tokens. Names
            that end in ``key_padding_mask`` are true for padding, as in torch. With ``"attention_mask"``, the models
            of transformers use the mask that each of their parts is called with: an encoder its own, a decoder its own,
            a vision tower none. For other models of several sequences pass a mask per module,
            ``{"encoder": "attention_mask", "decoder": "decoder_attention_mask"}``: a key is the name of a module or a
            ``"re:pattern"`` of names, and holds for all in it, unless a key names something inside; a value of None
            means no padding. Keys and values of a cross-attention have the mask of the sequence that they are of. Does
            not apply to convolutions.
        unmasked_rows: what to do with rows whose mask cannot be told, such as relative positions, or images beside
            text: ``"count"`` counts all of them, with a warning that names the layers; ``"error"`` refuses.
        side: ``"input"`` streams layer inputs, which every projection and measure can use; ``"output"`` streams
            outputs, which is enough for ``projection="output"`` and ``"loss"``. ``"auto"`` streams the input unless
            the output is narrower and the input's moment is too large: over ``max_state_bytes``, or over 64 MiB if
            the input is more than 16 times as wide as the output.
        dtype: of the sums, torch.float64 or torch.float32.
        forward: ``forward(model, batch)`` replaces the call of the model, for example to drop labels.
        sensitivity: the loss whose output gradients are streamed, by one more backward pass per batch; needed for
            loss-aware ranks and factors. ``"fisher"``: the log-likelihood of labels drawn from the model's own
            distribution (logits). ``"output"``: random signs times the model's output, for models without logits.
            ``"pooled"``: the same for outputs (batch, positions, features) that are averaged over positions later,
            such as sentence embeddings. Or ``loss(output, batch)``: a scalar summed (not averaged) over samples, or a
            tensor of losses by sample. Gradients of parameters are not changed.
        num_probes: random draws per batch for a sensitivity given by name, with one backward pass each. Draws depend on
            torch's seed, the batch and the rank of the process: parts of the data that are calibrated one by one and
            merged, or in several processes, draw independently. The same batches with the same seed draw the same
            again; for more draws of them use ``num_probes``.
        token_weights: with a sensitivity, also stream each layer's activations weighted per row (token, or position of
            an image) by |g|^2 relative to its mean over the sample, where g is the row's output gradient. Loss-aware
            ranks and factors then weight errors by row. Costs one more moment per layer, one more update per batch,
            and keeps the inputs until the backward pass.
        max_state_bytes: bound on one layer's input moment with ``side="auto"``, and with a sensitivity on the moment
            of its output gradients. A layer that would exceed the latter, such as the head of a language model, is
            skipped and stays dense; so is a layer whose weight is tied, unless ``filter_fn`` selects it.
        share_inputs: keep one moment for layers that receive the same tensor (q, k, v; gate, up). Tensors created
            under ``torch.inference_mode`` are not shared, because in-place changes to them cannot be detected.
        progress: show a progress bar.

    Returns:
        The covariances, with ``unreached`` and ``skipped`` layers named. A warning names the modules that are not
        supported, unless ``filter_fn`` selected the layers.

    Raises:
        NonFiniteActivationError: NaN or inf in an activation or a gradient.
        RuntimeError: another thread calibrates, compresses or searches the model.
        TypeError: an argument of another type, such as a single batch for ``batches``.
        ValueError: an invalid argument, no batch, no layer to calibrate, no row that reaches one, or with
            ``token_weights`` an input that was changed in place before the backward pass.

    Example:
        >>> import torch, lowrank_ops as lro
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> covariances = lro.calibrate(model, [torch.randn(32, 8) for _ in range(4)], sensitivity="fisher")
        >>> covariances["0"].activations.count, covariances.has_output_gradients
        (128, True)
    """
    if sensitivity is not None:
        check_sensitivity(sensitivity)
    check_positive(num_probes=num_probes)
    run, device, seen = forward or call_model, device_of(model), 0
    with ExitStack() as stack:
        if sensitivity is not None:
            stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(sensitivity is not None))
        calibrator = stack.enter_context(
            Calibrator(
                model,
                output_gradients=sensitivity is not None,
                filter_fn=filter_fn,
                mask=mask,
                unmasked_rows=unmasked_rows,
                side=side,
                dtype=dtype,
                token_weights=token_weights,
                max_state_bytes=max_state_bytes,
                share_inputs=share_inputs,
            )
        )
        for batch in tqdm(batches, desc="calibrating", unit="batch", disable=not progress):
            moved = move(batch, device)
            with in_batch(seen):
                output = run(model, moved)
                if sensitivity is not None:
                    for probe in range(num_probes):
                        retain_graph = probe + 1 < num_probes
                        calibrator._recorder.add_loss(sensitivity, output, moved, retain_graph)
            seen += 1
        if not seen:
            raise ValueError(EMPTY)
    return calibrator.covariances


class Calibrator:
    """Collects covariances from whatever runs inside its ``with`` block, for training or inference loops of your own.

    Args:
        model: the model that the block runs; in eval mode inside the block.
        output_gradients: also stream output gradients. Run each forward with gradients enabled, and then pass its loss
            to :meth:`observe`; the forward's graph is kept until then.
        filter_fn, mask, unmasked_rows, side, dtype, token_weights, max_state_bytes, share_inputs: as for
            :func:`calibrate`.

    Attributes:
        skipped: ``{fqn: reason}`` of the layers that are left out.

    Raises:
        TypeError, ValueError: as for :func:`calibrate`. Losses by name, such as ``"fisher"``, are for that function.
        RuntimeError: a second ``with`` block of the same object; another thread works on the model; or the model ran
            in other threads only. Rows of other threads, such as requests to a model that is served, are not counted.

    Example:
        >>> import torch, lowrank_ops as lro
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> with lro.Calibrator(model, output_gradients=True) as calibrator:
        ...     for x, labels in [(torch.randn(32, 8), torch.randint(4, (32,)))]:
        ...         loss = torch.nn.functional.cross_entropy(model(x), labels, reduction="sum")
        ...         calibrator.observe(loss, samples=len(labels))
        >>> calibrator.covariances["2"].output_gradients.count
        32
    """

    @checked(unmasked_rows="mask")
    def __init__(
        self,
        model: nn.Module,
        *,
        output_gradients: bool = False,
        filter_fn: FilterFn | None = None,
        mask: Mask | None = None,
        unmasked_rows: str = "count",
        side: str = "auto",
        dtype: torch.dtype = torch.float64,
        token_weights: bool = True,
        max_state_bytes: int = 2 << 30,
        share_inputs: bool = True,
    ) -> None:
        if side not in ("auto", "input", "output"):
            raise ValueError(f"side must be 'auto', 'input' or 'output'; got {side!r}.")
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype must be torch.float32 or torch.float64, the dtype of the sums; got {dtype}.")
        check_positive(max_state_bytes=max_state_bytes)
        if (reason := compiled_or_scripted(model)) is not None:
            raise ValueError(f"model cannot be calibrated: {reason}.")
        check_no_adapters(model)
        self._listed = list_experts(model)
        with experts_listed(model, listed=self._listed):
            layers, self.skipped = find_layers(model, filter_fn)
            self._pools, twins = pools_of(model, layers)
        layers, without = with_values(layers)
        self.skipped |= without
        tied_or_large = {}
        if output_gradients:
            tied_or_large = _without_output_gradients(model, layers, dtype, max_state_bytes, filter_fn)
            layers = {fqn: layer for fqn, layer in layers.items() if fqn not in tied_or_large}
        if not layers:
            self.skipped |= tied_or_large
            reasons = "".join(f"\n  {fqn or '(the model)'}: {reason}" for fqn, reason in self.skipped.items())
            raise ValueError(f"model has no supported Linear, Conv1d, Conv2d or Conv1D that filter_fn keeps.{reasons}")
        _warn_of_skipped(self.skipped, filter_fn)
        self.skipped |= tied_or_large
        self._model, self._dtype = model, dtype
        self._output_gradients, self._token_weights = output_gradients, token_weights
        self._layers = tuple(layers)
        layers |= twins
        self._sides = {fqn: _side(layer, side, dtype, max_state_bytes) for fqn, layer in layers.items()}
        self._masks = Masks(model, mask, unmasked_rows)
        self._recorder = Recorder(layers, self._masks, share_inputs)
        self._stack: ExitStack | None = None  # while the block runs
        self._entered = False
        self._covariances: Covariances | None = None

    @property
    def covariances(self) -> Covariances:
        """The result, once the block has ended.

        Raises:
            AttributeError: it has not ended, or ended with an exception.
        """
        if self._covariances is None:
            raise AttributeError(
                "covariances exist when the with block of the Calibrator has ended without an exception; read them "
                "after the block."
            )
        return self._covariances

    def __enter__(self) -> Calibrator:
        if self._entered:
            raise RuntimeError("a Calibrator runs one with block; create another one, and merge the covariances.")
        self._entered = True
        with ExitStack() as stack:
            stack.enter_context(exclusive(self._model))
            stack.enter_context(experts_listed(self._model, listed=self._listed))
            stack.enter_context(pooling(self._pools))
            stack.enter_context(without_fast_path(self._output_gradients))
            stack.enter_context(evaluating(self._model))
            stack.enter_context(random_state_kept(self._model))
            stack.callback(self._recorder.detach)
            self._recorder.attach(self._model, self._sides, self._dtype)
            if self._output_gradients:
                self._recorder.attach_output_gradients(self._dtype, self._token_weights)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *trace: object) -> None:
        stack, self._stack = self._stack, None
        assert stack is not None
        if kind is not None:
            stack.close()
            post_failure(error or kind())
            return
        with failures_posted():
            with stack:
                self._recorder.check_finite()
            self._covariances = with_pooled_rows(self._recorder.finish(self.skipped), self._layers)
            if (warning := self._masks.finish()) is not None:
                warn_caller(warning)
            if self._output_gradients and not self.covariances.has_output_gradients:
                warn_caller("Calibrator(output_gradients=True) received no loss; call observe inside its block.")

    @checked()
    def observe(self, loss: Tensor, samples: int, *, retain_graph: bool = False) -> None:
        """Add the gradients of a loss at the layers' outputs, by one backward pass that does not change ``.grad``.

        Args:
            loss: scalar, summed (not averaged) over the samples of the forwards since the last call.
            samples: the number of those samples.
            retain_graph: keep the graph, for another loss of the same forwards.

        Raises:
            RuntimeError: outside the block, or without ``output_gradients=True``.
            ValueError: the loss is not a scalar, or depends on no layer of these forwards.
        """
        if self._stack is None or not self._output_gradients:
            raise RuntimeError("observe works inside a with block of Calibrator(model, output_gradients=True).")
        if loss.numel() != 1 or not loss.is_floating_point():
            raise ValueError(
                f"loss must be a scalar tensor, summed over samples; got {loss.dtype} of shape {tuple(loss.shape)}."
            )
        check_positive(samples=samples)
        self._recorder.add_gradients(loss.sum(), samples, retain_graph)


def _without_output_gradients(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    dtype: torch.dtype,
    max_state_bytes: int,
    filter_fn: FilterFn | None,
) -> dict[str, str]:
    """``{fqn: reason}`` of layers that are not streamed with output gradients: tied ones and vocabulary-sized heads."""
    tied = tied_layers(model) if filter_fn is None else {}
    found = {}
    for fqn, layer in layers.items():
        groups, _, out_features = dimensions(layer)
        state_bytes = groups * out_features**2 * dtype.itemsize
        if fqn in tied:
            found[fqn] = f"its weight is tied to {tied[fqn]!r}"
        elif state_bytes > max_state_bytes:
            found[fqn] = (
                f"the second moment of its output gradients would take {state_bytes / 2**30:.1f} GiB, more than "
                f"max_state_bytes ({max_state_bytes / 2**30:.1f} GiB)"
            )
    return found


def _warn_of_skipped(skipped: Mapping[str, str], filter_fn: FilterFn | None) -> None:
    if skipped and filter_fn is None:
        reasons = "".join(f"\n  {fqn}: {reason}" for fqn, reason in skipped.items())
        warn_caller(f"calibration skips unsupported modules:{reasons}")


def _side(layer: nn.Module, side: str, dtype: torch.dtype, max_state_bytes: int) -> str:
    if side != "auto":
        return side
    groups, in_features, out_features = dimensions(layer)
    state_bytes = groups * in_features**2 * dtype.itemsize
    if out_features >= in_features:
        return "input"
    much_wider = in_features > OUTPUT_SIDE_RATIO * out_features and state_bytes > SMALL_STATE_BYTES
    return "output" if much_wider or state_bytes > max_state_bytes else "input"
