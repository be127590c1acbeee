"""The losses whose output gradients calibration streams: one scalar per batch, from the model's output.

The second moment G = E[g g^T] of a layer's output gradients is the metric in which an output error increases the loss.
For a negative log-likelihood it is the output's block of the Fisher information (Martens 2014, arXiv 1412.1193).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..files import digest
from ..models.masks import real_rows
from ..models.running import NO_REAL_ROW, output_tensor
from .distributed import rank_and_world

Sensitivity = str | Callable[[Any, Any], Tensor]
# Scale of the mean's term of "pooled" beside the rows' term. Deep in a model the mean's gradients, equal at all rows,
# are the larger ones. Of .1 to 1, .35 was best or near it for a sentence encoder, with and without reconstruction.
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
            f"sensitivity must be a function loss(output, batch), or one of {', '.join(map(repr, KINDS))}; "
            f"got {sensitivity!r}."
        )


def objective(sensitivity: Sensitivity, output: Any, batch: Any, mask: Tensor | None) -> Objective:
    """The scalar that is differentiated for one batch.

    Args:
        sensitivity: a function ``loss(output, batch)`` that gives a scalar summed over samples, or a tensor of losses
            by sample; ``"fisher"``: the negative log-likelihood of labels drawn from the model's own distribution;
            ``"output"``: the output times random signs, whose expected squared gradient is that of the squared
            output (Hutchinson 1989); ``"pooled"``: the same for outputs (batch, positions, features) whose mean over
            the positions is what is used, up to its length (sentence embeddings), see :func:`_pooled`.
        output: of the model.
        batch: that the model was given.
        mask: (batch, positions), the real positions; drops the others from outputs (batch, positions, features).

    Random draws depend on the state of torch's generator (which advances), on the batch, and on the process's rank. So
    with one seed, calibrations of several parts of the data or in several processes still draw independently, and a run
    with the same seed, batches and rank repeats its draws.
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
    generator = _generator(batch, values.device)
    if sensitivity == "pooled":
        rows, mean = _pooled(values, mask)
        of_rows, of_mean = _signs(rows, generator), _signs(mean, generator)
        return Objective((rows * of_rows).sum() + (mean * of_mean).sum(), samples)
    if mask is not None and values.shape[:-1] == mask.shape:
        values = values[mask.to(values.device)]
    if sensitivity == "output":
        signs = _signs(values, generator)
        return Objective((values.float() * signs).sum(), samples)
    log_likelihood = values.flatten(0, -2).float().log_softmax(-1)  # (draws, classes)
    labels = torch.multinomial(log_likelihood.detach().exp(), 1, generator=generator)
    return Objective(-log_likelihood.gather(-1, labels).sum(), len(labels))


def distance(sensitivity: Sensitivity, output: Any, target: Any, batch: Any, mask: Tensor | None) -> Tensor:
    """The loss of a changed model, whose second derivative at the dense model is what :func:`objective` streams.

    Args:
        sensitivity, output, batch, mask: as for :func:`objective`.
        target: the dense model's output; not used if ``sensitivity`` is a function.

    Returns:
        A scalar, summed over samples: the function's value, the Kullback-Leibler divergence of ``"fisher"``, or half
        the squared difference of ``"output"`` and ``"pooled"``.
    """
    if callable(sensitivity):
        return objective(sensitivity, output, batch, mask).loss
    changed, dense = (_tensor(part, sensitivity) for part in (output, target))
    if changed.shape != dense.shape:
        raise ValueError(
            f"the compressed model returns {tuple(changed.shape)} where the dense returns {tuple(dense.shape)}; the "
            "shape of the output must not depend on the weights, or pass a function as sensitivity."
        )
    if sensitivity == "pooled":
        rows, mean = _pooled(dense, mask)
        changed_rows, changed_mean = _pooled(changed, mask, mean.norm(dim=-1, keepdim=True))
        return 0.5 * ((changed_rows - rows).square().sum() + (changed_mean - mean).square().sum())
    if mask is not None and changed.shape[:-1] == mask.shape:
        changed, dense = (part[mask.to(part.device)] for part in (changed, dense))
    if sensitivity == "output":
        return 0.5 * (changed.float() - dense.float()).square().sum()
    log_q, log_p = (part.flatten(0, -2).float().log_softmax(-1) for part in (changed, dense))
    return F.kl_div(log_q, log_p, reduction="sum", log_target=True)


