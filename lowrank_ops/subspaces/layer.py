"""Where a layer's inputs and outputs live: spectra, explained variance, utilized rank (Garg et al. 2024).

The second moment of the bias-free output is W C W^T, so streaming the input is enough. Every decomposition is done on
the smaller of the two sides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property

import torch
from torch import Tensor, nn

from ..calibration.statistics import Covariances, LayerStatistics, Moments
from ..models.layers import Dimensions, bias_vector, weight_matrix
from .principal import Noise, Subspace, noise_of_sums, principal_directions, singular_directions, square_root

DAMPING = 1e-3  # of the loss's metric, relative to its mean eigenvalue


class LossSpace:
    """The output space in the metric of the loss, M = G / scale + 1e-3 I with G the output gradients' second moment.

    The damping keeps M regular where few gradients were seen; without any gradient M is a multiple of the identity and
    the spectrum is zero.

    Args:
        gradients: moments of the output gradients.
        directions: ``directions(root)`` returns basis and spectrum of root^T y, for the layer's outputs y.
        device: of the decompositions.

    Attributes:
        root: L with L L^T = M, lower triangular, (..., out_features, out_features), float64.
        subspace: of L^T y, in units of the loss: half of the spectrum beyond a rank is the increase of the loss of
            one sample, to second order, if those directions are dropped.
    """

    def __init__(
        self, gradients: Moments, directions: Callable[[Tensor], tuple[Tensor, Tensor]], device: torch.device
    ) -> None:
        self._gradients, self._device = gradients, device

        def decompose() -> tuple[Tensor, Tensor]:
            basis, spectrum = directions(self.root)
            return basis, spectrum * self._scale.to(device).unsqueeze(-1)

        self.subspace = Subspace(decompose)

    @property
    def _scale(self) -> Tensor:
        """The mean eigenvalue of G, (...,)."""
        diagonal = self._gradients.second_moment.double().diagonal(dim1=-2, dim2=-1)
        return (diagonal.mean(-1) / max(self._gradients.count, 1)).clamp_min(0)

    @cached_property
    def root(self) -> Tensor:
        moment, scale = self._gradients.moment(centered=False), self._scale[..., None, None]
        return _damped_root(torch.where(scale > 0, moment / scale.clamp_min(1e-300), 0.0).to(self._device))

    def held_bytes(self) -> int:
        """Bytes of the decompositions that are held."""
        root = self.__dict__.get("root")
        return self.subspace.held_bytes() + (0 if root is None else root.numel() * root.element_size())

    def release(self) -> None:
        """Drop the matrices, which are recomputed if needed; the spectrum stays."""
        self.__dict__.pop("root", None)
        self.subspace.release()


class LayerSubspaces:
    """The input and output space of one layer, computed when first asked for and kept until released.

    Args:
        weight: (out_features, in_features) or (groups, out_features, in_features); must not change meanwhile.
        bias: (groups * out_features,), or None.
        statistics: of the layer.
        centered: use covariances about the mean, not second moments about zero.
        input_space: the space of ``statistics.activations``, if other layers share it; made here by default.

    Raises:
        ValueError: the statistics do not fit the weight.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        statistics: LayerStatistics,
        *,
        centered: bool,
        input_space: Subspace | None = None,
    ) -> None:
        self._weight, self.bias, self.statistics, self.centered = weight, bias, statistics, centered
        self._version = None if weight.is_inference() else weight._version
        self._input_space = input_space
        out_features, in_features = weight.shape[-2:]
        self.dimensions = Dimensions(weight.shape[0] if weight.dim() == 3 else 1, in_features, out_features)
        sides = {
            "activations": statistics.side,
            "output_gradients": "output",
            "token_weighted": statistics.side,
        }
        for name, moments in statistics.moments().items():
            expected = (*weight.shape[:-2], in_features if sides[name] == "input" else out_features)
            if moments.total.shape != expected:
                raise ValueError(
                    f"{name} has features {tuple(moments.total.shape)} on the {sides[name]} side, the layer "
                    f"{tuple(expected)}; the statistics belong to another layer or model."
                )

    @classmethod
    def of_layer(
        cls, layer: nn.Module, statistics: LayerStatistics, *, centered: bool, input_space: Subspace | None = None
    ) -> LayerSubspaces:
        """The spaces of a Linear, Conv1D or Conv2d."""
        return cls(weight_matrix(layer), bias_vector(layer), statistics, centered=centered, input_space=input_space)

    def is_of(self, layer: nn.Module) -> bool:
        """Whether ``layer`` has the weight and bias that these are the spaces of."""
        pairs = [(self._weight, weight_matrix(layer)), (self.bias, bias_vector(layer))]
        return all(mine is other is None or _same(mine, other) for mine, other in pairs)

    @property
    def rows(self) -> int:
        """Calibration rows seen."""
        return self.statistics.activations.count

    @property
    def dtype(self) -> torch.dtype:
        """Of the layer's weight."""
        return self._weight.dtype

    @cached_property
    def weight(self) -> Tensor:
        """The weight, (..., out_features, in_features), float64.

        Raises:
            ValueError: the weight has been changed since these spaces were made.
        """
        if self._version is not None and self._weight._version != self._version:
            raise ValueError("its weight was changed after its subspaces were computed; compute them again.")
        return self._weight.double()

    @cached_property
    def moment(self) -> Tensor:
        """Second moment of the streamed side, (..., features, features), float64, on the weight's device."""
        return self.statistics.activations.moment(centered=self.centered).to(self._weight.device)

    @property
    def mean(self) -> Tensor:
        """Mean of the streamed side, (..., features), float64, on the weight's device."""
        return self.statistics.activations.mean.to(self._weight.device)

    @property
    def output_mean(self) -> Tensor:
        """Mean of the bias-free output, (..., out_features), float64."""
        return self.mean if self.statistics.side == "output" else (self.weight @ self.mean.unsqueeze(-1)).squeeze(-1)

    @cached_property
    def input(self) -> Subspace | None:
        """The input space, or None if the output was streamed: k_S is then not measured."""
        if self.statistics.side != "input":
            return None
        return self._input_space or input_space(
            self.statistics.activations, centered=self.centered, device=self._weight.device
        )

    @cached_property
    def output(self) -> Subspace:
        """The space of the bias-free output, with min(in_features, out_features) directions."""
        return Subspace(lambda: self._output_directions(self.statistics.activations, None))

    @property
    def output_variance(self) -> float:
        """The variance of the bias-free output, summed over the outputs; needs no decomposition."""
        if self.output.is_decomposed:
            return float(self.output.total.sum())
        if self.statistics.side == "output":
            variances = self.moment.diagonal(dim1=-2, dim2=-1)
        else:
            variances = ((self.weight @ self.moment) * self.weight).sum(-1)
        noise = self.statistics.activations.rounding * variances.shape[-1] ** 0.5
        mean_square = variances + self.output_mean.square() if self.centered else variances
        return float(torch.where(variances > noise * mean_square, variances, 0.0).sum())

    def decomposed_output(self) -> Subspace | None:
        """The output space, plain or in the metric of the loss, if one of them was decomposed already."""
        spaces = [self.output, *([] if self.loss is None else [self.loss.subspace])]
        return next((space for space in spaces if space.is_decomposed), None)

    @cached_property
    def loss(self) -> LossSpace | None:
        """The output space in the metric of the loss, or None if no output gradients were streamed."""
        gradients = self.statistics.output_gradients
        if gradients is None:
            return None
        return LossSpace(
            gradients, lambda root: self._output_directions(self._loss_activations, root), self._weight.device
        )

    @property
    def _loss_activations(self) -> Moments:
        """The activations that the loss weights: token-weighted ones, if any were streamed."""
        weighted = self.statistics.token_weighted
        return weighted if weighted is not None and weighted.count else self.statistics.activations

    def loss_moment(self, *, centered: bool) -> Tensor:
        """Second moment of the streamed side in the loss: token-weighted if streamed, about the plain mean."""
        moments = self._loss_activations
        if moments is self.statistics.activations:
            return self.moment if centered == self.centered else moments.moment(centered=centered).to(self.mean.device)
        moment = moments.moment(centered=centered)
        if centered:
            shift = moments.mean - self.statistics.activations.mean.to(moments.mean)
            moment += shift.unsqueeze(-1) * shift.unsqueeze(-2)
        return moment.to(self._weight.device)

    @property
    def gradient_moment(self) -> Tensor | None:
        """G, (..., out_features, out_features), float64, summed over the rows of a sample; None: not streamed."""
        gradients = self.statistics.output_gradients
        return None if gradients is None else gradients.moment(centered=False).to(self._weight.device)

    @cached_property
    def weight_output(self) -> Subspace:
        """The left singular vectors of the weight and its squared singular values."""
        _, in_features, out_features = self.dimensions
        if in_features < out_features:
            return Subspace(lambda: singular_directions(self.weight))
        return Subspace(lambda: principal_directions(self.weight @ self.weight.mT))

    def _output_directions(self, activations: Moments, root: Tensor | None) -> tuple[Tensor, Tensor]:
        """Principal directions of ``root``^T W x (of W x without a root), found on the smaller side."""
        plain = activations is self.statistics.activations
        moment = self.moment if plain else self.loss_moment(centered=self.centered)
        _, in_features, out_features = self.dimensions
        by_input = self.statistics.side == "input"
        tall = by_input and in_features < out_features
        if tall:  # the columns of W R, R R^T = C, instead of an (out_features, out_features) moment
            matrix = self.weight @ square_root(moment)
            diagonal = matrix.square().sum(-1)
            matrix = matrix if root is None else root.mT @ matrix
        else:
            matrix = self.weight @ moment @ self.weight.mT if by_input else moment
            diagonal = matrix.diagonal(dim1=-2, dim2=-1)
            matrix = matrix if root is None else root.mT @ matrix @ root
        noise = noise_of_sums(diagonal, self.output_mean if self.centered else None, activations.rounding)
        noise = noise if root is None else _in_metric(noise, root)
        return singular_directions(matrix, noise) if tall else principal_directions(matrix, noise)

    def _spaces(self) -> list[Subspace | LossSpace]:
        found = [self.__dict__.get(name) for name in ("input", "output", "loss", "weight_output")]
        return [space for space in found if space is not None]

    def held_bytes(self) -> int:
        """Bytes of the decompositions that are held."""
        return sum(space.held_bytes() for space in self._spaces())

    def release(self, *, directions: bool = True) -> None:
        """Drop matrices, which are recomputed if needed; spectra stay.

        Args:
            directions: drop the directions of the spaces as well; False keeps what took longest.
        """
        for name in ("weight", "moment"):
            self.__dict__.pop(name, None)
        if directions:
            for space in self._spaces():
                space.release()

    def utilized_rank(self, explained_variance: float) -> int:
        """r = min(k_S, k_T); k_T alone if k_S is not measured."""
        k_t = self.output.rank_at(explained_variance)
        return k_t if self.input is None else min(self.input.rank_at(explained_variance), k_t)


