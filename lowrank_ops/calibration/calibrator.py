"""Stream a model's activations into covariances: model + batches -> Covariances.

Forward hooks read the input or output of every call of every layer. With a sensitivity, one backward pass per batch
also streams the gradients at the layers' outputs. Training flags, gradients and random states are restored afterwards.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import check_positive, checked
from ..files import digest
from ..models.experts import experts_listed
from ..models.interrupts import uninterrupted_exits
from ..models.layers import FilterFn
from ..models.mask_sources import Mask
from ..models.masks import Masks
from ..models.running import (
    EMPTY,
    ProgressBar,
    call_model,
    check_differentiable,
    device_of,
    evaluating,
    exclusive,
    in_batch,
    move,
    random_state_kept,
    warn_caller,
    without_fast_path,
)
from .covariances import Covariances
from .distributed import failures_posted, post_failure, rank_and_world
from .experts import pooling, with_pooled_rows
from .gradients import NO_GRADIENTS
from .objectives import Sensitivity, check_sensitivity
from .plan import CalibrationPlan, make_plan
from .recorder import NO_ROWS, Recorder
from .resume import CalibrationCheckpoint
from .selection import select_layers


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
    tokens: float = 1.0,
    max_memory: int | str | None = None,
    offload: str | None = None,
    checkpoint: str | Path | None = None,
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
            that end in ``key_padding_mask`` are true for padding, as in torch. With ``"attention_mask"``, each part of
            a transformers model uses the mask that it is called with: an encoder its own, a decoder its own, a vision
            tower none. For other models with several sequences pass a mask per module,
            ``{"encoder": "attention_mask", "decoder": "decoder_attention_mask"}``: a key is a module name or a
            ``"re:pattern"`` of names, and applies to everything inside that module that no other key names; a value of
            None means no padding. Keys and values of a cross-attention have the mask of their own sequence. Masks do
            not apply to convolutions.
        unmasked_rows: what to do with rows whose mask is unknown, such as relative positions, or images beside
            text: ``"count"`` counts all of them and warns with the names of the layers; ``"error"`` raises.
        side: ``"input"`` streams layer inputs, which every projection and report can use; ``"output"`` streams
            outputs, which is enough for ``projection="output"`` and ``"loss"``. ``"smaller"`` streams the narrower one
            of each layer, for compression by these two with minimum memory. ``"auto"`` streams the input unless
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
            merged, or in several processes, draw independently. The same batches with the same seed give the same
            draws; for more draws use ``num_probes``.
        token_weights: with a sensitivity, also stream each layer's activations weighted per row (token, or position of
            an image) by |g|^2 relative to its mean over the sample, where g is the row's output gradient. Loss-aware
            ranks and factors then weight errors by row. Costs one more moment per layer, one more update per batch,
            and keeps the inputs until the backward pass.
        max_state_bytes: bound on one layer's input moment with ``side="auto"``, and with a sensitivity on the moment
            of its output gradients. A layer that would exceed the latter, such as the head of a language model, is
            skipped and stays dense; so is a layer whose weight is tied, unless ``filter_fn`` selects it.
        share_inputs: keep one moment for layers that receive the same tensor (q, k, v; gate, up). Tensors created
            under ``torch.inference_mode`` are not shared, because in-place changes to them cannot be detected.
        tokens: share of the rows (tokens, positions) that is used: each call of a layer adds a random subset, drawn by
            torch's seed, which holds each row with this probability; for convolutions, whole lines of the output. Saves
            the time of the sums, not of the model. Rows left out are checked for NaN too. Reports show the uncertainty
            of variances and errors from that number of rows.
        max_memory: bound on the bytes of the sums on each device, with the copies of rows that are added to them, an
            integer or a string such as ``"8GB"``; by default half of the free memory. If they need more, the batches
            run several times, each time for some of the layers; the result is the same up to rounding. A line on stderr
            then shows the plan, as :func:`plan_calibration` does in advance. The activations of a batch are not
            included, nor, with a sensitivity, its output gradients; the plan shows the bytes per row of the latter.
        offload: where finished sums are stored, as lower triangles: ``"cpu"``, in the CPU's memory, or ``"disk"``, in a
            temporary file (in TMPDIR). None leaves them on their device; if they do not fit into ``max_memory``, they
            are moved to the CPU, and if they do not fit there either, to the disk.
        checkpoint: a folder for the progress, written about once a minute. If it holds a calibration of the same model,
            batches and arguments, the call resumes it: batches that were added are skipped, and the result is
            bit-identical. A finished calibration is only read, and only the first batch is compared, if there is one.
            Delete the folder when it is no longer needed.
        progress: show a progress bar.

    Returns:
        The covariances, with ``unreached`` and ``skipped`` layers named. A warning names the modules that are not
        supported, unless ``filter_fn`` selected the layers.

    Raises:
        NonFiniteActivationError: NaN or inf in an activation or a gradient.
        RuntimeError: another thread calibrates, compresses or searches the model.
        OSError: the disk is full (``offload="disk"``, ``checkpoint``), or the checkpoint's folder cannot be created.
        TypeError: an argument of another type, such as a single batch for ``batches``.
        ValueError: an invalid argument, no batch, no layer to calibrate, no row that reaches one, with
            ``token_weights`` an input that was changed in place before the backward pass, a layer whose sums exceed
            ``max_memory``, batches that can be iterated only once where several passes are needed, or a ``checkpoint``
            of another calibration.

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
    calibrator = Calibrator(
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
        tokens=tokens,
    )
    plan = calibrator._plan(max_memory, offload)
    if progress or plan.passes > 1:
        ProgressBar.write(str(plan), file=sys.stderr)
    passes = [[layer.fqn for layer in plan.layers if layer.number == number] for number in range(plan.passes)]
    saved = None
    if checkpoint is not None:
        identity = calibrator._identity() | {
            "sensitivity": sensitivity if isinstance(sensitivity, str) else digest(sensitivity),
            "num_probes": num_probes,
            "mask": digest([mask, unmasked_rows]),
            "forward": digest(forward),
        }
        saved = CalibrationCheckpoint(checkpoint, identity, passes)
        passes = saved.passes
    if len(passes) > 1 and isinstance(batches, Iterator):
        raise ValueError(
            f"batches can be iterated only once, but the sums need {len(passes)} passes: {plan}. Pass a list or a "
            "DataLoader, or a larger max_memory."
        )
    if saved is not None:
        with random_state_kept(model) as generators:
            saved.check_first(batches, generators)
    parts: list[Covariances] = []
    seen, packed = 0, plan.offload is not None or len(passes) > 1
    for number, names in enumerate(passes):
        found = None if saved is None else saved.finished(number, packed)
        if found is None:
            part = calibrator if len(passes) == 1 else calibrator._over(names)
            title = f"calibrating, pass {number + 1} of {len(passes)}" if len(passes) > 1 else "calibrating"
            bar = ProgressBar(batches, desc=title, unit="batch", disable=not progress)
            count = _run(part, bar, forward or call_model, sensitivity, num_probes, saved)
            if seen and count != seen:
                raise ValueError(
                    f"batches gave {seen} batches in one pass and {count} in another; pass a collection that gives the "
                    "same ones each time, or a larger max_memory."
                )
            seen, found = count, part.covariances
            if saved is not None:
                saved.end(number, found)
        if packed:
            found.pack_(plan.offload)
        if share_inputs:
            found.share_equal_(parts)
        parts.append(found)
    if len(parts) == 1:
        return parts[0]
    statistics = {fqn: layer for part in parts for fqn, layer in part.items()}
    layers = calibrator._selected.layers
    unreached = tuple(fqn for fqn in layers if fqn not in statistics)
    whole = Covariances({fqn: statistics[fqn] for fqn in layers if fqn in statistics}, unreached, parts[0].skipped)
    if rank_and_world()[1] == 1 and (not whole or (sensitivity is not None and not whole.has_output_gradients)):
        raise ValueError(NO_GRADIENTS if whole else NO_ROWS)
    return whole


def _run(
    calibrator: Calibrator,
    batches: Iterable[Any],
    forward: Callable[[nn.Module, Any], Any],
    sensitivity: Sensitivity | None,
    num_probes: int,
    saved: CalibrationCheckpoint | None,
) -> int:
    """Run the batches inside the calibrator's block, and return their number."""
    model = calibrator._model
    device, seen = device_of(model), 0
    with uninterrupted_exits(), ExitStack() as stack:
        if sensitivity is not None:
            stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(sensitivity is not None))
        recorder, generators = stack.enter_context(calibrator)._recorder, calibrator._generators
        done = 0 if saved is None else saved.begin(recorder, generators)
        for batch in batches:
            seen += 1
            if saved is not None and seen <= done:
                saved.skip(seen - 1, batch, generators)
                continue
            moved = move(batch, device)
            with in_batch(seen - 1):
                output = forward(model, moved)
                if sensitivity is not None:
                    for probe in range(num_probes):
                        recorder.add_loss(sensitivity, output, moved, retain_graph=probe + 1 < num_probes)
            if saved is not None:
                saved.add(batch, recorder, generators)
        if not seen:
            raise ValueError(EMPTY)
        if seen < done:
            raise ValueError(f"checkpoint has added {done} batches, more than the {seen} that batches gave now.")
    return seen


