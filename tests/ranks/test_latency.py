"""Latency: timing the layers, storing the times, and latency budgets."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import lowrank_ops as lro
from lowrank_ops.latencies import LatencyCurve, LayerLatencies
from lowrank_ops.layers import latency as timing
from lowrank_ops.layers.latency import ranks_to_time
from lowrank_ops.models.layers import dimensions
from lowrank_ops.ranks import choose_ranks
from lowrank_ops.ranks.allocation import MIN_STEPS, knapsack
from lowrank_ops.ranks.costs import nanoseconds, options_of
from lowrank_ops.subspaces import LayerSubspaces, layer_subspaces


class Net(nn.Module):
    """A convolution, two layers of one shape, one of them called three times, and one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 32, 3, padding=1)
        self.wide = nn.Linear(32 * 16, 64)
        self.once = nn.Linear(64, 64)
        self.again = nn.Linear(64, 64)
        self.idle = nn.Linear(64, 64)
        self.head = nn.Linear(64, 40)
        self.drop = nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        x = self.once(self.wide(self.conv(x).relu().flatten(1)).tanh())
        for _ in range(3):
            x = x + self.drop(self.again(x).tanh())
        return self.head(x)


@pytest.fixture(scope="module")
def calibrated() -> tuple[Net, lro.Covariances, dict[str, LayerSubspaces]]:
    torch.manual_seed(0)
    model = Net()
    covariances = lro.calibrate(model, [torch.randn(64, 4, 4, 4) for _ in range(6)], sensitivity="fisher")
    layers = {fqn: module for fqn, module in model.named_modules() if fqn in covariances}
    return model, covariances, layer_subspaces(layers, covariances)


def made_up(model: nn.Module, launch: float = 2e-7) -> LayerLatencies:
    """Times that grow with the MACs plus a constant per product, so that small layers gain nothing."""
    curves, layers = {}, {}
    for fqn, calls in (("conv", 1), ("wide", 1), ("once", 1), ("again", 3), ("head", 1)):
        layer = model.get_submodule(fqn)
        rows, (_, fan_in, fan_out) = (16 if fqn == "conv" else 1), dimensions(layer)
        ranks = tuple(ranks_to_time(layer, 5))
        seconds = tuple(2 * launch + rows * rank * (fan_in + fan_out) * 1e-9 for rank in ranks)
        curves[fqn] = LatencyCurve(launch + rows * fan_in * fan_out * 1e-9, ranks, seconds)
        layers[fqn] = {fqn: calls}
    return LayerLatencies("made up", 1, curves, layers)


# --- timing -----------------------------------------------------------------------------------------------------


def test_every_distinct_call_is_timed_once(calibrated, monkeypatch) -> None:
    model, _, _ = calibrated
    timed = []
    in_turn = timing.time_in_turn

    def spy(variants, device, rounds):
        timed.append(list(variants))
        return in_turn(variants, device, rounds)

    monkeypatch.setattr(timing, "time_in_turn", spy)
    model.train()
    found = lro.measure_latency(model, torch.randn(2, 4, 4, 4), points=3, rounds=1)
    assert model.training and model.drop.training and not model.wide._forward_pre_hooks
    square = "Linear 64 -> 64, 2 x 64, float32"
    assert found.layers["once"] == {square: 1} and found.layers["again"] == {square: 3}
    assert found.layers["conv"] == {
        "Conv2d 4 -> 32, kernel 3 x 3, stride (1, 1), padding (1, 1) zeros, dilation (1, 1), groups 1, "
        "2 x 4 x 4 x 4, float32": 1
    }
    assert "idle" not in found.layers and len(timed) == len(found.curves) == 4
    assert [None, 8, 16, 32] in timed  # 64 -> 64 breaks even at rank 32
    curve = found.curves[square]
    assert curve.ranks == (8, 16, 32) and all(second > 0 for second in (curve.dense, *curve.seconds))
    assert found.threads == torch.get_num_threads()


