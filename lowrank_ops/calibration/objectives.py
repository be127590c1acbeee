"""What the loss feels: gradients of a loss at the layers' outputs, one backward pass for all layers.

The second moment G = E[g g^T] of those gradients weighs output errors by what they do to the loss: with a loss of
negative log-likelihood it is the output's block of the Fisher information (Martens 2014, arXiv 1412.1193).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from ..models.running import output_tensor
from .token_weights import KeptRows

Sensitivity = str | Callable[[Any, Any], Tensor]
# Of the mean's part of "pooled", beside the rows'. Deep in a model its gradients, alike at all rows, are larger than
# theirs. A sentence encoder keeps less at 0.25 without a refit, and at 0.5 of docstrings, most of all with one.
MEAN_SCALE = 0.35
KINDS = ("fisher", "output", "pooled")

# Where a model's output is an object or a mapping, the tensor to take from it.
_FIELDS = {
    "fisher": ("logits",),
    "output": ("last_hidden_state", "logits"),
    "pooled": ("last_hidden_state",),
}


class Objective(NamedTuple):
    """A loss summed over samples, so that the gradient of each row is that of its own sample's loss."""

    loss: Tensor  # ()
    samples: int


def check_sensitivity(sensitivity: object) -> None:
    """Raise ValueError for what :func:`objective` cannot use."""
    if not callable(sensitivity) and sensitivity not in KINDS:
        raise ValueError(
            f"sensitivity must be None, a function loss(output, batch), or one of {', '.join(map(repr, KINDS))}; "
            f"got {sensitivity!r}."
        )


def objective(sensitivity: Sensitivity, output: Any, batch: Any, mask: Tensor | None) -> Objective:
    """What is differentiated for one batch.

    Args:
        sensitivity: a function ``loss(output, batch)`` that gives a scalar summed over samples, or a tensor of losses
            by sample; ``"fisher"``: the negative log-likelihood of labels drawn from the model's own distribution;
            ``"output"``: the output times random signs, whose expected squared gradient is that of the squared
            output (Hutchinson 1989); ``"pooled"``: the same for outputs (batch, positions, features) whose mean over
            the positions is what is used, up to its length (sentence embeddings), see :func:`_pooled_signs`.
        output: of the model.
        batch: that the model was given.
        mask: (batch, positions), the real positions; drops the others from outputs (batch, positions, features).
    """
    if callable(sensitivity):
        loss = sensitivity(output, batch)
        if not isinstance(loss, Tensor) or not loss.is_floating_point():
            raise ValueError(f"sensitivity must return a tensor of losses; it returned {type(loss).__name__}.")
        samples = loss.numel() if loss.dim() else len(_tensor(output, "output"))
        return Objective(loss.sum(), samples)
    values = _tensor(output, sensitivity)
    if sensitivity == "fisher" and (values.dim() > 3 or values.shape[-1] < 2):
        raise ValueError(
            f"sensitivity='fisher' needs logits of shape (..., classes) with at least 2 classes; got "
            f"{tuple(values.shape)}. Pass forward= that moves the classes last, sensitivity='output', or a loss."
        )
    samples = len(values)
    if sensitivity == "pooled":
        return Objective(_pooled_signs(values, mask), samples)
    if mask is not None and values.shape[:-1] == mask.shape:
        values = values[mask.to(values.device)]
    if sensitivity == "output":
        signs = torch.randint(2, values.shape, device=values.device, dtype=torch.int8) * 2 - 1
        return Objective((values.float() * signs).sum(), samples)
    log_likelihood = values.flatten(0, -2).float().log_softmax(-1)  # (draws, classes)
    labels = torch.multinomial(log_likelihood.detach().exp(), 1)
    return Objective(-log_likelihood.gather(-1, labels).sum(), len(labels))