def _same(mine: Tensor | None, other: Tensor | None) -> bool:
    if mine is None or other is None or mine.dtype != other.dtype or mine.device != other.device:
        return False
    return torch.equal(mine, other)


def _damped_root(unit: Tensor) -> Tensor:
    """The Cholesky factor of ``unit`` + DAMPING I; ``unit`` is positive semi-definite up to rounding."""
    damping = DAMPING * torch.eye(unit.shape[-1], dtype=unit.dtype, device=unit.device)
    root, info = torch.linalg.cholesky_ex(unit + damping)
    pivots = root.diagonal(dim1=-2, dim2=-1).square()  # none is below the smallest eigenvalue
    if bool(info.any()) or not bool((pivots > 0.5 * DAMPING).all()):  # rounding of the sums is near the damping
        values, vectors = torch.linalg.eigh(unit)
        root = torch.linalg.cholesky((vectors * values.clamp_min(0).unsqueeze(-2)) @ vectors.mT + damping)
    return root


def _in_metric(noise: Noise, root: Tensor) -> Noise:
    return lambda vectors: noise(root @ vectors)


def input_space(activations: Moments, *, centered: bool, device: torch.device) -> Subspace:
    """The space of a layer's input, (..., in_features), which layers with a common input share."""

    def decompose() -> tuple[Tensor, Tensor]:
        moment = activations.moment(centered=centered).to(device)
        mean = activations.mean.to(device) if centered else None
        noise = noise_of_sums(moment.diagonal(dim1=-2, dim2=-1), mean, activations.rounding)
        return principal_directions(moment, noise)

    return Subspace(decompose)


def layer_subspaces(
    layers: Mapping[str, nn.Module], covariances: Covariances, *, centered: bool = True
) -> dict[str, LayerSubspaces]:
    """The spaces of every layer that has statistics; layers with a common input share its decomposition.

    Raises:
        ValueError: the statistics do not fit their layer; the message names it.
    """
    shared: dict[tuple[int, torch.device], Subspace] = {}
    found = {}
    for fqn, layer in layers.items():
        if fqn not in covariances:
            continue
        statistics, device = covariances[fqn], layer.get_parameter("weight").device
        space = None
        if statistics.side == "input":
            key = (id(statistics.activations), device)
            space = shared.setdefault(key, input_space(statistics.activations, centered=centered, device=device))
        try:
            found[fqn] = LayerSubspaces.of_layer(layer, statistics, centered=centered, input_space=space)
        except ValueError as error:
            raise ValueError(f"covariances[{fqn!r}]: {error}") from None
    return found