def test_convolutions_of_other_strides_are_timed_apart() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tall = nn.Conv2d(16, 16, 3, stride=(1, 2))
            self.small = nn.Conv2d(16, 16, 3, stride=(2, 2))

        def forward(self, x: Tensor) -> None:
            self.tall(x), self.small(x)

    found = lro.measure_latency(Both(), torch.randn(1, 16, 9, 9), points=2, rounds=1)
    assert len(found.curves) == 2 and found.layers["tall"] != found.layers["small"]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_inputs_are_timed_as_one_matrix() -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 1)

        def forward(self, x: Tensor, padding: Tensor) -> Tensor:
            return self.encoder(x, src_key_padding_mask=padding)

    padding = torch.tensor([[False, False, True], [False, False, False]])
    found = lro.measure_latency(Padded(), (torch.randn(2, 3, 16), padding), points=2, rounds=1)
    assert found.layers["encoder.layers.0.linear1"] == {"Linear 16 -> 32, 5 x 16, float32": 1}


def test_timing_restores_the_random_state() -> None:
    model = nn.Sequential(nn.Linear(24, 24))
    before = torch.get_rng_state()
    lro.measure_latency(model, torch.zeros(2, 24), points=2, rounds=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_variants_are_timed_in_turn() -> None:
    order = []
    clock = iter(range(10**6))

    def variant(name):
        return lambda: (order.append(name), next(clock))

    times = timing.time_in_turn({"a": variant("a"), "b": variant("b")}, torch.device("cpu"), rounds=3)
    assert set(times) == {"a", "b"} and all(0 < second < 1 for second in times.values())
    collapsed = [name for name, _ in itertools.groupby(order)]
    assert collapsed[-6:] == ["a", "b"] * 3


def test_larger_layers_take_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    def operations(run: Callable[[], object], repeats: int, device: torch.device) -> float:
        with FlopCounterMode(display=False) as counter:  # real seconds depend on the load of the machine
            run()
        return 1e-9 * counter.get_total_flops()

    monkeypatch.setattr(timing, "_seconds", operations)
    model = nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 16))
    found = lro.measure_latency(model, torch.randn(256, 512), points=2, rounds=1)
    assert found.seconds("0", None) > found.seconds("1", None)
    assert found.seconds("0", 8) < found.seconds("0", 256)


@pytest.mark.parametrize(
    ("shape", "ranks"), [((64, 64), [8, 16, 24, 32]), ((1024, 1024), [8, 176, 344, 512]), ((8, 8), [8])]
)
def test_ranks_reach_break_even(shape, ranks) -> None:
    assert ranks_to_time(nn.Linear(*shape), 4) == ranks


def test_layers_narrower_than_the_alignment_are_timed() -> None:
    found = lro.measure_latency(nn.Sequential(nn.Linear(4, 3)), torch.randn(2, 4), rounds=1)
    assert found.curves["Linear 4 -> 3, 2 x 4, float32"].ranks == (8,)


@pytest.mark.parametrize(("points", "rounds"), [(1, 1), (2, 0), (2.0, 1), (True, 1)])
def test_bad_arguments_are_refused(points, rounds) -> None:
    error = ValueError if type(points) is int else TypeError
    with pytest.raises(error, match=r"must be an integer( of at least \d)?; got"):
        lro.measure_latency(nn.Sequential(nn.Linear(8, 8)), torch.randn(2, 8), points=points, rounds=rounds)


def test_models_without_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="called no layer that can be compressed"):
        lro.measure_latency(nn.Sequential(nn.ReLU()), torch.randn(2, 8))


# --- curves and files -----------------------------------------------------------------------------------------------


def test_curves_interpolate_linearly() -> None:
    curve = LatencyCurve(9.0, (8, 16, 32), (1.0, 2.0, 6.0))
    assert [curve.at(rank) for rank in (None, 8, 16, 24, 32, 40)] == [9, 1, 2, 4, 6, 8]
    assert LatencyCurve(9.0, (8,), (1.0,)).at(24) == 1