def _pooled_signs(values: Tensor, mask: Tensor | None) -> Tensor:
    """Random signs times every row, plus random signs times the direction of their mean; a scalar.

    Calibration adds up what single rows do to the loss. The mean alone would be misjudged by that: errors that the rows
    of a sample have in common add up in it, errors of single rows cancel, and the layers near the output, whose
    gradients are alike at all rows, would get too small a part of the parameters. At a scale of 1 for the mean's
    part both parts are equally large at the output; see ``MEAN_SCALE``.
    """
    if values.dim() != 3 or (mask is not None and mask.shape != values.shape[:-1]):
        raise ValueError(
            "sensitivity='pooled' needs an output (batch, positions, features) and a mask (batch, positions) if any; "
            f"got {tuple(values.shape)}{'' if mask is None else f' and {tuple(mask.shape)}'}. Pass forward= that "
            "returns the rows before they are pooled, or sensitivity='output'."
        )
    values = values.float()
    real = torch.ones_like(values[..., :1]) if mask is None else mask.to(values).unsqueeze(-1)
    total = (values * real).sum(1)  # (batch, features)
    direction = F.normalize(total, dim=-1) * (MEAN_SCALE * total.detach().norm(dim=-1, keepdim=True))
    of_rows = torch.randint_like(values, 2) * 2 - 1
    of_mean = torch.randint_like(direction, 2) * 2 - 1
    return (values * of_rows * real).sum() + (direction * of_mean).sum()


def _tensor(output: Any, kind: str) -> Tensor:
    found = output_tensor(output, _FIELDS[kind])
    if found is None:
        raise ValueError(
            f"sensitivity={kind!r} found no tensor in the model's output of type {type(output).__name__}; pass "
            "forward=, which picks one, or a function loss(output, batch) as sensitivity."
        )
    return found


class Gradient(NamedTuple):
    """The gradient at one call of one layer."""

    fqn: str
    values: Tensor  # the shape of the layer's output
    mask: Tensor | None  # the mask of that forward
    rows: KeptRows | None  # what the layer was given in that call, where it is to be weighed


class GradientTaps:
    """Remembers where the layers' outputs entered the graph, for one backward pass per loss.

    Edges of the graph are kept rather than tensors: what the model does to an output in place afterwards does not
    change them, and no gradient is added to a parameter.
    """

    def __init__(self) -> None:
        self._taps: list[tuple[GradientEdge, str, Tensor | None, KeptRows | None]] = []

    def tap(self, fqn: str, y: Tensor, mask: Tensor | None, keep: Callable[[], KeptRows] | None) -> Tensor | None:
        """Remember a layer's output, with what ``keep`` gives; the tensor that takes its place, or None to leave it."""
        if y.is_inference() or not torch.is_grad_enabled():
            return None
        rows = None if keep is None else keep()
        if y.requires_grad:
            self._taps.append((get_gradient_edge(y), fqn, mask, rows))
            return None
        # Nothing before this layer needs a gradient: the graph starts here, at a copy, for a leaf could not be changed
        # in place by what follows.
        start = y.detach().requires_grad_().clone()
        self._taps.append((get_gradient_edge(start), fqn, mask, rows))
        return start

    def gradients(self, loss: Tensor, keep: bool = False) -> list[Gradient]:
        """The gradient of ``loss`` at every call that it depends on; forgets the calls unless ``keep``.

        Raises:
            ValueError: the loss depends on no layer.
        """
        taps, self._taps = self._taps, []
        found: Sequence[Tensor | None] = []
        if taps and loss.requires_grad:
            found = torch.autograd.grad(loss, [edge for edge, *_ in taps], retain_graph=keep, allow_unused=True)
        self._taps = taps if keep else []  # and not what gradient checkpointing has called again
        gradients = [
            Gradient(fqn, values, mask, rows)
            for (_, fqn, mask, rows), values in zip(taps, found, strict=False)
            if values is not None
        ]
        if not gradients:
            raise ValueError(
                "the loss of sensitivity depends on no layer: the model's forward runs without gradients "
                "(torch.no_grad, inference_mode, a detached output), or its loss was taken already. "
                "Let it run with gradients, in calibrate and refits by forward=, or do without sensitivity."
            )
        return gradients
