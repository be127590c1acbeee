"""The order in which channels are dropped, and the cost of each, against a plain optimal brain surgeon."""

import pytest
import torch
from torch import nn

import lowrank_ops as lro
from lowrank_ops.subspaces import layer_subspaces
from lowrank_ops.subspaces.channels import DAMPING, ChannelSubspaces, _cheapest, kept_order


def exact_order(moment, weight):
    """The order by dropping one channel at a time, with exact updates."""
    inverse, weight, left, dropped = torch.linalg.inv(moment), weight.clone(), list(range(len(moment))), []
    while left:
        costs = weight.square().sum(0)[left] / inverse.diagonal()[left]
        channel = left.pop(int(costs.argmin()))
        row = inverse[channel] / inverse[channel, channel]
        weight -= torch.outer(weight[:, channel].clone(), row)
        inverse -= torch.outer(inverse[:, channel].clone(), row)
        dropped.append(channel)
    return torch.tensor(dropped[::-1])


def costs_of(moment, weight, order):
    """By number of kept channels, the error of the weight with the least squares."""
    costs = []
    for count in range(len(order) + 1):
        kept = order[:count]
        fitted = torch.zeros_like(weight)
        fitted[:, kept] = torch.linalg.solve(moment[kept][:, kept], moment[kept] @ weight.mT).mT
        error = weight - fitted
        costs.append(float((error @ moment * error).sum()))
    return torch.tensor(costs, dtype=torch.float64)


def moment_of(rows, channels):
    x = torch.randn(rows, 16).double() @ torch.randn(16, channels).double() + 0.3 * torch.randn(rows, channels)
    x = x.relu() * torch.logspace(0, -2, channels, dtype=torch.float64)
    return x.mT @ x / rows


@pytest.mark.parametrize("channels", [1, 5, 60, 130])
def test_blocks_drop_about_as_well_as_single_channels(channels):
    moment, weight = moment_of(400, channels), torch.randn(24, channels).double()
    order, exact = kept_order(moment, weight), exact_order(moment, weight)
    assert sorted(order.tolist()) == list(range(channels))
    if channels < 48:  # rounds of one channel
        assert torch.equal(order, exact)
    for count in {channels // 4, channels // 2, 3 * channels // 4}:
        mine, best = (costs_of(moment, weight, found)[count] for found in (order, exact))
        assert mine <= 1.05 * best


def test_a_round_of_all_channels_is_exact():
    """Costs, weights and the inverse are updated after each channel that is dropped."""
    moment, weight = moment_of(400, 40), torch.randn(24, 40).double()
    found = _cheapest(torch.linalg.inv(moment), weight, 40)
    assert torch.equal(found.flip(0), exact_order(moment, weight))


def spaces_of(rows, sensitivity="output"):
    model = nn.Sequential(nn.Linear(12, 40), nn.ReLU(), nn.Linear(40, 8, bias=False)).double()
    batches = [torch.randn(rows, 12).double()]
    covariances = lro.calibrate(model, batches, sensitivity=sensitivity)
    found = layer_subspaces({"0": model[0], "2": model[2]}, covariances)
    return ChannelSubspaces(found["2"], {"0": found["0"]})


@pytest.mark.parametrize("rows", [300, 20])  # fewer than channels: the moment is singular
def test_spectra_are_the_increase_of_the_error(rows):
    space = spaces_of(rows)
    moment, weight = space.damped_moment(space.statistics.activations), space.weight
    for found, metric, scale in (
        (space.output, torch.eye(8).double(), 1.0),
        (space.loss.subspace, space.loss.metric, space.loss.scale),
    ):
        lost = costs_of(moment, torch.linalg.cholesky(metric).mT @ weight, found.basis)
        torch.testing.assert_close(found.spectrum.flip(0).cumsum(0), scale * lost[:-1].flip(0), rtol=1e-6, atol=1e-12)
    down, up = space.loss.projection(15)[1:]
    kept = space.loss.subspace.leading(15)
    fitted = torch.linalg.solve(moment[kept][:, kept], moment[kept] @ weight.mT).mT
    torch.testing.assert_close((up @ down)[:, kept], fitted)


def test_an_order_is_found_once():
    space = spaces_of(100)
    for part in space.layers:
        assert part.weight.isfinite().all() and part.moment.isfinite().all()  # computed, and kept
    spectrum = space.loss.subspace.spectrum
    space.release()
    assert not any({"weight", "moment"} & vars(part).keys() for part in (space, *space.layers))
    assert space.loss.subspace.is_decomposed and space.loss.subspace.spectrum is spectrum
    assert space.held_bytes() == space.loss.subspace.held_bytes() == 40 * 8


def test_channels_without_use_are_dropped_first():
    space = spaces_of(300)
    dead, copies = space.moment.clone(), space.weight.clone()
    dead[[3, 7]] = dead[:, [3, 7]] = 0
    copies[:, 11] = 0
    moment = dead + 1e-9 * torch.eye(40)
    assert set(kept_order(moment, copies)[-2:].tolist()) <= {3, 7, 11}
    nothing = kept_order(1e-200 * torch.eye(4).double(), torch.zeros(2, 4).double())
    assert sorted(nothing.tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize("rows", [300, 20])
def test_the_damping_is_a_millionth_of_every_channel(rows):
    space = spaces_of(rows)
    for activations, plain in (
        (space.statistics.activations, space.moment),
        (space.loss_activations, space.loss_moment(centered=True)),
    ):
        added = space.damped_moment(activations) - plain
        expected = DAMPING * plain.diagonal()
        torch.testing.assert_close(added.diagonal(), expected, rtol=1e-3, atol=DAMPING**2 * float(plain.trace()) / 40)
        assert not (added - added.diag().diag()).any()


@pytest.mark.parametrize("offset", [-1e-6, -1e-7, 0.0])
def test_sums_with_a_negative_eigenvalue_give_an_order(offset):
    space = spaces_of(300)
    rows = torch.randn(3, 40).double()  # more channels than rows, and token weights that round each row
    activations = space.loss_activations
    activations.second_moment.copy_(rows.mT @ rows).diagonal().add_(3 * offset)
    activations.total.zero_()
    activations.count = 3
    moment = space.damped_moment(activations)
    order = kept_order(moment, space.weight)
    assert sorted(order.tolist()) == list(range(40))
    torch.linalg.cholesky(moment[order][:, order])
    torch.testing.assert_close(moment, space.loss_moment(centered=space.centered), rtol=1e-4, atol=1e-4)
