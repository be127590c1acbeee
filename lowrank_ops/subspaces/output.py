"""The space of a layer's bias-free outputs, decomposed on the input side where that is smaller."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .principal import (
    Subspace,
    bytes_of,
    denoised,
    descending_eigh,
    gram,
    noise_along,
    orthonormal_pair,
    principal_directions,
    root_congruence,
)

if TYPE_CHECKING:
    from .layer import LayerSubspaces


class OutputSpace(Subspace):
    """Its directions are eigenvectors of W C W^T: min(in_features, out_features) of them.

    Args:
        spaces: of the layer.
    """

    def __init__(self, spaces: LayerSubspaces) -> None:
        self._spaces = spaces
        self._inner: Tensor | None = None  # of a tall layer, W^T W
        super().__init__(self._decompose_tall if spaces.is_tall else self._decompose_output)

    def _decompose_output(self) -> tuple[Tensor, Tensor]:
        return principal_directions(*self._spaces.output_moment(self._spaces.statistics.activations))

    def _decompose_tall(self) -> tuple[Tensor, ...]:
        """W R V with V the eigenvectors of R^T W^T W R, R R^T = C: no matrix is (out_features, out_features)."""
        spaces, activations = self._spaces, self._spaces.statistics.activations
        weight, root, self._inner = spaces.weight, spaces.input_root(activations), gram(spaces.weight)
        values, vectors = descending_eigh(root_congruence(self._inner, root))

        def along(start: int) -> Tensor:
            columns = weight @ (root @ vectors)
            noise = spaces.noise(columns.square().sum(-1), activations)
            columns = columns[..., start:]
            squares = columns.square().sum(-2)
            return torch.where(squares > 0, noise_along(noise, columns) / squares, torch.inf)

        most = spaces.noise(values[..., :1].expand(spaces.output_mean.shape), activations, exact=False)
        return vectors, denoised(values, most.amax(-1), along), root, weight

    def projection(self, rank: int) -> tuple[Tensor, Tensor]:
        """U^T W and U for the first ``rank`` directions U."""
        vectors = self._find()[0][..., :rank]
        if self._inner is not None:
            root, weight = self._matrices
            inputs = vectors.mT @ root.mT  # rows: products with few columns are slower
            pair = orthonormal_pair(inputs, inputs @ self._inner, inputs @ weight.mT, self._are_nearly_orthogonal(rank))
            if pair is not None:
                return pair
        up = self.leading(rank)
        return up.mT @ self._spaces.weight, up

    def held_bytes(self) -> int:
        return super().held_bytes() + bytes_of(self._inner)

    def release(self) -> None:
        super().release()
        self._inner = None
