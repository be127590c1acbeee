"""Where a layer's inputs and outputs live: spectra, explained variance, utilized rank (Garg et al. 2024).

The output's second moment is W C W^T exactly, so only the input is ever streamed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from .covariances import Covariance, Covariances
from .dense_layers import Dimensions, bias_vector, dimensions, weight_matrix


@dataclass(frozen=True)
class Subspace:
    """The principal directions of a space, by falling variance.

    Attributes:
        basis: (..., features, features), float64, directions in columns.
        spectrum: (..., features), float64, the variance along each; what is numerically zero is exactly zero.
    """

    basis: Tensor
    spectrum: Tensor

    def rank_at(self, explained_variance: float) -> int:
        """The least number of directions that hold this share of the variance; with groups, of the neediest one.

        1 gives the numerical rank; a space without variance has rank 0.
        """
        return int(self.ranks_at(explained_variance).max())

    def ranks_at(self, explained_variance: float) -> Tensor:
        """:meth:`rank_at` for each group, (...,)."""
        nonzero = (self.spectrum > 0).sum(-1)
        if explained_variance >= 1:
            return nonzero
        enough = explained_variance * self.spectrum.sum(-1, keepdim=True)
        return torch.minimum((self.spectrum.cumsum(-1) < enough).sum(-1) + 1, nonzero)

    def explained(self, rank: int) -> Tensor:
        """The share of the variance that the first ``rank`` directions hold, (...,); 1 where there is none."""
        total = self.spectrum.sum(-1)
        return torch.where(total > 0, self.spectrum[..., :rank].sum(-1) / total.clamp_min(1e-300), 1.0)


def principal_subspace(moment: Tensor, mean: Tensor | None = None, rounding: float = 0.0) -> Subspace:
    """Eigenvectors and eigenvalues of a symmetric positive semi-definite matrix; what is rounding noise is zero.

    Sums that are rounded relative to the mean squares m_i of the features shift the variance along a direction v by
    up to rounding * sqrt(features) * sum_i v_i^2 m_i, and ``eigh`` shifts all of them relative to the largest.

    Args:
        moment: (..., features, features), float64; singular matrices are the normal case.
        mean: (..., features), what was subtracted from the features, or None.
        rounding: relative rounding error of the sums that ``moment`` was made from.
    """
    features = moment.shape[-1]
    values, vectors = torch.linalg.eigh(moment)
    values, vectors = values.flip(-1), vectors.flip(-1)
    mean_square = moment.diagonal(dim1=-2, dim2=-1)
    if mean is not None:
        mean_square = mean_square + mean.square()
    of_sums = rounding * features**0.5 * (mean_square.unsqueeze(-2) @ vectors.square()).squeeze(-2)
    of_eigh = features * torch.finfo(torch.float64).eps * values[..., :1]
    return Subspace(vectors, torch.where(values > torch.maximum(of_sums, of_eigh), values, 0.0))


class LayerSubspaces:
    """The input and output space of one layer, computed when first asked for and kept."""

    def __init__(
        self, layer: nn.Module, covariance: Covariance, *, centered: bool, shared: LayerSubspaces | None = None
    ) -> None:
        self.dimensions: Dimensions = dimensions(layer)
        self.covariance = covariance
        self.centered = centered
        self.weight = weight_matrix(layer).double()
        self.bias = bias_vector(layer)
        self._shared = shared
        groups, in_features, out_features = self.dimensions
        features = in_features if covariance.side == "input" else out_features
        expected = (features,) if groups == 1 else (groups, features)
        if covariance.total.shape != expected:
            raise ValueError(
                f"the covariance has features {tuple(covariance.total.shape)} on the {covariance.side} side, the layer "
                f"{expected}; it belongs to another layer or model."
            )

    @cached_property
    def moment(self) -> Tensor:
        """Second moment of the streamed side, (..., features, features), float64, on the weight's device."""
        if self._shared is not None:
            return self._shared.moment
        return self.covariance.moment(centered=self.centered).to(self.weight.device)

    @cached_property
    def input(self) -> Subspace | None:
        """The input space, or None where the output was streamed: k_S is then not measured."""
        if self.covariance.side != "input":
            return None
        if self._shared is not None:
            return self._shared.input
        return self._decompose(self.moment, self.mean)

    @cached_property
    def output(self) -> Subspace:
        """The space of the bias-free output."""
        streamed = self.covariance.side == "output"
        moment = self.moment if streamed else self.weight @ self.moment @ self.weight.mT
        return self._decompose(moment, self.output_mean)

    @cached_property
    def weight_output(self) -> Subspace:
        """The output space of white input: the left singular vectors of the weight and its squared singular values."""
        return principal_subspace(self.weight @ self.weight.mT)

    @property
    def mean(self) -> Tensor:
        """Mean of the streamed side, (..., features), float64, on the weight's device."""
        return self.covariance.mean.to(self.weight.device)

    @property
    def output_mean(self) -> Tensor:
        """Mean of the bias-free output, (..., out_features), float64."""
        return self.mean if self.covariance.side == "output" else (self.weight @ self.mean.unsqueeze(-1)).squeeze(-1)

    def _decompose(self, moment: Tensor, mean: Tensor) -> Subspace:
        return principal_subspace(moment, mean if self.centered else None, self.covariance.rounding)

    def utilized_rank(self, explained_variance: float) -> int:
        """r = min(k_S, k_T); k_T alone where k_S is not measured."""
        k_t = self.output.rank_at(explained_variance)
        return k_t if self.input is None else min(self.input.rank_at(explained_variance), k_t)


def layer_subspaces(
    layers: Mapping[str, nn.Module], covariances: Covariances, *, centered: bool = True
) -> dict[str, LayerSubspaces]:
    """The spaces of every layer that has a covariance; layers with a common input share its decomposition.

    Raises:
        ValueError: a covariance does not fit its layer; the message names it.
    """
    leaders: dict[int, LayerSubspaces] = {}
    found = {}
    for fqn, layer in layers.items():
        if fqn not in covariances:
            continue
        covariance = covariances[fqn]
        try:
            found[fqn] = LayerSubspaces(layer, covariance, centered=centered, shared=leaders.get(id(covariance)))
        except ValueError as error:
            raise ValueError(f"covariances[{fqn!r}]: {error}") from None
        leaders.setdefault(id(covariance), found[fqn])
    return found
