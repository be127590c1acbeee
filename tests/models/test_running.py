"""Models are handed back in their own modes, and two threads do not disturb each other."""

import copy
import threading
import warnings

import pytest
import torch
from torch import nn

import lowrank_ops as lro
from lowrank_ops.models.running import (
    evaluating,
    exclusive,
    random_state_kept,
    training_flags_kept,
    without_fast_path,
)


class Folds(nn.Linear):
    """Folds an adapter into its weight in eval mode; a second call without a change of mode would fold twice."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.adapter = nn.Parameter(torch.randn(8, 8))

    def train(self, mode: bool = True) -> "Folds":
        super().train(mode)
        self.weight.data += self.adapter.data * (-1 if mode else 1)
        return self


class FoldsInEval(nn.Linear):
    """Defines eval() and not train()."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.calls = 0

    def eval(self) -> "FoldsInEval":
        self.calls += 1
        return super().eval()


class KeepsNormFrozen(nn.Sequential):
    """train() leaves the norm in eval mode, as detection models do."""

    def train(self, mode: bool = True) -> "KeepsNormFrozen":
        super().train(mode)
        self[1].eval()
        return self


class Drops(nn.Linear):
    """eval() loses what train() cannot restore."""

    def train(self, mode: bool = True) -> "Drops":
        if not mode:
            self.weight.data *= 0.5
        return super().train(mode)


class FoldsItsChild(nn.Sequential):
    """Folds an adapter into the weight of a layer inside it, or loses a part of that."""

    def __init__(self, left: float) -> None:
        super().__init__(nn.Linear(8, 8), nn.Linear(8, 8))
        self.left = left

    def train(self, mode: bool = True) -> "FoldsItsChild":
        if mode != self.training:
            self[1].weight.data += -self.left if mode else 1.0
        return super().train(mode)


def nested(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.Sequential(*layers, nn.Dropout(0.5)))


@pytest.mark.parametrize(
    "make", [lambda: Folds().train(False), lambda: nested(Folds()), lambda: nested(nested(Folds()))]
)
def test_folding_layers_come_back_as_they_were(make):
    model = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == modes
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], atol=1e-6, rtol=1e-5)


def test_calibrate_hands_a_folding_layer_back_unfolded():
    model = nested(Folds(), nn.Linear(8, 4)).train()
    before = model[1][0].weight.detach().clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lro.calibrate(model, [torch.randn(20, 8)])
    torch.testing.assert_close(model[1][0].weight, before, atol=1e-6, rtol=1e-5)
    assert all(module.training for module in model.modules())


def test_every_step_hands_a_folding_layer_back_unfolded():
    """The model, the teacher and the copy that trials run on; the layer itself is left out of the compression."""
    batches = [torch.randn(20, 8) for _ in range(2)]
    covariances = lro.calibrate(nested(Folds()), batches, sensitivity="output")
    only = {"filter_fn": lambda module, fqn: fqn == "0"}
    model, student = nested(Folds()).train(), nested(nn.Linear(8, 8))
    before = model[1][0].weight.detach().clone()
    compressed = copy.deepcopy(model)
    ranks = lro.Ranks({"0": 4})
    lro.compress_(compressed, covariances, ranks, **only, reconstruction=lro.SequentialReconstruction(batches))
    steps = {
        "finetune_": lambda: lro.finetune_(student, batches, teacher=model, steps=1),
        "measure_errors": lambda: lro.measure_errors(model, compressed, batches),
        "measure_latency": lambda: lro.measure_latency(model, batches[0], points=2, rounds=1),
        "search_ranks": lambda: lro.search_ranks(model, covariances, lambda trial: 1.0, 0.1, **only),
        "recalibrate": lambda: lro.recalibrate(model, covariances, batches, ranks, sensitivity="output"),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, step in steps.items():
            step()
            torch.testing.assert_close(model[1][0].weight, before, atol=1e-5, rtol=1e-5, msg=name)
            assert all(module.training for module in model.modules()), name


def test_finetuning_leaves_a_student_in_its_modes():
    """A student in eval mode has its adapter folded in again; one in training mode is not folded twice."""
    batches, teacher = [torch.randn(20, 8) for _ in range(2)], nested(nn.Linear(8, 8))
    for mode in (True, False):
        student = nested(Folds()).train(mode)
        folded = student[1][0].weight.detach().clone()
        lro.finetune_(student, batches, teacher=teacher, steps=1, lr=1e-12)
        assert all(module.training == mode for module in student.modules())
        torch.testing.assert_close(student[1][0].weight, folded, atol=1e-5, rtol=1e-5)


def test_state_dict_hooks_have_the_last_word_when_saving(tmp_path):
    """Hooks that fold, unfold or rename what is saved, as adapters do."""

    def fold(module, *args):
        module.weight.data += module.adapter.data

    def unfold(module, *args):
        module.weight.data -= module.adapter.data

    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].adapter = nn.Parameter(torch.randn(8, 8))
    model[1].register_state_dict_pre_hook(fold)
    model[1].register_state_dict_post_hook(
        lambda module, state, prefix, *args: state.update({f"{prefix}weight": state[f"{prefix}weight"].clone()})
    )
    model[1].register_state_dict_post_hook(unfold)
    before = model[1].weight.detach().clone()
    covariances = lro.calibrate(model, [torch.randn(20, 8)])
    lro.compress_(model, covariances, lro.Ranks({"0": 4}))
    lro.save_pretrained(model, tmp_path)
    torch.testing.assert_close(model[1].weight, before)
    plain = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    plain[1].adapter = nn.Parameter(torch.zeros(8, 8))
    loaded = lro.load_pretrained(plain, tmp_path)
    torch.testing.assert_close(loaded[1].weight, before + model[1].adapter)


