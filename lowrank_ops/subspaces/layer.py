"""Where a layer's inputs and outputs live: spectra, explained variance, utilized rank (Garg et al. 2024).

The output's second moment is W C W^T exactly, so only the input is ever streamed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property

import torch
from torch import Tensor, nn

from ..calibration.statistics import WEIGHTED, Covariance, Covariances
from ..models.layers import Dimensions, bias_vector, dimensions, weight_matrix
from .principal import WIDE, Subspace, WideSubspace, principal_subspace

DAMPING = 1e-3  # of the loss's metric, relative to its mean eigenvalue


class LossSpace:
    """The output space as the loss feels it: the principal directions of M^1/2 y, M = G + 1e-3 tr(G) / out_features I.

    y is taken over rows weighed with what the loss feels of them, where they were streamed.

    The damping keeps the metric M regular where few gradients were seen. Without any gradient it is the identity, and
    the spectrum, being in units of the loss, is zero.

    Args:
        output_moment: gives E[y y^T], (..., out_features, out_features), float64.
        sensitivity: gives G, the second moment of the gradients, of the same shape.

    Attributes:
        subspace: of M^1/2 E[y y^T] M^1/2; half of the spectrum beyond a rank is the increase of the loss of one
            sample, to second order, that dropping those directions brings.
    """

    subspace: Subspace

    def __init__(self, output_moment: Callable[[], Tensor], sensitivity: Callable[[], Tensor]) -> None:
        self._sensitivity = sensitivity
        diagonal = sensitivity().diagonal(dim1=-2, dim2=-1)
        self._scale = diagonal.mean(-1).clamp_min(0)  # (...,)

        def whitened() -> Tensor:
            return self.root @ output_moment() @ self.root.mT

        self._wide = diagonal.shape[-1] >= WIDE
        subspace: Subspace = WideSubspace(whitened) if self._wide else principal_subspace(whitened())
        self.subspace = subspace.scaled(self._scale)

    @property
    def root(self) -> Tensor:
        """M^1/2, (..., out_features, out_features), float64, up to the scale of the loss."""
        return self._roots[0]

    @property
    def inverse_root(self) -> Tensor:
        """The inverse of :attr:`root`."""
        return self._roots[1]

    @cached_property
    def _roots(self) -> tuple[Tensor, Tensor]:
        scale = self._scale[..., None, None]
        values, vectors = torch.linalg.eigh(torch.where(scale > 0, self._sensitivity() / scale.clamp_min(1e-300), 0.0))
        metric = values.clamp_min(0) + DAMPING
        root = (vectors * metric.sqrt().unsqueeze(-2)) @ vectors.mT
        return root, (vectors * metric.rsqrt().unsqueeze(-2)) @ vectors.mT

    def release(self) -> None:
        """Drop the matrices of a wide space, which are made again at need; the spectrum stays."""
        if self._wide:
            self.__dict__.pop("_roots", None)
            self.subspace.release()


class LayerSubspaces:
    """The input and output space of one layer, computed when first asked for and kept until released.

    The layer's weight must stay as it is meanwhile.
    """

    def __init__(
        self,
        layer: nn.Module,
        covariance: Covariance,
        *,
        centered: bool,
        shared: LayerSubspaces | None = None,
        sensitivity: Covariance | None = None,
    ) -> None:
        self.dimensions: Dimensions = dimensions(layer)
        self.covariance = covariance
        self.centered = centered
        self._weight = weight_matrix(layer)
        self._version = None if self._weight.is_inference() else self._weight._version
        self.bias = bias_vector(layer)
        self.sensitivity = sensitivity
        self._shared = shared
        groups, in_features, out_features = self.dimensions
        features = in_features if covariance.side == "input" else out_features
        expected = (features,) if groups == 1 else (groups, features)
        if covariance.total.shape != expected:
            raise ValueError(
                f"the covariance has features {tuple(covariance.total.shape)} on the {covariance.side} side, the layer "
                f"{expected}; it belongs to another layer or model."
            )
        expected = (out_features,) if groups == 1 else (groups, out_features)
        if sensitivity is not None and sensitivity.total.shape != expected:
            raise ValueError(
                f"the sensitivity has features {tuple(sensitivity.total.shape)}, the layer's output {expected}; it "
                "belongs to another layer or model."
            )
        weighted = None if sensitivity is None else sensitivity.weighted
        streamed = (WEIGHTED + covariance.side, covariance.total.shape)
        if weighted is not None and (weighted.side, weighted.total.shape) != streamed:
            raise ValueError(
                f"the sensitivity holds the {weighted.side} with features {tuple(weighted.total.shape)}, the "
                f"covariance the {covariance.side} with {tuple(covariance.total.shape)}. Take both from one "
                "calibration, or a sensitivity calibrated with weigh_rows=False."
            )

    @property
    def dtype(self) -> torch.dtype:
        """Of the layer's weight."""
        return self._weight.dtype

    @cached_property
    def weight(self) -> Tensor:
        """The weight, (out_features, in_features) or (groups, out_features, in_features), float64.

        Raises:
            ValueError: the weight has been changed since these spaces were made.
        """
        if self._version is not None and self._weight._version != self._version:
            raise ValueError("its weight was changed after its subspaces were made; make them anew.")
        return self._weight.double()

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
        return self._subspace(lambda: self.moment, self.mean, self.dimensions.in_features)

    @cached_property
    def output(self) -> Subspace:
        """The space of the bias-free output."""
        return self._subspace(self._output_moment, self.output_mean, self.dimensions.out_features)

    def _output_moment(self) -> Tensor:
        return self._of_output(self.moment)

    def _of_output(self, moment: Tensor) -> Tensor:
        """The output's second moment from that of the streamed side."""
        return moment if self.covariance.side == "output" else self.weight @ moment @ self.weight.mT

    @property
    def output_moment(self) -> Tensor:
        """Second moment of the bias-free output, (..., out_features, out_features), float64.

        Without rounding noise, except where the output is so wide that its directions are not known.
        """
        return self._output_moment() if isinstance(self.output, WideSubspace) else _assembled(self.output)

    def felt_moment(self, *, centered: bool) -> Tensor:
        """Second moment of the streamed side, rows weighed with what the loss feels of them; about the plain mean.

        That of all rows alike where no weighted rows were streamed.
        """
        rows = self._weighted
        if rows is None:
            return self.moment if centered == self.centered else self.covariance.moment(centered=centered)
        moment = rows.moment(centered=centered)
        if centered:
            shift = rows.mean - self.covariance.mean.to(rows.mean)
            moment += shift.unsqueeze(-1) * shift.unsqueeze(-2)
        return moment.to(self.weight.device)

    @property
    def felt_output_moment(self) -> Tensor:
        """Second moment of the bias-free output, rows weighed with what the loss feels of them.

        Of the shape of :attr:`output_moment`, which it is where no weighted rows were streamed; else with the rounding
        noise of their sums.
        """
        return self._felt_output_moment if self.weighs_rows else self.output_moment

    @property
    def weighs_rows(self) -> bool:
        """Whether weighted rows were streamed, and there were any."""
        return self._weighted is not None

    @property
    def _weighted(self) -> Covariance | None:
        rows = None if self.sensitivity is None else self.sensitivity.weighted
        return rows if rows is not None and rows.count else None

    @cached_property
    def _felt_output_moment(self) -> Tensor:
        return self._of_output(self.felt_moment(centered=self.centered))

    def _felt_without_rounding(self) -> Tensor:
        """:attr:`felt_output_moment` without rounding noise, except where the output is wide."""
        if not self.weighs_rows or self.dimensions.out_features >= WIDE:
            return self.felt_output_moment
        return _assembled(
            self._subspace(lambda: self.felt_output_moment, self.output_mean, self.dimensions.out_features)
        )

    @cached_property
    def gradient_moment(self) -> Tensor | None:
        """G, (..., out_features, out_features), float64, summed over the rows of a sample; None: not streamed."""
        if self.sensitivity is None:
            return None
        return self.sensitivity.moment(centered=False).to(self.weight.device)

    @cached_property
    def loss(self) -> LossSpace | None:
        """The output space in the metric of the loss, or None where no sensitivity was streamed."""
        sensitivity = self.sensitivity
        if sensitivity is None:
            return None
        # G sums over the rows of a sample, which makes the spectrum one of whole samples.
        return LossSpace(
            self._felt_without_rounding, lambda: sensitivity.moment(centered=False).to(self._weight.device)
        )

    @cached_property
    def weight_output(self) -> Subspace:
        """The output space of white input: the left singular vectors of the weight and its squared singular values."""
        if self.dimensions.out_features >= WIDE:
            return WideSubspace(lambda: self.weight @ self.weight.mT)
        return principal_subspace(self.weight @ self.weight.mT)

    @property
    def mean(self) -> Tensor:
        """Mean of the streamed side, (..., features), float64, on the weight's device."""
        return self.covariance.mean.to(self.weight.device)

    @property
    def output_mean(self) -> Tensor:
        """Mean of the bias-free output, (..., out_features), float64."""
        return self.mean if self.covariance.side == "output" else (self.weight @ self.mean.unsqueeze(-1)).squeeze(-1)

    def _subspace(self, moment: Callable[[], Tensor], mean: Tensor, features: int) -> Subspace:
        shift, rounding = mean if self.centered else None, self.covariance.rounding
        if features >= WIDE:
            return WideSubspace(moment, shift, rounding)
        return principal_subspace(moment(), shift, rounding)

    def release(self, *, directions: bool = True) -> None:
        """Drop the large matrices, which are made again at need; spectra stay, and so do spaces that are not wide.

        Args:
            directions: drop those of wide spaces as well; False keeps what took longest.
        """
        for name in ("weight", "moment", "gradient_moment", "_felt_output_moment"):
            self.__dict__.pop(name, None)
        if directions:
            for name in ("input", "output", "weight_output", "loss"):
                space = self.__dict__.get(name)
                if space is not None:
                    space.release()
        if self._shared is not None:
            self._shared.release(directions=directions)

    def utilized_rank(self, explained_variance: float) -> int:
        """r = min(k_S, k_T); k_T alone where k_S is not measured."""
        k_t = self.output.rank_at(explained_variance)
        return k_t if self.input is None else min(self.input.rank_at(explained_variance), k_t)


def _assembled(space: Subspace) -> Tensor:
    """The moment that a space was found in, without rounding noise."""
    return (space.basis * space.spectrum.unsqueeze(-2)) @ space.basis.mT


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
            found[fqn] = LayerSubspaces(
                layer,
                covariance,
                centered=centered,
                shared=leaders.get(id(covariance)),
                sensitivity=covariances.sensitivities.get(fqn),
            )
        except ValueError as error:
            raise ValueError(f"covariances[{fqn!r}]: {error}") from None
        leaders.setdefault(id(covariance), found[fqn])
    return found