def divergence(output: Any, dense: Any, mask: Tensor | None, temperature: float, argument: str, instead: str) -> Tensor:
    """temperature^2 KL(dense || student) of the softened distributions, mean over the rows that are real.

    Args:
        output, dense: of the student, which is compressed, and of the dense model, with logits (..., classes).
        mask: (batch, positions), the real positions.
        temperature: divides the logits.
        argument, instead: what asked for the divergence and what could be passed instead, for errors.

    Raises:
        ValueError: no logits, logits of two shapes, or no real row.
    """
    logits = [found for part in (output, dense) if (found := output_tensor(part, ("logits",))) is not None]
    if len(logits) < 2:
        raise ValueError(
            f"{argument} needs logits in the models' output, a tensor or a field 'logits'; got "
            f"{type(output).__name__}. Pass a forward that returns logits, or {instead}."
        )
    if logits[0].shape != logits[1].shape:
        raise ValueError(
            f"{argument} returns logits of shape {tuple(logits[1].shape)}, but the student returns "
            f"{tuple(logits[0].shape)}; pass the dense model of this student, or a forward that returns logits of one "
            "shape."
        )
    if mask is not None and all(part.shape[:-1] == mask.shape for part in logits):  # not logits of a whole sequence
        logits = [real_rows(part, mask) for part in logits]
    if not logits[0].numel():
        raise ValueError(f"{argument}: a batch {NO_REAL_ROW}")
    log_q, log_p = ((part.flatten(0, -2).float() / temperature).log_softmax(-1) for part in logits)
    return temperature**2 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def _generator(batch: Any, device: torch.device) -> torch.Generator:
    """For one draw: seeded by torch's generator, the batch and the rank."""
    rank, _ = rank_and_world()
    seed = digest([int(torch.randint(2**62, (), device="cpu")), rank, batch])
    return torch.Generator(device).manual_seed(int(seed[:15], 16))


def _signs(values: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randint(2, values.shape, generator=generator, device=values.device, dtype=torch.int8) * 2 - 1


def _pooled(values: Tensor, mask: Tensor | None, length: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Every row, and the direction of their mean, (batch, features), times ``length`` (batch, 1).

    Calibration sums the effects of single rows on the loss. That underestimates errors which the rows of a sample have
    in common: they add up in the mean, while errors of single rows cancel. With the mean's term alone, layers near the
    output, whose gradients are equal at all rows, would get too few parameters. At a scale of 1 both terms are equally
    large at the output; see ``MEAN_SCALE``.
    """
    if values.dim() != 3 or (mask is not None and mask.shape != values.shape[:-1]):
        raise ValueError(
            "sensitivity='pooled' needs an output (batch, positions, features) and a mask (batch, positions) if any; "
            f"got {tuple(values.shape)}{'' if mask is None else f' and {tuple(mask.shape)}'}. Pass forward= that "
            "returns the rows before pooling, or sensitivity='output'."
        )
    values = values.float()
    real = torch.ones_like(values[..., :1]) if mask is None else mask.to(values).unsqueeze(-1)
    total = (values * real).sum(1)  # (batch, features)
    if length is None:
        length = MEAN_SCALE * total.detach().norm(dim=-1, keepdim=True)
    return values * real, F.normalize(total, dim=-1) * length


def _tensor(output: Any, kind: str) -> Tensor:
    found = output_tensor(output, _FIELDS[kind])
    if found is None:
        raise ValueError(
            f"sensitivity={kind!r} found no floating-point tensor in the output of type {type(output).__name__}; "
            "pass forward=, which picks one, or a function loss(output, batch) as sensitivity."
        )
    return found
