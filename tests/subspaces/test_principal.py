"""Wide spaces: decomposed in part, with a bound that holds, and released."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lowrank_ops as lro
from benchmarks.accuracy.decomposition import falling, main, moment_of, refined
from lowrank_ops.subspaces import LayerSubspaces, layer_subspaces
from lowrank_ops.subspaces.principal import WideSubspace, principal_subspace, subspace_iteration


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every space of 40 features or more is a wide one."""
    monkeypatch.setattr("lowrank_ops.subspaces.layer.WIDE", 40)


# --- subspace iteration -----------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    features=st.integers(1, 60),
    share=st.floats(0, 1),
    decay=st.floats(0, 4),
    nonzero=st.floats(0, 1),
    iterations=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_the_dropped_variance_is_exact_and_the_excess_within_its_bound(
    features: int, share: float, decay: float, nonzero: float, iterations: int, seed: int
) -> None:
    spectrum = falling(features, decay)
    spectrum[round(nonzero * features) :] = 0
    moment, _ = moment_of_few(spectrum, seed)
    rank = round(share * features)
    found = subspace_iteration(moment, rank, iterations)
    tolerance = 1e-12 * float(spectrum.sum())
    assert found.basis.shape == (features, rank)
    torch.testing.assert_close(found.basis.T @ found.basis, torch.eye(rank, dtype=torch.float64))
    outside = torch.eye(features, dtype=torch.float64) - found.basis @ found.basis.T
    assert abs(float(found.dropped) - float((outside @ moment).trace())) <= 10 * tolerance
    excess = float(found.dropped) - float(spectrum.sort(descending=True).values[rank:].sum())
    assert excess <= float(found.excess) + tolerance
    assert float(found.excess) <= float(found.dropped)


