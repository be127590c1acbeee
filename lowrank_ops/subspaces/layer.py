"""The subspaces of a layer's inputs and outputs: spectra, explained variance, utilized rank (Garg et al. 2024).

The second moment of the bias-free output is W C W^T, so streaming the input is enough. Every decomposition is done on
the smaller of the two sides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.covariances import Covariances
from ..calibration.statistics import LayerStatistics, Moments
from ..models.layers import Dimensions, all_finite, bias_vector, is_conv, weight_matrix
from ..models.running import float64_device
from .loss import LossSpace
from .output import OutputSpace
from .principal import (
    Subspace,
    bytes_of,
    congruence,
    half_product,
    lower_product,
    noise_of_sums,
    principal_directions,
    singular_directions,
    square_root,
)

_SPACES = ("input", "output", "loss", "weight_output")


class InputSpace(Subspace):
    """The space of a layer's input, (..., in_features), which layers with a common input share.

    Args:
        activations: moments of the input.
        centered: about the mean.
        device: of the decompositions.
    """

    def __init__(self, activations: Moments, *, centered: bool, device: torch.device) -> None:
        self._activations, self._centered, self._device = activations, centered, device
        self._root: Tensor | None = None
        super().__init__(self._directions)

    def _directions(self) -> tuple[Tensor, Tensor]:
        moment = self._moment()
        noise = noise_of_sums(self._activations.mean_square.to(self._device), self._activations.rounding)
        return principal_directions(moment, noise)

    def _moment(self) -> Tensor:
        return self._activations.moment(centered=self._centered).to(self._device)

    @property
    def root(self) -> Tensor:
        """A square root of the moment, (..., in_features, in_features): R with R R^T the moment."""
        if self._root is None:
            self._root = square_root(self._moment())
        return self._root

    def held_bytes(self) -> int:
        return super().held_bytes() + bytes_of(self._root)

    def release(self) -> None:
        super().release()
        self._root = None


class LayerSubspaces:
    """The input and output space of one layer, each computed when it is first needed and kept until released.

    Args:
        weight: (out_features, in_features) or (groups, out_features, in_features); must not change meanwhile.
        bias: (groups * out_features,), or None.
        statistics: of the layer.
        centered: use covariances about the mean, not second moments about zero.
        input_space: the space of ``statistics.activations``, if other layers share it; made here by default.
        device: of the decompositions; by default the weight's. The CPU instead of one that has no float64.
        load: returns the weight, each time that it is needed; ``weight`` may then be on the meta device.

    Raises:
        ValueError: the statistics do not fit the weight, or one of them is not finite.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        statistics: LayerStatistics,
        *,
        centered: bool,
        input_space: Subspace | None = None,
        device: torch.device | None = None,
        load: Callable[[], Tensor] | None = None,
    ) -> None:
        self.device = float64_device(device or weight.device)
        self._load = load
        self._weight, self.bias, self.statistics, self.centered = weight, bias, statistics, centered
        self._version = None if weight.is_inference() else weight._version
        self._input_space = input_space
        self._variances: tuple[Tensor, Tensor] | None = None  # of the outputs, and their noise
        out_features, in_features = weight.shape[-2:]
        self.dimensions = Dimensions(weight.shape[0] if weight.dim() == 3 else 1, in_features, out_features)
        self.is_linear = weight.dim() == 2  # not a convolution's
        self.channels: LayerSubspaces | None = None  # of the MLP whose consumer this layer is, once found
        statistics.check()
        for name, values in (("weight", weight if load is None else None), ("bias", bias)):
            if values is not None and not all_finite(values):
                raise ValueError(f"the layer's {name} holds NaN or inf; repair the model, or leave the layer out.")
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
        cls, layer: nn.Module, statistics: LayerStatistics, *, centered: bool, **options: Any
    ) -> LayerSubspaces:
        """The spaces of a Linear, Conv1D, Conv1d or Conv2d; ``options`` as for the class."""
        spaces = cls(weight_matrix(layer), bias_vector(layer), statistics, centered=centered, **options)
        spaces.is_linear = not is_conv(layer)
        return spaces

    def is_of(self, layer: nn.Module) -> bool:
        """Whether ``layer`` has the weight and bias that these are the spaces of."""
        pairs = [(self._weight, weight_matrix(layer)), (self.bias, bias_vector(layer))]
        return all(mine is other is None or _same(mine, other) for mine, other in pairs)

    @property
    def max_rank(self) -> int:
        """The largest rank."""
        return min(self.dimensions[1:])

    @property
    def rows(self) -> int:
        """Calibration rows seen."""
        return self.statistics.activations.count

    @property
    def dtype(self) -> torch.dtype:
        """Of the layer's weight."""
        return self._weight.dtype

    @property
    def layer_device(self) -> torch.device:
        """Where the layer's factors go: to its weight, or to the CPU if that is loaded when needed."""
        return self._weight.device if self._load is None else torch.device("cpu")

    @cached_property
    def weight(self) -> Tensor:
        """The weight, (..., out_features, in_features), float64.

        Raises:
            ValueError: the weight has been changed since these spaces were made.
        """
        if self._version is not None and self._weight._version != self._version:
            raise ValueError("its weight was changed after its subspaces were computed; compute them again.")
        weight = self._weight if self._load is None else self._load()
        return weight.to(self.device, torch.float64)

    @cached_property
    def moment(self) -> Tensor:
        """Second moment of the streamed side, (..., features, features), float64, on the weight's device."""
        return self.statistics.activations.moment(centered=self.centered).to(self.device)

    @property
    def mean(self) -> Tensor:
        """Mean of the streamed side, (..., features), float64, on the weight's device."""
        return self.statistics.activations.mean.to(self.device)

    @cached_property
    def output_mean(self) -> Tensor:
        """Mean of the bias-free output, (..., out_features), float64."""
        return self.mean if self.statistics.side == "output" else (self.weight @ self.mean.unsqueeze(-1)).squeeze(-1)

    @cached_property
    def input(self) -> Subspace | None:
        """The input space, or None if the output was streamed: k_S is then not measured."""
        if self.statistics.side != "input":
            return None
        return self._input_space or InputSpace(self.statistics.activations, centered=self.centered, device=self.device)

    @cached_property
    def output(self) -> OutputSpace:
        """The space of the bias-free output, with min(in_features, out_features) directions."""
        return OutputSpace(self)

    @property
    def output_variance(self) -> float:
        """The variance of the bias-free output, summed over the outputs; needs no decomposition."""
        if self.output.is_decomposed:
            return float(self.output.total.sum())
        if self._variances is None:
            if self.statistics.side == "input":
                variances = 2 * (self.half_moment * self.weight.mT).sum(-2)
            else:
                variances = self.moment.diagonal(dim1=-2, dim2=-1)
            self.noise(variances, self.statistics.activations)
        assert self._variances is not None
        variances, noise = self._variances
        return float(torch.where(variances > noise, variances, 0.0).sum())

    @cached_property
    def half_moment(self) -> Tensor:
        """:func:`half_product` of C and W^T, (..., features, out_features); of C and I if the output was streamed."""
        if self.statistics.side == "input":
            return half_product(self.moment, self.weight.mT)
        half = self.moment.tril()
        half.diagonal(dim1=-2, dim2=-1).mul_(0.5)
        return half

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
        return LossSpace(self, gradients)

    @property
    def loss_activations(self) -> Moments:
        """The activations that the loss weights: token-weighted ones, if any were streamed."""
        weighted = self.statistics.token_weighted
        return weighted if weighted is not None and weighted.count else self.statistics.activations

    def loss_moment(self, *, centered: bool) -> Tensor:
        """Second moment of the streamed side in the loss: token-weighted if streamed, about the plain mean."""
        moments = self.loss_activations
        if moments is self.statistics.activations:
            return self.moment if centered == self.centered else moments.moment(centered=centered).to(self.mean.device)
        moment = moments.moment(centered=centered)
        if centered:
            shift = moments.mean - self.statistics.activations.mean.to(moments.mean)
            moment.addcmul_(shift.unsqueeze(-1), shift.unsqueeze(-2))
        return moment.to(self.device)

    @property
    def gradient_moment(self) -> Tensor | None:
        """G, (..., out_features, out_features), float64, summed over the rows of a sample; None: not streamed."""
        gradients = self.statistics.output_gradients
        return None if gradients is None else gradients.moment(centered=False).to(self.device)

    @cached_property
    def weight_output(self) -> Subspace:
        """The left singular vectors of the weight and its squared singular values."""
        _, in_features, out_features = self.dimensions
        if in_features < out_features:
            return Subspace(lambda: singular_directions(self.weight))
        return Subspace(lambda: principal_directions(lower_product(self.weight, self.weight.mT)))

    @property
    def is_tall(self) -> bool:
        """Whether outputs are decomposed on the input side."""
        return self.statistics.side == "input" and self.dimensions.in_features < self.dimensions.out_features

    def input_root(self, activations: Moments) -> Tensor:
        """R with R R^T the second moment of these activations of the input."""
        if activations is not self.statistics.activations:
            return square_root(self.loss_moment(centered=self.centered))
        return self.input.root if isinstance(self.input, InputSpace) else square_root(self.moment)

    def output_moment(self, activations: Moments) -> tuple[Tensor, Tensor]:
        """The outputs' second moment, and the noise of the sums in it."""
        plain = activations is self.statistics.activations
        moment = self.moment if plain else self.loss_moment(centered=self.centered)
        if self.statistics.side == "input":
            moment = congruence(moment, self.weight.mT)
        return moment, self.noise(moment.diagonal(dim1=-2, dim2=-1), activations)

    def noise(self, variances: Tensor, activations: Moments, *, exact: bool = True) -> Tensor:
        """The noise of the outputs with these variances, or at most these (``exact=False``)."""
        mean_square = activations.mean_square.to(variances)
        if self.statistics.side == "input":
            # W C W^T may cancel: it has the rounding of its terms as well.
            terms = (self.weight.square() @ mean_square.unsqueeze(-1)).squeeze(-1)
            offset = (self.weight @ activations.offset.to(variances).unsqueeze(-1)).squeeze(-1)
            spread = variances if self.centered else (variances - self.output_mean.square()).clamp_min(0)
            mean_square = spread + offset.square() + terms
        noise = noise_of_sums(mean_square, activations.rounding)
        if exact and activations is self.statistics.activations:
            self._variances = variances.clone(), noise
        return noise

    def _spaces(self) -> list[Subspace | LossSpace]:
        found = [self.__dict__.get(name) for name in _SPACES]
        return [space for space in found if space is not None]

    def held_bytes(self) -> int:
        """Bytes of the decompositions that are held."""
        return sum(space.held_bytes() for space in self._spaces())

    def release(self, *, directions: bool = True, shared: bool = True) -> None:
        """Drop matrices, which are recomputed if needed; spectra stay.

        Args:
            directions: also drop the directions of the spaces; False keeps them, since they are the slowest to compute.
            shared: also drop those of the input space; False keeps them for another layer with this input.
        """
        for name in ("weight", "moment", "half_moment"):
            self.__dict__.pop(name, None)
        if directions:
            for space in self._spaces():
                if shared or space is not self._input_space:
                    space.release()

    def drop_spaces(self) -> None:
        """Drop the spaces, whose references to this object would keep its weight until a garbage collection."""
        for name in _SPACES:
            self.__dict__.pop(name, None)
        if self.channels is not None:
            self.channels.drop_spaces()
            self.channels = None

    def utilized_rank(self, explained_variance: float) -> int:
        """r = min(k_S, k_T); k_T alone if k_S is not measured."""
        k_t = self.output.rank_at(explained_variance)
        return k_t if self.input is None else min(self.input.rank_at(explained_variance), k_t)