def test_modules_that_define_eval_are_called():
    model = nested(FoldsInEval())
    with evaluating(model):
        assert model[1][0].calls == 1


def test_modes_of_each_module_survive_a_train_of_the_parent():
    model = KeepsNormFrozen(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout()).train()
    model[2].eval()
    with evaluating(model):
        assert not model.training
    assert [module.training for module in model] == [True, False, False] and model.training


def test_modes_changed_inside_the_block_are_undone():
    model = nested(Folds())
    before = model[1][0].weight.detach().clone()
    with training_flags_kept(model):
        model.eval()
    assert all(module.training for module in model.modules())
    torch.testing.assert_close(model[1][0].weight, before, atol=1e-6, rtol=1e-5)


def test_weights_that_train_does_not_restore_are_named():
    model = nested(Drops(8, 8))
    with pytest.warns(UserWarning, match=r"parameters of 1\.0 have changed"), evaluating(model):
        pass


@pytest.mark.parametrize("outer", [nested, lambda layer: KeepsNormFrozen(nn.Linear(8, 8), nn.BatchNorm1d(8), layer)])
def test_parents_that_fold_their_layers_are_watched(outer):
    """Only the innermost module that does work in train() is named."""
    model = outer(FoldsItsChild(1.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with evaluating(model):
            assert not model.training
    model = outer(FoldsItsChild(0.5))
    with pytest.warns(UserWarning, match=r"parameters of (1\.0|2) have changed"), evaluating(model):
        pass


def calls_compiled(model: nn.Module) -> nn.Module:
    model.run = torch.compile(lambda x: model.layers(x), backend="eager")
    return model


def forward_compiled(model: nn.Module) -> nn.Module:
    model.layers.forward = torch.compile(model.layers.forward, backend="eager")
    return model


class Runs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        self.run = lambda x: self.layers(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.run(x)


class Decorated(Runs):
    @torch.compile(backend="eager")
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.run(x)


@pytest.mark.parametrize("make", [lambda: calls_compiled(Runs()), lambda: forward_compiled(Runs()), Decorated])
def test_layers_in_compiled_functions_are_reached(make):
    """Compiled code does not run hooks that come later; it is compiled again for the new layers."""
    torch.manual_seed(0)
    model, x = make(), torch.randn(40, 8)
    plain = Runs()
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), plain(x))  # compiled here
    found, expected = (lro.calibrate(one, [x], sensitivity="output") for one in (model, plain))
    for fqn, statistics in expected.items():
        assert torch.equal(found[fqn].activations.second_moment, statistics.activations.second_moment)
    for one, statistics in ((model, found), (plain, expected)):
        lro.compress_(one, statistics, lro.Ranks({"layers.0": 4}))
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain(x))
    assert torch._dynamo.eval_frame._stance.stance == "default"


