"""The order in which the channels of an MLP are kept, and the loss of each: optimal brain surgeon on the consumer.

Channels are dropped one after another, each time the one whose loss is smallest after the weights of the others are
updated to compensate (Hassibi & Stork 1992; for whole columns as in ZipLM, Kurtic et al. 2023, arXiv 2302.04089). Let
C = R R^T be the second moment of the channels, in the reverse of that order. Then z = R^-1 x is white, and its first r
entries span the first r channels. Column i of W R is therefore the part of the output that is lost with channel i, so
that one Cholesky factor gives the loss for every number of channels. C is damped by 1e-6 of its diagonal, so that
channels which are linear combinations of others have an order too; with fewer rows than channels there always are some.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.statistics import Moments
from ..models.mlps import Mlp, check_channels_apart, find_mlps
from .layer import LayerSubspaces
from .loss import LossSpace
from .principal import Subspace, noise_of_sums

DAMPING = 1e-6  # of the channels' moment, relative to its diagonal
ROUNDS = 48  # at least as many; each drops one channel or more
CANDIDATES = 4  # of a round, the cheapest at its start, per channel that it drops
_VERIFIED = (
    "An MLP consists of nn.Linear layers, all of them calibrated with side='input' and kept by filter_fn, in a module "
    "that runs on one tensor; nothing between them mixes channels or has a fixed number of them, and nothing else runs "
    "them."
)


class ChannelSubspaces(LayerSubspaces):
    """The subspaces of an MLP, as those of its consumer; the directions are the channels.

    Where ranks are chosen, its ``rank`` is the number of channels. The bases of ``output`` and ``loss`` are indices
    (channels,) in the order in which channels are kept.

    Args:
        consumer: subspaces of the consumer, whose input was streamed.
        producers: ``{fqn: LayerSubspaces}`` of the producers.
    """

    def __init__(self, consumer: LayerSubspaces, producers: Mapping[str, LayerSubspaces]) -> None:
        super().__init__(
            consumer._weight,
            consumer.bias,
            consumer.statistics,
            centered=consumer.centered,
            device=consumer.device,
            load=consumer._load,
        )
        self.consumer, self.producers = consumer, dict(producers)
        self.is_linear = False  # it gets no factors

    @property
    def max_rank(self) -> int:
        return self.dimensions.in_features

    @property
    def layers(self) -> tuple[LayerSubspaces, ...]:
        """The subspaces of all layers of the MLP."""
        return (*self.producers.values(), self.consumer)

    @cached_property
    def input(self) -> None:
        """Not shared with another layer."""
        return None

    @cached_property
    def output(self) -> Subspace:  # type: ignore[override]  # factorize takes no channels
        def decompose() -> tuple[Tensor, Tensor]:
            moment = self.damped_moment(self.statistics.activations)
            order = kept_order(moment, self.weight)
            return order, self.lost_outputs(moment, order).square().sum(0)

        return _Channels(decompose)

    @cached_property
    def loss(self) -> LossSpace | None:
        gradients = self.statistics.output_gradients
        return None if gradients is None else _ChannelLoss(self, gradients)

    def damped_moment(self, activations: Moments) -> Tensor:
        """The second moment of the channels (channels, channels), float64, positive definite."""
        plain = activations is self.statistics.activations
        moment = (self.moment if plain else self.loss_moment(centered=self.centered)).clone()
        noise = noise_of_sums(activations.mean_square.to(moment), activations.rounding)
        diagonal = moment.diagonal()
        smallest = DAMPING * DAMPING * diagonal.mean()
        half = 0.5 * (DAMPING * diagonal + noise).clamp_min(max(float(smallest), 1e-200))
        diagonal.add_(half)
        if torch.linalg.cholesky_ex(moment).info:  # token weights round each row, which may exceed the damping
            diagonal.add_(2 * torch.linalg.eigvalsh(moment)[0].abs())
        diagonal.add_(half)
        return moment

    def lost_outputs(self, moment: Tensor, order: Tensor) -> Tensor:
        """W R, (out_features, channels): column i is lost with the i-th channel of the order."""
        return self.weight[:, order] @ torch.linalg.cholesky(moment[order][:, order])

    def release(self, *, directions: bool = True, shared: bool = True) -> None:
        super().release(directions=directions, shared=shared)
        for space in self.layers:
            space.release(directions=directions, shared=shared)


def with_channels(
    model: nn.Module, subspaces: Mapping[str, LayerSubspaces], wanted: bool | Sequence[str]
) -> dict[str, LayerSubspaces]:
    """``subspaces`` with one :class:`ChannelSubspaces` per MLP, under its consumer's name, for those of its layers.

    It is stored in the consumer's subspaces, so that other budgets reuse it.

    Args:
        model: any module.
        subspaces: of its layers.
        wanted: True for all MLPs, or names or "re:" patterns of their consumers.

    Raises:
        ValueError: no MLP was found, or none for one of the names.
    """
    if not wanted:
        return dict(subspaces)
    layers = {fqn: model.get_submodule(fqn) for fqn, space in subspaces.items() if space.statistics.side == "input"}
    mlps = {mlp.consumer: mlp for mlp in find_mlps(model, layers) if _runs_as_one(subspaces, mlp)}
    chosen = set(mlps)
    if not isinstance(wanted, bool):
        by_name = {name: {fqn for fqn in mlps if _names(name, fqn)} for name in wanted}
        if missing := [name for name, found in by_name.items() if not found]:
            raise ValueError(
                f"channels: {missing[0]!r} names no layer that reads the channels of an MLP which could be verified. "
                f"Found: {', '.join(mlps) or 'none'}. {_VERIFIED}"
            )
        chosen = set().union(*by_name.values())
    elif not mlps:
        raise ValueError(f"channels=True: the model has no MLP whose channels could be dropped. {_VERIFIED}")
    dropped = {fqn for name in chosen for fqn in mlps[name].producers}
    found: dict[str, LayerSubspaces] = {}
    for fqn, space in subspaces.items():
        if fqn in chosen:
            producers = {name: subspaces[name] for name in mlps[fqn].producers}
            known = space.channels
            if not isinstance(known, ChannelSubspaces) or known.producers != producers:
                space.channels = known = ChannelSubspaces(space, producers)
            found[fqn] = known
        elif fqn not in dropped:
            found[fqn] = space
    return found


def _runs_as_one(subspaces: Mapping[str, LayerSubspaces], mlp: Mlp) -> bool:
    """Whether all layers of the MLP saw equally many rows; otherwise other code also runs some of them."""
    counts = {subspaces[fqn].statistics.activations.count for fqn in (*mlp.producers, mlp.consumer)}
    return len(counts) == 1


def _names(name: str, fqn: str) -> bool:
    try:
        return bool(re.fullmatch(name[3:], fqn)) if name.startswith("re:") else name == fqn
    except re.error as error:
        raise ValueError(f"channels: {name!r} is not a regular expression: {error}.") from None


def check_apart(model: nn.Module, subspaces: Mapping[str, LayerSubspaces], run: Callable[[], Any]) -> None:
    """:func:`check_channels_apart` for the MLPs among ``subspaces``."""
    members = {fqn: space for fqn, space in subspaces.items() if isinstance(space, ChannelSubspaces)}
    check_channels_apart(model, [Mlp(tuple(space.producers), fqn) for fqn, space in members.items()], run)


class _Channels(Subspace):
    """An order of channels, which ``release`` keeps: it is slow to compute and takes little memory."""

    def release(self) -> None:
        pass


class _ChannelLoss(LossSpace):
    """The loss by channel, in the same units as other layers' losses."""

    def __init__(self, spaces: ChannelSubspaces, gradients: Moments) -> None:
        super().__init__(spaces, gradients)
        self._channels = spaces
        self.subspace = _Channels(self._decompose)

    def _decompose(self) -> tuple[Tensor, Tensor]:
        spaces, root = self._channels, self.root
        moment = spaces.damped_moment(spaces.loss_activations)
        order = kept_order(moment, root.mT @ spaces.weight)
        lost = spaces.lost_outputs(moment, order)
        values = (root.mT @ lost).square().sum(0)
        self._lost = lost.square().sum(0), values
        return order, values * self.scale

    def projection(self, rank: int) -> tuple[None, Tensor, Tensor]:
        """None, R^-1 and W R for the first ``rank`` channels; the updated weight is the product of the two."""
        spaces, order = self._channels, self.subspace.leading(rank)
        moment = spaces.damped_moment(spaces.loss_activations)[order]
        root = torch.linalg.cholesky(moment[:, order])
        down = moment.new_zeros(rank, spaces.max_rank)
        down[:, order] = torch.linalg.solve_triangular(root, torch.eye(rank).to(root), upper=False)
        return None, down, torch.linalg.solve_triangular(root, moment @ spaces.weight.mT, upper=False).mT