def moment_of_few(spectrum: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """As ``moment_of``, for any number of features."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(spectrum), len(spectrum))
    basis = torch.linalg.qr(torch.randn(shape, dtype=torch.float64, generator=generator)).Q
    return (basis * spectrum) @ basis.T, basis


def test_it_is_nearly_the_best_and_says_so() -> None:
    spectrum = falling(300, 1.0)
    moment, basis = moment_of(spectrum)
    found = subspace_iteration(moment, 40)
    least = float(spectrum[40:].sum())
    assert float(found.dropped) < 1.005 * least
    assert float(found.excess) < 0.25 * least
    assert float((found.basis.T @ basis[:, :20]).square().sum()) > 20 - 2e-3  # the strongest half is all there


def test_it_converges_on_the_best_directions() -> None:
    moment, basis = moment_of(falling(128, 1.5))
    excess = [float(subspace_iteration(moment, 16, iterations).dropped) for iterations in (1, 2, 4, 8)]
    assert excess == sorted(excess, reverse=True)
    found = subspace_iteration(moment, 16, iterations=60)
    assert float((found.basis.T @ basis[:, :16]).square().sum()) == pytest.approx(16, abs=1e-9)


def test_it_leaves_the_random_state_alone_and_repeats() -> None:
    moment, _ = moment_of(falling(80, 1.0))
    state = torch.get_rng_state()
    first, second = subspace_iteration(moment, 8), subspace_iteration(moment, 8)
    assert torch.equal(first.basis, second.basis) and torch.equal(state, torch.get_rng_state())


# --- wide spaces ------------------------------------------------------------------------------------------------


def counted(moment: Tensor) -> tuple[WideSubspace, list[int]]:
    calls = [0]

    def make() -> Tensor:
        calls[0] += 1
        return moment

    return WideSubspace(make), calls


def test_a_wide_spectrum_is_that_of_a_whole_decomposition() -> None:
    spectrum = falling(96, 2.0)
    spectrum[50:] = 0
    moment, _ = moment_of(spectrum)
    whole, (wide, _) = principal_subspace(moment), counted(moment)
    torch.testing.assert_close(wide.spectrum, whole.spectrum, rtol=1e-9, atol=1e-15)
    assert [wide.rank_at(share) for share in (0.5, 0.99, 1)] == [whole.rank_at(share) for share in (0.5, 0.99, 1)]
    torch.testing.assert_close(wide.total, whole.total)


def test_where_directions_decide_what_is_noise_they_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A feature with little variance, and sums whose rounding hides as much along another feature, not along it."""
    moment = torch.diag(torch.tensor([1.0, 1e-6], dtype=torch.float64))
    mean = torch.tensor([10.0, 0.0], dtype=torch.float64)
    noise = 1e-7
    assert principal_subspace(moment, mean, noise).rank_at(1) == 2
    assert WideSubspace(lambda: moment, mean, noise).rank_at(1) == 2
    turned = moment.flip(0, 1)
    assert principal_subspace(turned, mean, noise).rank_at(1) == WideSubspace(lambda: turned, mean, noise).rank_at(1)
    monkeypatch.setattr(torch.linalg, "eigh", None)  # nothing in doubt: no directions are made
    assert WideSubspace(lambda: moment, mean, 1e-12).rank_at(1) == 2


@pytest.mark.parametrize("spectrum_first", [True, False])
def test_leading_directions_say_what_they_drop(spectrum_first: bool) -> None:
    spectrum = falling(200, 1.0)
    moment, _ = moment_of(spectrum)
    space, _ = counted(moment)
    if spectrum_first:
        _ = space.spectrum
    found = space.leading(20)
    least = float(spectrum[20:].sum())
    outside = torch.eye(200, dtype=torch.float64) - found.basis @ found.basis.T
    assert float(found.dropped) == pytest.approx(float((outside @ moment).trace()))
    excess = float(found.dropped) - least
    assert 0 < excess < 0.01 * least
    if spectrum_first:
        assert float(found.excess) == pytest.approx(excess)  # then it is known
    else:
        assert excess < float(found.excess) < 0.3 * least


def test_many_directions_are_found_exactly() -> None:
    moment, _ = moment_of(falling(90, 1.0))
    space, _ = counted(moment)
    found = space.leading(45)
    assert not found.excess.any()
    torch.testing.assert_close(found.dropped, falling(90, 1.0)[45:].sum())


def test_released_directions_are_made_again_and_spectra_kept() -> None:
    moment, _ = moment_of(falling(100, 1.0))
    space, calls = counted(moment)
    first = space.leading(10).basis
    assert space.leading(10).basis is first and calls == [1]
    _ = space.spectrum
    space.release()
    _ = space.spectrum, space.total
    assert calls == [2]
    assert torch.equal(space.leading(10).basis, first) and calls == [3]


def test_scale_changes_units_only() -> None:
    moment, _ = moment_of(falling(100, 1.0))
    (space, _), factor = counted(moment), torch.tensor(3.0, dtype=torch.float64)
    scaled = space.scaled(factor)
    torch.testing.assert_close(scaled.spectrum, 3 * space.spectrum)
    torch.testing.assert_close(scaled.total, 3 * space.total)
    ours, theirs = scaled.leading(10), space.leading(10)
    assert torch.equal(ours.basis, theirs.basis)
    torch.testing.assert_close((ours.dropped, ours.excess), (3 * theirs.dropped, 3 * theirs.excess))


# --- layers -----------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Two wide layers with a common input, and a narrow one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(64, 64), nn.Linear(64, 96, bias=False), nn.Linear(160, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.cat([self.a(x), self.b(x)], -1).relu())


def calibrated() -> tuple[Net, lro.Covariances, Tensor]:
    torch.manual_seed(0)
    model = Net().double()
    x = torch.randn(600, 64, dtype=torch.float64) * torch.linspace(2, 0.1, 64, dtype=torch.float64) ** 2
    return model, lro.calibrate(model, [x], sensitivity="output"), x


CONFIGS = [
    lro.CompressionConfig(lro.ExplainedVariance(0.9)),
    lro.CompressionConfig(lro.ParameterBudget(0.4)),
    lro.CompressionConfig(lro.ParameterBudget(0.4, "variance")),
    lro.CompressionConfig(lro.ParameterBudget(0.4, "loss"), projection="loss"),
    lro.CompressionConfig(lro.Ranks({"a": 12, "b": 12}), projection="utilized"),
    lro.CompressionConfig(lro.Ranks({"a": 12, "b": 12}), projection="weight"),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{type(config.rank).__name__}-{config.projection}")
def test_wide_layers_are_compressed_like_narrow_ones(
    config: lro.CompressionConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same ranks, an error that is predicted exactly, and hardly more of it than the least."""
    model, covariances, x = calibrated()
    report = lro.compress_(model, covariances, config)
    monkeypatch.setattr("lowrank_ops.subspaces.layer.WIDE", 40)
    other, covariances, _ = calibrated()
    dense, _, _ = calibrated()
    wide_report = lro.compress_(other, covariances, config)
    for narrow, wide in zip(report.layers, wide_report.layers, strict=True):
        assert (narrow.fqn, narrow.rank, narrow.projection) == (wide.fqn, wide.rank, wide.projection)
        assert wide.output_variance == pytest.approx(narrow.output_variance)
        assert wide.predicted_error == pytest.approx(narrow.predicted_error, rel=0.05, abs=1e-12)
        if config.projection == "output" and wide.rank is not None:
            assert narrow.excess_error == 0
            assert wide.predicted_error - narrow.predicted_error <= wide.excess_error + 1e-12
        if wide.predicted_loss is not None:
            assert wide.predicted_loss == pytest.approx(narrow.predicted_loss, rel=0.1, abs=1e-9)
    for fqn in ("a", "b"):  # their inputs are those of calibration: what was predicted is what is measured
        with torch.no_grad():
            error = (other.get_submodule(fqn)(x) - dense.get_submodule(fqn)(x)).square().sum(-1).mean()
        layer = next(layer for layer in wide_report.layers if layer.fqn == fqn)
        assert layer.predicted_error == pytest.approx(float(error), rel=1e-6, abs=1e-12)


def test_a_wide_layer_keeps_no_large_matrix_after_use(wide: None) -> None:
    model, covariances, _ = calibrated()
    spaces = layer_subspaces(dict(model.named_children()), covariances)
    lro.compress_(model, covariances, CONFIGS[3], subspaces=spaces)
    for fqn in ("a", "b"):
        assert matrices(spaces[fqn]) == []
    spaces["a"].output.leading(8)
    assert matrices(spaces["a"]) != []  # the search sees what there is


def matrices(space: LayerSubspaces) -> list[str]:
    """Names of the float64 matrices that a layer's spaces hold, the covariances aside."""
    found = []
    objects: list[tuple[str, object]] = [("", space)]
    while objects:
        path, holder = objects.pop()
        for name, value in vars(holder).items():
            matrix = isinstance(value, Tensor) and value.dim() > 1 and name != "_weight"
            if matrix or (name == "_leading" and value is not None):
                found.append(f"{path}.{name}")
            elif name in ("input", "output", "loss", "weight_output", "subspace", "_whole", "_shared") and value:
                objects.append((f"{path}.{name}", value))
    return found


def test_utilization_of_wide_layers_makes_no_directions(wide: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model, covariances, _ = calibrated()
    expected = lro.utilization(model, covariances, filter_fn=lambda module, fqn: fqn != "c")

    def refuse(*arguments: object) -> None:
        raise AssertionError("directions were made")

    monkeypatch.setattr("lowrank_ops.subspaces.principal.principal_subspace", refuse)
    again = lro.utilization(model, covariances, filter_fn=lambda module, fqn: fqn != "c")
    assert again == expected


def test_trials_of_wide_layers_find_directions_once_per_rank(wide: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model, covariances, _ = calibrated()
    ranks = []

    def count(moment: Tensor, rank: int) -> object:
        ranks.append((len(moment), rank))
        return subspace_iteration(moment, rank)

    monkeypatch.setattr("lowrank_ops.subspaces.principal.subspace_iteration", count)
    policy = lro.AccuracyGuided(lambda model: 0.0, max_drop=1.0, allocation="variance", evaluations=3)
    lro.compress_(model, covariances, lro.CompressionConfig(policy, overrides={"a": 8, "b": 8}))
    assert sorted(ranks) == [(64, 8), (96, 8)]


def test_a_weight_that_changed_is_noticed() -> None:
    model, covariances, _ = calibrated()
    spaces = layer_subspaces(dict(model.named_children()), covariances)
    with torch.no_grad():
        model.a.weight += 1
    with pytest.raises(ValueError, match="layer 'a': its weight was changed after its subspaces were made"):
        lro.compress_(model, covariances, lro.CompressionConfig(lro.Ranks({"a": 8})), subspaces=spaces)


def test_progress_shows_the_decomposition(capsys: pytest.CaptureFixture[str]) -> None:
    model, covariances, _ = calibrated()
    lro.utilization(model, covariances, progress=True)
    assert "decomposing: 100%" in capsys.readouterr().err
    lro.compress_(model, covariances, CONFIGS[2], progress=True)
    shown = capsys.readouterr().err
    assert "decomposing: 100%" in shown and "factorising: 100%" in shown


def test_the_benchmark_prints_its_table(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--features", "96", "--decays", "1.5"])
    table = capsys.readouterr().out.split("threads:")[1].splitlines()
    names = [line.split()[1] for line in table[3:]]
    assert names == ["eigh", "eigenvalues", *["iteration"] * 3, *["float32,"] * 6]
    main(["--features", "96", "--decays", "1.5", "--methods", "eigenvalues"])
    assert capsys.readouterr().out.count("eigenvalues") == 2


@pytest.mark.parametrize(("product", "most"), [(False, 2e-3), (True, 2e-5)])
def test_directions_of_float32_are_refined_in_float64(product: bool, most: float) -> None:
    spectrum = falling(96, 1.5)
    moment, basis = moment_of(spectrum)
    vectors = torch.linalg.eigh(moment.float()).eigenvectors
    found = refined(moment, vectors, 24, product)
    assert found.basis.dtype == torch.float64
    torch.testing.assert_close(found.basis.T @ found.basis, torch.eye(24, dtype=torch.float64), rtol=0, atol=1e-13)
    least = spectrum[24:].sum()
    assert -1e-12 < found.dropped / least - 1 < most
    assert (1 - (found.basis.T @ basis[:, :12]).square().sum() / 12).abs() < 1e-7