def test_latencies_survive_a_round_trip_by_file(calibrated, tmp_path) -> None:
    latencies = made_up(calibrated[0])
    latencies.save(tmp_path / "latencies.json")
    assert LayerLatencies.load(tmp_path / "latencies.json") == latencies
    config = lro.CompressionConfig(lro.LatencyBudget(0.5, latencies, "loss"), overrides={"head": None})
    assert lro.CompressionConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("{", "does not hold the latencies of layers: it is not JSON"),
        ("[]", "values must be a JSON object; got list"),
        ('{"version": 2}', "version must be 1; got 2"),
        ('{"curves": {}}', "not the latencies of layers: KeyError 'layers'"),
        ('{"curves": {}, "layers": {"a": {"b": 1}}}', "missing or empty"),
        ('{"curves": {"b": {"dense": 1, "ranks": [8], "seconds": []}}, "layers": {}}', "missing or empty"),
        ('{"curves": {"b": {"dense": NaN, "ranks": [8], "seconds": [1]}}, "layers": {}}', "'b' has times"),
        ('{"curves": {"b": {"dense": 1, "ranks": [8], "seconds": ["1"]}}, "layers": {}}', "'b' has times"),
        ('{"curves": {"b": {"dense": 1, "ranks": [8, 4], "seconds": [1, 2]}}, "layers": {}}', "must be ascending"),
        ('{"curves": {"b": {"dense": 1, "ranks": [8], "seconds": [1]}}, "layers": {"a": {"b": null}}}', "has calls"),
    ],
)
def test_other_files_are_refused(tmp_path, text, error) -> None:
    (tmp_path / "file").write_text(text)
    with pytest.raises(ValueError, match=error):
        LayerLatencies.load(tmp_path / "file")


def test_a_budget_needs_latencies() -> None:
    with pytest.raises(TypeError, match=r"latencies must come from measure_latency\(model, batch\).*got int"):
        lro.LatencyBudget(0.5, 3)
    with pytest.raises(ValueError, match="not the latencies of layers"):
        lro.LatencyBudget(0.5, {"layers": 3})


def test_layers_that_were_not_timed_are_named(calibrated) -> None:
    model, _, spaces = calibrated
    latencies = made_up(model)
    part = LayerLatencies("", 1, latencies.curves, {"wide": {"wide": 1}})
    with pytest.raises(ValueError, match="latencies: 'conv' was not timed; call measure_latency"):
        choose_ranks(lro.LatencyBudget(0.5, part, "loss"), spaces)


# --- the budget -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("allocation", ["uniform", "variance", "loss"])
@pytest.mark.parametrize("fraction", [0.4, 0.6, 0.8, 1.0])
def test_budgets_are_met_and_used_up(calibrated, fraction: float, allocation: str) -> None:
    model, _, spaces = calibrated
    latencies = made_up(model)
    ranks = choose_ranks(lro.LatencyBudget(fraction, latencies, allocation), spaces)
    left = fraction * latencies.total(dict.fromkeys(spaces)) - latencies.total(ranks)
    assert left >= 0
    for fqn, space in spaces.items():  # and the rest pays for no larger layer
        options = options_of(fqn, space, nanoseconds(latencies))
        taken = next(index for index, option in enumerate(options) if option.rank == ranks[fqn])
        assert all(option.cost - options[taken].cost > left * 1e9 - 1 for option in options[taken + 1 :])


def kept_loss(spaces: dict[str, LayerSubspaces], ranks: dict[str, int | None]) -> float:
    return sum(float(spaces[fqn].loss.subspace.spectrum[:rank].sum()) for fqn, rank in ranks.items())


@pytest.mark.parametrize("fraction", [0.4, 0.6, 0.8])
def test_no_other_ranks_in_budget_keep_more_loss(calibrated, fraction: float) -> None:
    """Against every combination, up to the knapsack's steps."""
    model, _, spaces = calibrated
    latencies = made_up(model)
    price = nanoseconds(latencies)
    options = {fqn: options_of(fqn, space, price) for fqn, space in spaces.items()}
    budget = math.floor(fraction * sum(choices[-1].cost for choices in options.values()))
    tolerance = len(spaces) * budget / MIN_STEPS
    best = max(
        kept_loss(spaces, {fqn: option.rank for fqn, option in zip(spaces, combination, strict=True)})
        for combination in itertools.product(*options.values())
        if sum(option.cost for option in combination) <= budget - tolerance
    )
    found = choose_ranks(lro.LatencyBudget(fraction, latencies, "loss"), spaces)
    assert kept_loss(spaces, found) >= best * (1 - 1e-12)


def test_layers_that_do_not_get_faster_stay_dense(calibrated) -> None:
    model, _, spaces = calibrated
    latencies = made_up(model, launch=2e-6)  # a second launch costs more than the 64 x 40 layer can save
    ranks = choose_ranks(lro.LatencyBudget(0.8, latencies, "variance"), spaces)
    assert ranks["head"] is None and any(ranks.values())