def kept_order(moment: Tensor, weight: Tensor) -> Tensor:
    """The channels, from the last to drop to the first.

    With P the inverse of the moment of the remaining channels and A their updated weight, dropping channel j costs
    |A_j|^2 / P_jj. A round drops 1/``ROUNDS`` of all channels one by one, from the candidates that were cheapest at its
    start. A and P are updated after each channel for the candidates, and at the end of the round for the others.

    Args:
        moment: of the channels (channels, channels), float64, positive definite.
        weight: (out_features, channels) in the metric of the output, float64.

    Returns:
        (channels,), int64.
    """
    left = torch.arange(len(moment), device=moment.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moment))
    dropped = []
    count = max(1, len(moment) // ROUNDS)
    while len(left):
        costs = weight.square().sum(0) / inverse.diagonal()
        chosen = costs.argsort()[: CANDIDATES * count]
        gone = chosen[_cheapest(inverse[chosen][:, chosen], weight[:, chosen], min(count, len(left)))]
        dropped.append(left[gone])
        stays = torch.ones_like(left, dtype=torch.bool)
        stays[gone] = False
        kept = stays.nonzero().squeeze(1)
        # P_KR P_RR^-1, for the channels K that stay and R that go
        gain = torch.cholesky_solve(inverse[gone][:, kept], torch.linalg.cholesky(inverse[gone][:, gone])).mT
        weight = weight[:, kept].addmm_(weight[:, gone], gain.mT, alpha=-1)
        inverse = inverse[kept][:, kept].addmm_(gain, inverse[gone][:, kept], alpha=-1)
        left = left[kept]
    return torch.cat(dropped).flip(0)


def _cheapest(inverse: Tensor, weight: Tensor, count: int) -> Tensor:
    """Indices of ``count`` columns, each the cheapest to drop once those before it are gone."""
    inverse, weight = inverse.clone(), weight.clone()
    gone = torch.zeros(len(inverse), dtype=weight.dtype, device=weight.device)
    found = []
    for _ in range(count):
        costs = weight.square().sum(0) / inverse.diagonal() + gone
        index = costs.argmin()
        row = inverse[index] / inverse[index, index]
        weight.addr_(weight[:, index].clone(), row, alpha=-1)
        inverse.addr_(inverse[:, index].clone(), row, alpha=-1)
        inverse[index, index] = 1.0
        gone[index] = torch.inf
        found.append(index)
    return torch.stack(found)