class Calibrator:
    """Collects covariances from whatever runs inside its ``with`` block, for training or inference loops of your own.

    Args:
        model: the model that the block runs; in eval mode inside the block.
        output_gradients: also stream output gradients. Run each forward with gradients enabled, and then pass its loss
            to :meth:`observe`; the forward's graph is kept until then.
        filter_fn, mask, unmasked_rows, side, dtype, token_weights, max_state_bytes, share_inputs, tokens: as
            for :func:`calibrate`.

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
        tokens: float = 1.0,
    ) -> None:
        if not 0 < tokens <= 1:
            raise ValueError(f"tokens must be a number in (0, 1]; got {tokens!r}.")
        self._selected = select_layers(
            model,
            output_gradients=output_gradients,
            filter_fn=filter_fn,
            side=side,
            dtype=dtype,
            max_state_bytes=max_state_bytes,
        )
        self._model, self._dtype = model, dtype
        if output_gradients:
            check_differentiable(model)
        self._output_gradients, self._token_weights = output_gradients, token_weights
        self._new_masks, self._share = partial(Masks, model, mask, unmasked_rows), share_inputs
        self._masks = self._new_masks()
        self._tokens = tokens
        self._recorder = Recorder(self._selected.modules, self._masks, share_inputs, tokens=tokens)
        self._stack: ExitStack | None = None  # while the block runs
        self._entered = False
        self._covariances: Covariances | None = None

    @property
    def skipped(self) -> Mapping[str, str]:
        """Why layers are left out, by name."""
        return self._selected.skipped

    @property
    def covariances(self) -> Covariances:
        """The result, once the block has ended.

        Raises:
            AttributeError: it has not ended, or ended with an exception.
        """
        if self._covariances is None:
            raise AttributeError(
                "covariances are available after the with block of the Calibrator has ended without an exception."
            )
        return self._covariances

    def _plan(self, max_memory: int | str | None, offload: str | None) -> CalibrationPlan:
        return make_plan(
            self._selected,
            self._dtype,
            output_gradients=self._output_gradients,
            token_weights=self._token_weights,
            max_memory=max_memory,
            offload=offload,
        )

    def _identity(self) -> dict[str, str]:
        """What the sums depend on besides the batches, for a checkpoint."""
        sides, gradients = self._selected.sides, self._output_gradients
        arguments = [sides, self._dtype, gradients, self._token_weights, self._share, self._tokens]
        tensors = {**dict(self._model.named_parameters()), **dict(self._model.named_buffers())}
        if offloaded := [name for name, tensor in tensors.items() if tensor.is_meta]:
            raise ValueError(
                f"checkpoint cannot tell whether weights that accelerate has offloaded are the same ({offloaded[0]!r} "
                "first); leave checkpoint out, or load the model without offloading."
            )
        return {"arguments": digest([str(one) for one in arguments]), "weights": digest(tensors)}

    def _over(self, layers: Sequence[str]) -> Calibrator:
        """A calibrator of some of the layers, for one of several passes."""
        part = copy.copy(self)
        part._selected = self._selected.only(layers)
        part._masks = self._new_masks()
        part._recorder = Recorder(part._selected.modules, part._masks, self._share, partial=True, tokens=self._tokens)
        return part

    def __enter__(self) -> Calibrator:
        if self._entered:
            raise RuntimeError("a Calibrator runs one with block; create another one, and merge the covariances.")
        self._entered = True
        with ExitStack() as stack:
            stack.enter_context(exclusive(self._model))
            stack.enter_context(experts_listed(self._model, listed=self._selected.listed))
            stack.enter_context(pooling(self._selected.pools))
            stack.enter_context(without_fast_path(self._output_gradients))
            stack.enter_context(evaluating(self._model))
            self._generators = stack.enter_context(random_state_kept(self._model))
            self._recorder.seed = digest(self._generators[0].get_state())
            stack.callback(self._recorder.detach)
            self._recorder.attach(self._model, self._selected.sides, self._dtype)
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
            self._covariances = with_pooled_rows(self._recorder.finish(self.skipped), self._selected.layers)
            if (warning := self._masks.finish()) is not None:
                warn_caller(warning)
            if self._output_gradients and not self._recorder.partial and not self.covariances.has_output_gradients:
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