def test_ranks_slower_than_larger_ones_are_left_out(calibrated) -> None:
    model, _, spaces = calibrated
    latencies = made_up(model)
    jagged = LatencyCurve(100e-6, (8, 16, 24, 32), (20e-6, 60e-6, 40e-6, 50e-6))
    latencies = LayerLatencies("", 1, {**latencies.curves, "once": jagged}, latencies.layers)
    options = options_of("once", spaces["once"], nanoseconds(latencies))
    assert [(option.rank, option.cost) for option in options] == [(8, 20000), (24, 40000), (None, 100000)]


def test_overrides_count_and_tiny_budgets_are_refused(calibrated) -> None:
    model, _, spaces = calibrated
    latencies = made_up(model)
    ranks = choose_ranks(lro.LatencyBudget(0.8, latencies, "loss"), spaces, {"again": None})
    assert ranks["again"] is None
    assert latencies.total(ranks) <= 0.8 * latencies.total(dict.fromkeys(spaces))
    with pytest.raises(ValueError, match=r"fraction=0\.1 cannot be met: the smallest ranks take \d+ nanoseconds"):
        choose_ranks(lro.LatencyBudget(0.1, latencies, "loss"), spaces)


def test_compress_keeps_the_policy(calibrated) -> None:
    model, covariances, _ = calibrated
    copy = Net()
    copy.load_state_dict(model.state_dict())
    config = lro.CompressionConfig(lro.LatencyBudget(0.5, made_up(model), "loss"), projection="loss")
    report = lro.compress_(copy, covariances, config)
    assert lro.CompressionConfig.from_dict(report.to_dict()["config"]) == config
    assert isinstance(copy.wide, lro.LowRankLinear)


# --- the knapsack -----------------------------------------------------------------------------------------------


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[list[int]], list[list[float]], int]:
    """Layers with rising costs and worths, and a budget that at least the cheapest options fit."""
    costs, worths = [], []
    for _ in range(draw(st.integers(1, 4))):
        size = draw(st.integers(1, 5))
        steps = draw(st.lists(st.integers(1, 10**6), min_size=size, max_size=size))
        gains = draw(st.lists(st.floats(0, 1e3), min_size=size, max_size=size))
        costs.append(list(itertools.accumulate(steps)))
        worths.append(list(itertools.accumulate(gains)))
    least = sum(options[0] for options in costs)
    return costs, worths, least + draw(st.integers(0, sum(options[-1] for options in costs)))


@settings(deadline=None, max_examples=150)
@given(problems())
def test_knapsack_is_optimal_up_to_its_steps(problem) -> None:
    costs, worths, budget = problem
    taken = knapsack(costs, worths, budget)
    assert sum(options[index] for options, index in zip(costs, taken, strict=True)) <= budget
    found = sum(values[index] for values, index in zip(worths, taken, strict=True))
    step = math.ceil((budget - sum(options[0] for options in costs)) / MIN_STEPS)
    tolerance = 0 if step <= 1 else len(costs) * step
    best = max(
        sum(values[index] for values, index in zip(worths, combination, strict=True))
        for combination in itertools.product(*(range(len(options)) for options in costs))
        if sum(options[index] for options, index in zip(costs, combination, strict=True)) <= budget - tolerance
        or not any(combination)
    )
    assert found >= best - 1e-9 * max(1.0, best)


@settings(deadline=None, max_examples=100)
@given(problems())
def test_knapsack_is_exact_for_small_costs(problem) -> None:
    costs, worths, budget = problem
    costs = [[1 + cost * 100 // 5 // 10**6 for cost in options] for options in costs]
    least = sum(options[0] for options in costs)
    budget = min(least + budget % 200, least + MIN_STEPS)
    taken = knapsack(costs, worths, budget)
    found = sum(values[index] for values, index in zip(worths, taken, strict=True))
    best = max(
        sum(values[index] for values, index in zip(worths, combination, strict=True))
        for combination in itertools.product(*(range(len(options)) for options in costs))
        if sum(options[index] for options, index in zip(costs, combination, strict=True)) <= budget
    )
    assert found == pytest.approx(best)


def test_knapsack_takes_the_cheapest_of_equal_worth() -> None:
    assert knapsack([[1, 5, 10], [2, 3, 4]], [[1.0, 1.0, 1.0], [0.0, 2.0, 2.0]], 100) == [0, 1]
