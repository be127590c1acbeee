"""Gradients of a loss at the outputs of layers: one backward pass for all layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from .token_weights import SavedActivation

NO_GRADIENTS = (
    "the loss depends on no layer: the forward ran without gradients (torch.no_grad, inference_mode, a detached "
    "output), or its loss was used already. Run the forward with gradients (see forward=), or calibrate without output "
    "gradients."
)


class OutputGradient(NamedTuple):
    """The gradient at the output of one call of one layer."""

    fqn: str
    values: Tensor  # the shape of the layer's output
    mask: Tensor | None  # the mask of that forward
    activation: SavedActivation | None  # of that call, where token weights are wanted


class OutputGradients:
    """The graph edges at the layers' outputs, for one backward pass per loss.

    Edges of the graph are kept rather than tensors: in-place changes by the model afterwards do not affect them, and
    no gradient is added to a parameter.
    """

    def __init__(self) -> None:
        self._edges: list[tuple[GradientEdge, str, Tensor | None, SavedActivation | None]] = []

    def watch(
        self, fqn: str, y: Tensor, mask: Tensor | None, save: Callable[[], SavedActivation] | None
    ) -> Tensor | None:
        """Record the edge of a layer's output ``y``, with the activation that ``save`` returns.

        Returns:
            A tensor that replaces ``y`` in the model, or None to leave ``y`` in place.
        """
        if y.is_inference() or not torch.is_grad_enabled():
            return None
        saved = None if save is None else save()
        if y.requires_grad and not y._is_view():
            self._edges.append((get_gradient_edge(y), fqn, mask, saved))
            return None
        # A copy, because the model may change the output in place: of a view, as Linear returns for more than two
        # dimensions, that takes the edge out of the graph. If nothing before this layer requires a gradient, the graph
        # starts here; autograd forbids changes in place for a leaf.
        start = (y if y.requires_grad else y.detach().requires_grad_()).clone()
        self._edges.append((get_gradient_edge(start), fqn, mask, saved))
        return start

    def of(self, loss: Tensor, retain_graph: bool = False, required: bool = True) -> list[OutputGradient]:
        """The gradient of ``loss`` at every call that it depends on; drops the calls unless ``retain_graph``.

        Raises:
            ValueError: the loss depends on no layer, although it is ``required`` to.
        """
        edges, self._edges = self._edges, []
        found: Sequence[Tensor | None] = []
        if edges and loss.requires_grad:
            found = torch.autograd.grad(
                loss, [edge for edge, *_ in edges], retain_graph=retain_graph, allow_unused=True
            )
        self._edges = edges if retain_graph else []  # drops what gradient checkpointing has recomputed
        gradients = [
            OutputGradient(fqn, values, mask, saved)
            for (_, fqn, mask, saved), values in zip(edges, found, strict=False)
            if values is not None
        ]
        if required and not gradients:
            raise ValueError(NO_GRADIENTS)
        return gradients
