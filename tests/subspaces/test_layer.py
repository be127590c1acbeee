"""Spectra, explained variance and utilized rank, against NumPy in float64 that shares no code with the package."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

import lowrank_ops as lro
from lowrank_ops.demo.data import WEIGHTS, data_folder
from lowrank_ops.demo.vit import ViT
from lowrank_ops.subspaces import LayerSubspaces, Subspace, layer_subspaces

THRESHOLDS = (0.5, 0.9, 0.95, 0.99, 0.999)


# --- the independent computation --------------------------------------------------------------------------------


def spectrum_of(rows, centered):
    """Variances along the principal directions of ``rows``, by singular values: no covariance is ever formed."""
    rows = rows - rows.mean(0) if centered else rows
    values = np.zeros(rows.shape[1])
    found = np.linalg.svd(rows, compute_uv=False) ** 2 / len(rows)
    values[: len(found)] = found[: len(values)]
    return values


def rank_of(spectrum, share):
    """The smallest k whose first k values hold ``share`` of the sum."""
    total = spectrum.sum()
    return next(k for k in range(len(spectrum) + 1) if spectrum[:k].sum() >= share * total * (1 - 1e-12))


def record_inputs(model, batch):
    """Input rows of every Linear and Conv2d, recorded whole."""
    rows, handles = {}, []

    def keep(fqn):
        def hook(module, args):
            x = args[0].detach().double()
            if isinstance(module, nn.Conv2d):
                patches = nn.functional.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)
                rows[fqn] = patches.transpose(1, 2).flatten(0, 1).numpy()
            else:
                rows[fqn] = x.flatten(0, -2).numpy()

        return hook

    for fqn, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            handles.append(module.register_forward_pre_hook(keep(fqn)))
    with torch.no_grad():
        model.eval()(batch)
    for handle in handles:
        handle.remove()
    return rows


def assert_spaces_agree(space, rows, weight, centered, thresholds=THRESHOLDS, atol=1e-8):
    for subspace, data in ((space.input, rows), (space.output, rows @ weight.T)):
        expected = spectrum_of(data, centered)
        directions = subspace.spectrum.shape[-1]  # of an output, min(in_features, out_features)
        assert expected[directions:].max(initial=0) <= 1e-12 * expected.max()
        expected = expected[:directions]
        np.testing.assert_allclose(subspace.spectrum.numpy(), expected, rtol=0, atol=atol * max(expected.max(), 1e-300))
        for share in thresholds:
            assert subspace.rank_at(share) == rank_of(expected, share), share
        basis = subspace.basis.numpy()
        np.testing.assert_allclose(basis.T @ basis, np.eye(basis.shape[1]), atol=1e-10)
        shifted = data - data.mean(0) if centered else data  # the basis diagonalizes the data, too
        moment = basis.T @ (shifted.T @ shifted / len(data)) @ basis
        np.testing.assert_allclose(moment, np.diag(expected), rtol=0, atol=atol * max(expected.max(), 1e-300))


def demo_model(trained):
    model = ViT()
    if trained:
        model.load_state_dict({name: tensor.float() for name, tensor in load_file(data_folder() / WEIGHTS).items()})
    return model.double()


# --- agreement --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("trained", "centered"), [(False, False), (True, True)])
def test_every_layer_of_the_demo_model_agrees_with_numpy(trained, centered):
    model = demo_model(trained)
    images = torch.rand(9, 1, 28, 28, dtype=torch.float64)
    rows = record_inputs(model, images)
    covariances = lro.calibrate(model, images.split(4))
    layers = {fqn: model.get_submodule(fqn) for fqn in rows}
    spaces = layer_subspaces(layers, covariances, centered=centered)
    report = lro.utilization(model, covariances, 0.99, centered=centered, subspaces=spaces)
    assert list(spaces) == list(rows) and len(rows) == 26
    utilizations = []
    for fqn, layer in layers.items():
        weight = layer.weight.detach().flatten(1).numpy()
        assert_spaces_agree(spaces[fqn], rows[fqn], weight, centered)
        ranks = [rank_of(spectrum_of(data, centered), 0.99) for data in (rows[fqn], rows[fqn] @ weight.T)]
        utilizations.append(min(ranks) / min(weight.shape))
        row = next(row for row in report.layers if row.fqn == fqn)
        assert (row.input_rank, row.output_rank, row.rank) == (*ranks, min(ranks))
        assert row.rows == len(rows[fqn])
    assert abs(report.mean_layer_utilization - np.mean(utilizations)) < 1e-12


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 60),
    in_features=st.integers(1, 24),
    out_features=st.integers(1, 24),
    rank=st.integers(0, 24),
    dead=st.integers(0, 5),
    mean=st.sampled_from([0.0, 1.0, 30.0]),
    centered=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_rank_deficient_cases_agree_with_numpy(rows, in_features, out_features, rank, dead, mean, centered, seed):
    generator = np.random.default_rng(seed)
    latent = generator.standard_normal((rows, rank)) + mean
    data = latent @ generator.standard_normal((rank, in_features))
    data[:, :dead] = 0
    weight = generator.standard_normal((out_features, in_features))
    linear = nn.Linear(in_features, out_features).double()
    with torch.no_grad():
        linear.weight.copy_(torch.from_numpy(weight))
    statistics = lro.calibrate(linear, [torch.from_numpy(data)])[""]
    space = LayerSubspaces.of_layer(linear, statistics, centered=centered)
    # Shares next to a step of the cumulated spectrum may fall to either side by rounding; 0.5 ... 0.99 do not here.
    assert_spaces_agree(space, data, weight, centered, thresholds=(0.5, 0.9, 0.99))
    # 1 counts the numerical rank.
    for subspace, seen in ((space.input, data), (space.output, data @ weight.T)):
        seen = seen - seen.mean(0) if centered else seen
        values = np.linalg.svd(seen, compute_uv=False)
        scale = np.abs(data).max() * np.abs(weight).max() * 100 + 1e-300
        assert subspace.rank_at(1) == int((values > 1e-6 * max(values.max(initial=0), 1e-6 * scale)).sum())


# --- the threshold ----------------------------------------------------------------------------------------------


def subspace(*spectrum):
    """A space with these variances along the axes."""
    values = torch.tensor(spectrum, dtype=torch.float64)
    return Subspace(lambda: (torch.eye(values.shape[-1], dtype=torch.float64).expand(*values.shape, -1), values))


@pytest.mark.parametrize(
    ("share", "rank"), [(1e-9, 1), (0.5, 1), (0.5001, 2), (0.75, 2), (0.875, 3), (0.9, 4), (1 - 1e-15, 4), (1, 4)]
)
def test_rank_at(share, rank):
    assert subspace(4, 2, 1, 1, 0, 0).rank_at(share) == rank


def test_no_variance_has_rank_0_and_is_fully_explained():
    assert subspace(0, 0, 0).rank_at(0.9) == subspace(0, 0, 0).rank_at(1) == 0
    assert subspace(0, 0, 0).explained(0) == 1
    assert subspace(3, 1, 0).explained(1) == 0.75 and subspace(3, 1, 0).explained(0) == 0


def test_groups_take_their_largest_rank():
    groups = subspace([1.0, 0.0], [1.0, 1.0])
    assert groups.ranks_at(0.9).tolist() == [1, 2] and groups.rank_at(0.9) == 2


# --- pitfalls ---------------------------------------------------------------------------------------------------


def calibrated(rows, out_features=12, dtype=torch.float64, centered=True, weight=None):
    """The spaces of a Linear that has seen ``rows``."""
    linear = nn.Linear(rows.shape[1], out_features).to(rows.dtype)
    if weight is not None:
        with torch.no_grad():
            linear.weight.copy_(weight)
    statistics = lro.calibrate(linear, rows.split(512), dtype=dtype)[""]
    return LayerSubspaces.of_layer(linear, statistics, centered=centered)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("out_features", [64, 200])
def test_rounding_noise_is_not_rank(dtype, centered, out_features):
    rows = (torch.randn(4000, 40) @ torch.randn(40, 128) / 40**0.5).double()
    space = calibrated(rows.to(dtype), out_features=out_features, dtype=dtype, centered=centered)
    smallest = np.sqrt(spectrum_of(rows.numpy(), centered)[39])
    assert smallest > 0.1
    assert space.input.rank_at(1) == 40 and space.output.rank_at(1) == 40 and space.utilized_rank(1) == 40


@pytest.mark.parametrize("out_features", [20, 50])
def test_fewer_samples_than_features(out_features):
    space = calibrated(torch.randn(7, 30).double(), out_features=out_features)
    assert space.input.rank_at(1) == space.output.rank_at(1) == 6  # one direction goes to the mean
    assert calibrated(torch.randn(7, 30).double(), centered=False).input.rank_at(1) == 7


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rows", [1, 10, 5000, 100_000])
@pytest.mark.parametrize("out_features", [12, 40])
def test_constant_inputs_have_no_variance(rows, dtype, out_features):
    constant = torch.linspace(-3.7, 1000.1, 16).expand(rows, 16)
    space = calibrated(constant, out_features, dtype)
    assert space.input.rank_at(1) == space.output.rank_at(1) == space.utilized_rank(0.99) == 0
    assert calibrated(constant, out_features, dtype, centered=False).utilized_rank(1) == 1


@pytest.mark.parametrize("out_features", [12, 40])
def test_one_varying_feature_among_constant_ones(out_features):
    rows = torch.full((5000, 16), 0.1)
    rows[:, 3] += 1e-3 * torch.randn(5000)
    space = calibrated(rows, out_features)
    assert space.input.rank_at(1) == space.output.rank_at(1) == 1
    torch.testing.assert_close(space.input.basis[:, 0].abs(), torch.eye(16, dtype=torch.float64)[3])


@pytest.mark.parametrize("out_features", [12, 40])
def test_a_constant_output_has_rank_0(out_features):
    rows = torch.rand(5000, 10).double().softmax(-1)
    space = calibrated(rows, out_features, weight=torch.full((out_features, 10), 3.0))
    assert space.input.rank_at(1) == 9 and space.output.rank_at(1) == 0 and space.utilized_rank(1) == 0


@pytest.mark.parametrize("out_features", [12, 40])
def test_dead_features(out_features):
    rows = torch.randn(500, 16).double()
    rows[:, 5:] = 0
    space = calibrated(rows, out_features)
    assert space.input.rank_at(1) == space.utilized_rank(1) == 5
    assert space.input.basis[5:, :5].abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_an_outlier_feature_does_not_hide_the_others(dtype):
    """One feature with 1e6 times the variance of each other one and, in float64, another with a large mean."""
    rows = torch.randn(20_000, 64)
    rows[:, 0] *= 1000
    rows[:, 1] += 1000 if dtype == torch.float64 else 0
    space = calibrated(rows.to(dtype), dtype=dtype)
    expected = spectrum_of(rows.double().numpy(), True)
    assert space.input.rank_at(1) == 64
    np.testing.assert_allclose(space.input.spectrum.numpy(), expected, rtol=1e-7 if dtype == torch.float64 else 0.05)


@pytest.mark.parametrize("out_features", [12, 40])
def test_zero_inputs(out_features):
    space = calibrated(torch.zeros(50, 16), out_features)
    assert space.utilized_rank(0.9) == 0 and space.output.spectrum.sum() == 0
    assert space.input.basis.isfinite().all() and space.output.basis.isfinite().all()


@pytest.mark.parametrize("centered", [True, False])
def test_noise_is_relative_to_the_outputs_about_the_shift_and_their_terms(centered):
    """Sums in float32 are about a shift that the first rows set, here far from the mean of all rows."""
    rows = torch.randn(1024, 6) + 50 + torch.arange(1024).unsqueeze(1) / 100
    space = calibrated(rows, 4, torch.float32, centered)
    moments, rows = space.statistics.activations, rows.double()
    about = rows - moments.shift
    assert about.mean(0).min() > 1
    squares = (about @ space.weight.T).square().mean(0) + about.square().mean(0) @ space.weight.square().T
    outputs = rows @ space.weight.T
    variances = outputs.var(0, correction=0) if centered else outputs.square().mean(0)
    torch.testing.assert_close(space.noise(variances, moments) / moments.rounding, 2 * squares, rtol=1e-4, atol=0)


# --- sharing, sides, errors -------------------------------------------------------------------------------------


def test_layers_with_a_common_input_share_its_space():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k = nn.Linear(6, 6), nn.Linear(6, 4)

        def forward(self, x):
            return self.q(x), self.k(x)

    model = Shared()
    covariances = lro.calibrate(model, [torch.randn(20, 6)])
    spaces = layer_subspaces({"q": model.q, "k": model.k}, covariances)
    assert spaces["q"].input is spaces["k"].input
    assert spaces["k"].output.basis.shape == (4, 4)
    apart = layer_subspaces({"k": model.k}, covariances)["k"]
    assert torch.equal(apart.output.spectrum, spaces["k"].output.spectrum)


def test_a_streamed_output_gives_the_same_output_space():
    model = nn.Sequential(nn.Linear(10, 6)).double()
    x = torch.randn(50, 10, dtype=torch.float64)
    by_input, by_output = (
        layer_subspaces({"0": model[0]}, lro.calibrate(model, [x], side=side))["0"] for side in ("input", "output")
    )
    assert by_output.input is None
    assert by_output.utilized_rank(0.9) == by_input.output.rank_at(0.9)
    torch.testing.assert_close(by_output.output.spectrum, by_input.output.spectrum, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(by_output.output_mean, by_input.output_mean)
    torch.testing.assert_close(by_output.half_moment + by_output.half_moment.mT, by_output.moment)


@pytest.mark.parametrize("side", ["input", "output"])
def test_grouped_convolutions_are_groups_of_matrices(side):
    conv = nn.Conv2d(4, 6, 3, groups=2).double()
    model = nn.Sequential(conv)
    x = torch.randn(3, 4, 6, 6, dtype=torch.float64)
    space = layer_subspaces({"0": conv}, lro.calibrate(model, [x], side=side))["0"]
    variance = float(conv(x).detach().var((0, 2, 3), correction=0).sum())
    assert space.output_variance == pytest.approx(variance)
    patches = nn.functional.unfold(x, 3).transpose(1, 2).flatten(0, 1).numpy()
    weight = conv.weight.detach().flatten(1).numpy()
    for group in range(2):
        rows = patches[:, 18 * group : 18 * (group + 1)]
        out = spectrum_of(rows @ weight[3 * group : 3 * (group + 1)].T, True)
        np.testing.assert_allclose(space.output.spectrum[group].numpy(), out, atol=1e-9)
        if side == "input":
            np.testing.assert_allclose(space.input.spectrum[group].numpy(), spectrum_of(rows, True), atol=1e-9)


@pytest.mark.parametrize(
    ("layer", "other"),
    [(nn.Linear(8, 4), nn.Linear(6, 4)), (nn.Linear(18, 6), nn.Conv2d(4, 6, 3, groups=2))],
    ids=["features", "groups"],
)
def test_statistics_of_another_layer_are_an_error_by_name(layer, other):
    x = torch.randn(2, 4, 5, 5) if isinstance(other, nn.Conv2d) else torch.randn(3, 6)
    covariances = lro.calibrate(nn.Sequential(other), [x])
    with pytest.raises(ValueError, match=r"covariances\['0'\]: activations has features .* on the input side"):
        layer_subspaces({"0": layer}, covariances)


def test_layers_without_statistics_are_left_out():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    covariances = lro.calibrate(model, [torch.randn(3, 4)], filter_fn=lambda module, fqn: fqn == "0")
    assert list(layer_subspaces(dict(model.named_children()), covariances)) == ["0"]