def test_compiled_functions_that_run_the_model_are_reached():
    model, x = Runs(), torch.randn(40, 8)
    run = torch.compile(lambda model, batch: model(batch), backend="eager")
    run(model, x)
    found, expected = lro.calibrate(model, [x], forward=run), lro.calibrate(model, [x])
    assert set(found) == set(expected) == {"layers.0", "layers.2"}
    assert torch.equal(found["layers.2"].activations.total, expected["layers.2"].activations.total)


def test_exported_parts_have_no_modes():
    part = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    model = nn.Sequential(nn.Linear(8, 8), torch.export.export(part, (torch.randn(3, 8),)).module())
    assert set(lro.calibrate(model, [torch.randn(3, 8)])) == {"0"}


def in_thread(function) -> object:
    """The result of ``function`` in another thread, or the exception that it raised."""
    results = []

    def run() -> None:
        try:
            results.append(function())
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    return results[0]


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))


def test_a_model_in_use_by_another_thread_is_refused():
    model, batch = small(), torch.randn(20, 8)
    covariances = lro.calibrate(model, [batch])
    uses = [
        lambda: lro.calibrate(model, [batch]),
        lambda: lro.calibrate(nn.Sequential(model[0]), [batch]),  # shares a layer
        lambda: lro.compress_(model, covariances, 4),
        lambda: lro.search_ranks(model, covariances, lambda m: 1.0, 0.1),
    ]
    with lro.Calibrator(model):
        model(batch)
        for use in uses:
            found = in_thread(use)
            assert isinstance(found, RuntimeError) and "another thread" in str(found)
    assert isinstance(in_thread(uses[0]), lro.Covariances)


def test_a_model_is_free_after_an_error_and_for_its_own_thread():
    model = small()
    with pytest.raises(KeyError), exclusive(model), exclusive(model):
        raise KeyError
    assert in_thread(lambda: exclusive(model).__enter__()) is None


def test_rows_of_other_threads_are_not_counted():
    model, batch = small(), torch.randn(20, 8)
    alone = lro.calibrate(model, [batch], sensitivity="output", num_probes=1)["2"]
    with lro.Calibrator(model) as calibrator:
        model(batch)
        served = in_thread(lambda: model(torch.full((20, 8), 1e3)))
    assert torch.equal(served, model(torch.full((20, 8), 1e3)))
    found = calibrator.covariances["2"]
    assert found.activations.count == 20
    assert torch.equal(found.activations.second_moment, alone.activations.second_moment)


def test_a_calibration_by_other_threads_only_is_an_error():
    model = small()
    with pytest.raises(RuntimeError, match="in other threads only"), lro.Calibrator(model):
        in_thread(lambda: model(torch.randn(20, 8)))


def test_overlapping_threads_leave_the_process_as_it_was():
    model, state = small(), torch.get_rng_state()
    entered, left = threading.Event(), threading.Event()

    def other() -> None:
        with without_fast_path(), random_state_kept(model):
            torch.randn(3)
            entered.set()
            left.wait(60)

    thread = threading.Thread(target=other)
    with without_fast_path(), random_state_kept(model):
        torch.randn(5)
        thread.start()
        entered.wait(60)
    assert not torch.backends.mha.get_fastpath_enabled()
    left.set()
    thread.join(60)
    assert torch.backends.mha.get_fastpath_enabled() and torch.equal(torch.get_rng_state(), state)


def test_parameters_of_inference_mode_are_named_where_gradients_are_needed():
    x = torch.randn(20, 8)
    with torch.inference_mode():
        model = small()
    covariances = lro.calibrate(copy.deepcopy(model), [x], sensitivity="output")
    uses = [
        lambda one: lro.calibrate(one, [x], sensitivity="output"),
        lambda one: lro.correct_predictions(one, covariances, [x], sensitivity="output"),
        lambda one: lro.finetune_(one, [x], teacher=small(), steps=1),
    ]
    for use in uses:
        with pytest.raises(
            ValueError, match=r"parameter '0\.weight' was created in torch\.inference_mode.* copy\.deepcopy"
        ):
            use(model)
        use(copy.deepcopy(model))
    lro.compress_(model, lro.calibrate(model, [x]), 4)  # which differentiates nothing


def test_mlps_are_looked_for_by_one_thread():
    model, x = small(), torch.randn(20, 8)
    covariances = lro.calibrate(model, [x], sensitivity="output")
    with exclusive(model):
        found = in_thread(lambda: lro.correct_predictions(model, covariances, [x], sensitivity="output", channels=True))
    assert isinstance(found, RuntimeError) and "another thread" in str(found)
