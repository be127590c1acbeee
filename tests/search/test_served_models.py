"""A model can be served during searches and recalibrate: trial layers are in copies only."""

import copy
import gc
import pickle
import warnings
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import nn

import lowrank_ops as lro
from lowrank_ops.layers import LowRankLayer
from tests.models.test_running import in_thread

X = torch.linspace(-1, 1, 40 * 16).view(40, 16).sin()
BATCHES = [X, X.flip(0)]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.Tanh(), nn.Linear(32, 16), nn.Dropout(0.5))
    return model.eval()


def score(trial: nn.Module) -> float:
    return -float(trial(X).square().mean())


def search(model: nn.Module, evaluate: Callable[[nn.Module], float] = score, **options) -> lro.Ranks:
    covariances = lro.calibrate(model, BATCHES)
    return lro.search_ranks(model, covariances, evaluate, 0.01, num_evaluations=4, **options)


def evaluating(evaluate: Callable[[nn.Module], float]) -> Callable[[nn.Module, torch.Tensor], torch.Tensor]:
    """A forward that evaluates the model first."""

    def forward(trial: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        evaluate(trial)
        return trial(batch)

    return forward


def measured(model: nn.Module, evaluate: Callable[[nn.Module], float]) -> None:
    covariances = lro.calibrate(model, BATCHES, sensitivity="output")
    lro.measured_ranks(model, covariances, BATCHES, 0.9, sensitivity="output", forward=evaluating(evaluate))


def recalibrated(model: nn.Module, evaluate: Callable[[nn.Module], float]) -> None:
    covariances = lro.calibrate(model, BATCHES, sensitivity="output")
    config, forward = lro.ParameterBudget(0.9), evaluating(evaluate)
    lro.recalibrate(model, covariances, BATCHES, config, sensitivity="output", forward=forward)


@pytest.mark.parametrize("work", [search, measured, recalibrated])
def test_the_model_is_served_as_before_during_every_trial(work) -> None:
    model, calls = network(), []
    with torch.no_grad():
        expected = model(X)
    modules, parameters = list(model.modules()), list(model.parameters())

    def evaluate(trial: nn.Module) -> float:
        calls.append(any(isinstance(module, LowRankLayer) for module in trial.modules()))
        trial.train()
        trial(X)  # changes the statistics of BatchNorm
        with torch.no_grad():
            served = in_thread(lambda: model(X))
        assert torch.equal(served, expected)
        assert list(model.modules()) == modules and not any(module.training for module in modules)
        assert all(map(torch.Tensor.is_set_to, model.parameters(), parameters))
        return score(trial.eval())

    work(model, evaluate)
    assert len(calls) > 1 and (any(calls) or work is recalibrated)
    assert not any(module._forward_pre_hooks for module in modules)


def test_another_dtype_or_state_of_a_trial_stays_in_it() -> None:
    model, seen = network(), []

    def evaluate(trial: nn.Module) -> float:
        seen.append(float(trial.train()(X).square().mean()))
        pickle.dumps(trial)  # with hooks that may be pickled
        trial.double()
        return -float(trial(X.double()).square().mean())

    torch.manual_seed(0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    search(model, evaluate)
    for name, value in model.state_dict().items():
        assert value.dtype == before[name].dtype and torch.equal(value, before[name])


def test_trials_do_not_depend_on_earlier_ones() -> None:
    """As in a search that a cache resumes: buffers are those of the model in every trial."""
    model = network()
    model[4].p = 0.0
    covariances = lro.calibrate(model, BATCHES)
    config, found = lro.CompressionConfig(overrides={"0": 4}), []
    for first in (0, 3):
        values: dict[int, float] = {}

        def evaluate(trial: nn.Module, values: dict[int, float] = values) -> float:
            trial.train()
            for _ in range(3):
                trial(X)
            parameters = sum(parameter.numel() for parameter in trial.parameters())
            values[parameters] = score(trial.eval())
            return values[parameters]

        lro.search_ranks(model, covariances, evaluate, 0.01 * first, num_evaluations=5, config=config)
        found.append(values)
    common = found[0].keys() & found[1].keys()
    assert len(common) > 1 and all(found[0][key] == found[1][key] for key in common)


def test_an_evaluation_of_the_model_itself_is_an_error() -> None:
    model = network()
    with pytest.raises(ValueError, match="evaluate ran the model that was given to the search, which stays dense"):
        search(model, lambda trial: score(model))
    assert not model._forward_pre_hooks


def test_the_model_may_be_the_teacher() -> None:
    model = network()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        search(model, lambda trial: -float((trial(X) - model(X)).square().mean()))
        search(model, lambda trial: -float((trial[:3](X) - model[:3](X)).square().mean()))  # parts of both


def test_an_evaluation_of_something_else_gets_a_warning() -> None:
    model = network()
    part = model[:4]
    for evaluate in (lambda trial: score(part), lambda trial: in_thread(lambda: score(model))):
        with pytest.warns(UserWarning, match="evaluate did not run the compressed copy that it was called with"):
            search(model, evaluate)


def test_a_copy_of_a_trial_may_be_trained() -> None:
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def evaluate(trial: nn.Module) -> float:
        trained = copy.deepcopy(trial)
        with torch.enable_grad():
            trained(X).square().mean().backward()
        for parameter in trained.parameters():
            parameter.sub_(0.1)
        return score(trained)

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        search(model, evaluate)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_trial_may_be_saved_to_run_elsewhere(tmp_path) -> None:
    def evaluate(trial: nn.Module) -> float:
        lro.save_pretrained(trial, tmp_path)
        return 1.0

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        search(network(), evaluate)


def test_a_trial_is_freed_before_the_next_one() -> None:
    model, trials = network(), []
    model[2].parents = [model]  # a cycle, which reference counts do not free

    def evaluate(trial: nn.Module) -> float:
        assert all(old() is None for old in trials)
        trials.append(weakref.ref(trial))
        return score(trial)

    gc.disable()
    try:
        search(model, evaluate)
    finally:
        gc.enable()
    assert len(trials) > 2


def test_a_filter_may_go_by_identity() -> None:
    model = network()
    found = search(model, lambda trial: 1.0 + 0 * score(trial), filter_fn=lambda module, fqn: module is model[3])
    assert set(found.ranks) == {"3"}
    covariances = lro.calibrate(model, BATCHES, sensitivity="output", filter_fn=lambda module, fqn: module is model[3])
    options = {"sensitivity": "output", "filter_fn": lambda module, fqn: module is model[3]}
    assert set(lro.recalibrate(model, covariances, BATCHES, 4, **options)) == {"3"}


def test_an_optimizer_of_the_model_goes_on(recwarn: pytest.WarningsRecorder) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    search(model)
    model(X).square().mean().backward()
    optimizer.step()
    assert not [warning for warning in recwarn if "have been replaced" in str(warning.message)]


def test_a_model_that_cannot_be_copied_is_named() -> None:
    model = network()
    model[0].register_forward_hook(lambda module, args, output: model[2](output))
    covariances = lro.calibrate(model, BATCHES, sensitivity="output")
    for work in (
        lambda: lro.search_ranks(model, covariances, score, 0.1),
        lambda: lro.measured_ranks(model, covariances, BATCHES, 0.5, sensitivity="output"),
        lambda: lro.recalibrate(model, covariances, BATCHES, 4, sensitivity="output"),
    ):
        with pytest.raises(ValueError, match=r"model cannot be copied: in the copy, 0\._forward_hooks would still"):
            work()
