"""Computes ``lowrank_experts`` with library GEMMs: expert by expert, as grouped products, or with masks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

RANK_MULTIPLE = 8  # of stacked factors: grouped_mm needs strides of 16 bytes


def by_expert(x: Tensor, ends: Sequence[int], downs: list[Tensor], ups: list[Tensor], biases: list[Tensor]) -> Tensor:
    """Two GEMMs per expert that has rows; the second writes into the result. Not differentiable."""
    starts = [0, *ends]
    if any(end < start for start, end in pairwise([*starts, x.shape[0]])):
        raise ValueError(f"ends must be in ascending order and at most {x.shape[0]}, the rows of x; got {list(ends)}.")
    y = x.new_empty(x.shape[0], out_features(downs, ups))
    y[starts[-1] :] = 0
    for start, end, down, up, bias in zip(starts[:-1], ends, downs, ups, biases, strict=True):
        if end > start:
            rows = x[start:end]
            if up.dim() == 2:
                rows, down = torch.mm(rows, down.T), up
            if bias.numel():
                torch.addmm(bias, rows, down.T, out=y[start:end])
            else:
                torch.mm(rows, down.T, out=y[start:end])
    return y


def grouped(x: Tensor, ends: Tensor, downs: list[Tensor], ups: list[Tensor], biases: list[Tensor]) -> Tensor:
    """Two grouped GEMMs, with the factors copied into stacks that are padded to the largest rank; no up is missing."""
    experts, in_features, features = len(downs), x.shape[1], out_features(downs, ups)
    rank = -(-max(len(down) for down in downs) // RANK_MULTIPLE) * RANK_MULTIPLE
    zeros = x.new_zeros(rank, in_features)
    down = torch.cat([part for down in downs for part in (down, zeros[len(down) :])])
    zeros = x.new_zeros(features, rank)
    up = torch.cat([part for up in ups for part in (up, zeros[:, up.shape[1] :])], 1)
    ends = ends.int()
    t = F.grouped_mm(x, down.view(experts, rank, in_features).mT, offs=ends)
    y = F.grouped_mm(t, up.view(features, experts, rank).permute(1, 2, 0), offs=ends)
    expert = torch.searchsorted(ends, torch.arange(x.shape[0], device=x.device, dtype=ends.dtype), right=True)
    if any(bias.numel() for bias in biases):
        none = x.new_zeros(features)
        y = y + torch.stack([*(bias if bias.numel() else none for bias in biases), none])[expert]
    return y.masked_fill((expert == experts).unsqueeze(1), 0)  # rows of no expert, which grouped_mm leaves undefined


def masked(x: Tensor, ends: Tensor, downs: list[Tensor], ups: list[Tensor], biases: list[Tensor]) -> Tensor:
    """All experts on all rows: for graphs without shapes that depend on data."""
    rows = torch.arange(x.shape[0], device=x.device)
    y, before = x.new_zeros(x.shape[0], out_features(downs, ups)), rows.new_zeros(())
    for end, *part in zip(ends.unbind(), downs, ups, biases, strict=True):
        y = torch.where(((rows >= before) & (rows < end)).unsqueeze(1), _apply(x, *part), y)
        before = end
    return y


def backward(
    grad: Tensor,
    x: Tensor,
    ends: Sequence[int],
    downs: list[Tensor],
    ups: list[Tensor],
    biases: list[Tensor],
    needed: list[bool],  # of x, each down, each up, each bias
) -> list[Tensor]:
    """The gradients that are needed, in this order; ``x down^T`` is recomputed."""
    experts = len(downs)
    inputs = [x, *downs, *ups, *biases]
    found = [torch.zeros_like(tensor) if need else None for tensor, need in zip(inputs, needed, strict=True)]
    start = 0
    for index, end in enumerate(ends):
        if end > start:
            rows, part = slice(start, end), range(1 + index, len(inputs), experts)
            grad_x = None if found[0] is None else found[0][rows]
            _backward(grad[rows], x[rows], downs[index], ups[index], grad_x, *(found[i] for i in part))
        start = end
    return [tensor for tensor in found if tensor is not None]


def out_features(downs: Sequence[Tensor], ups: Sequence[Tensor]) -> int:
    """Of all experts."""
    return len(ups[0]) if ups[0].dim() == 2 else len(downs[0])


def _apply(x: Tensor, down: Tensor, up: Tensor, bias: Tensor) -> Tensor:
    given = bias if bias.numel() else None
    return F.linear(F.linear(x, down), up, given) if up.dim() == 2 else F.linear(x, down, given)


def _backward(
    grad: Tensor,
    x: Tensor,
    down: Tensor,
    up: Tensor,
    grad_x: Tensor | None,
    grad_down: Tensor | None,
    grad_up: Tensor | None,
    grad_bias: Tensor | None,
) -> None:
    """Write the gradients of one expert."""
    if grad_bias is not None:
        torch.sum(grad, 0, out=grad_bias)
    if up.dim() == 2:
        if grad_up is not None:
            torch.mm(grad.T, F.linear(x, down), out=grad_up)
        if grad_x is None and grad_down is None:
            return
        grad = grad @ up
    if grad_down is not None:
        torch.mm(grad.T, x, out=grad_down)
    if grad_x is not None:
        torch.mm(grad, down, out=grad_x)