def _same(mine: Tensor | None, other: Tensor | None) -> bool:
    if mine is None or other is None or mine.dtype != other.dtype or mine.device != other.device:
        return False
    return torch.equal(mine, other)


def layer_subspaces(
    layers: Mapping[str, nn.Module],
    covariances: Covariances,
    *,
    centered: bool = True,
    device: torch.device | None = None,
    load: Callable[[str], nn.Module] | None = None,
) -> dict[str, LayerSubspaces]:
    """The spaces of every layer that has statistics; layers with a common input share its decomposition.

    Args:
        layers: ``{fqn: layer}``.
        covariances: of these layers.
        centered: use covariances about the mean, not second moments about zero.
        device: of the decompositions; by default each layer's own. The CPU instead of one that has no float64.
        load: returns the layer of a name each time that its weight is needed, where ``layers`` are without values.

    Raises:
        ValueError: the statistics do not fit their layer, or one of them is not finite; the message names it.
    """
    shared: dict[tuple[int, torch.device], InputSpace] = {}
    found = {}
    for fqn, layer in layers.items():
        if fqn not in covariances:
            continue
        statistics, of_layer = covariances[fqn], float64_device(device or layer.get_parameter("weight").device)
        options: dict[str, Any] = {"centered": centered, "device": of_layer}
        if statistics.side == "input":
            key = (id(statistics.activations), of_layer)
            options["input_space"] = shared.setdefault(key, InputSpace(statistics.activations, **options))
        if load is not None:
            options["load"] = lambda fqn=fqn: weight_matrix(load(fqn))
        try:
            found[fqn] = LayerSubspaces.of_layer(layer, statistics, **options)
        except ValueError as error:
            raise ValueError(f"covariances[{fqn!r}]: {error}") from None
    return found
