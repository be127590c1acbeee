"""Sensitivities halfway to the compressed model: against a model of those very weights, and a model left as it was."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowrank_ops as lro
from lowrank_ops.subspaces import layer_subspaces


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


class Mixed(nn.Module):
    """A convolution, sequences, a layer that is called twice, and one without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 48, 3, padding=1)
        self.twice = nn.Linear(48, 48)
        self.block = nn.TransformerEncoderLayer(48, 2, 96, batch_first=True)
        self.head = nn.Linear(48, 10, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.conv(x).relu().flatten(2).mT
        tokens = self.block(self.twice(self.twice(tokens).relu()))
        return self.head(tokens.mean(1))


def loss(output: Tensor, batch: Tensor) -> Tensor:
    """Not at its minimum for any output, so that its gradients are none of chance."""
    return F.cross_entropy(3 * output, torch.arange(len(output)) % 10, reduction="sum")


HALF = lro.CompressionConfig(lro.ParameterBudget(0.55, "loss"), projection="loss")


@pytest.fixture
def mixed() -> tuple[nn.Module, list[Tensor], lro.Covariances]:
    model = Mixed().double()
    batches = [torch.randn(6, 3, 4, 4).double() for _ in range(3)]
    with pytest.warns(UserWarning, match="MultiheadAttention"):
        return model, batches, lro.calibrate(model, batches, sensitivity=loss)


def halfway_to(model: nn.Module, covariances: lro.Covariances, config: lro.CompressionConfig) -> nn.Module:
    """A dense model with the mean of the dense weights and of what the factors make."""
    student, middle = copy.deepcopy(model), copy.deepcopy(model)
    lro.compress_(student, covariances, config)
    for fqn, module in student.named_modules():
        if isinstance(module, (lro.LowRankLinear, lro.LowRankConv2d)):
            layer = middle.get_submodule(fqn)
            assert isinstance(layer, (nn.Linear, nn.Conv2d)) and module.bias is not None
            layer.weight.data = (layer.weight.data + module.weight) / 2
            layer.bias = nn.Parameter((0 if layer.bias is None else layer.bias.data) / 2 + module.bias / 2)
    return middle


@pytest.mark.filterwarnings("ignore:calibration leaves out")
def test_adds_the_gradients_and_weighted_rows_of_the_model_halfway(mixed: Any) -> None:
    model, batches, covariances = mixed
    found = lro.recalibrate(model, covariances, batches, HALF, sensitivity=loss)
    halfway = lro.calibrate(halfway_to(model, covariances, HALF), batches, sensitivity=loss)
    assert list(found.sensitivities) == list(covariances.sensitivities) == list(found)
    for fqn, dense in covariances.sensitivities.items():
        ours, theirs = found[fqn].output_gradients, halfway[fqn].output_gradients
        assert (theirs.second_moment - dense.second_moment).norm() > 1e-3 * dense.second_moment.norm()
        for mine, one, other in ((ours, dense, theirs), (ours.weighted, dense.weighted, theirs.weighted)):
            torch.testing.assert_close(mine.second_moment, one.second_moment + other.second_moment)
            torch.testing.assert_close(mine.total, one.total + other.total)
            assert mine.count == one.count + other.count and mine.side == one.side


@pytest.mark.filterwarnings("ignore:calibration leaves out")
def test_moments_are_the_dense_model_s_and_what_was_given_does_not_change(mixed: Any) -> None:
    model, batches, covariances = mixed
    before = {fqn: gradient.second_moment.clone() for fqn, gradient in covariances.sensitivities.items()}
    found = lro.recalibrate(model, covariances, batches, sensitivity=loss)
    assert all(found[fqn] is covariances[fqn] for fqn in covariances)
    assert found.skipped == covariances.skipped and found.unreached == covariances.unreached
    for fqn, gradient in covariances.sensitivities.items():
        assert torch.equal(gradient.second_moment, before[fqn])
    lro.compress_(model, found, HALF)  # fits the model


@pytest.mark.filterwarnings("ignore:calibration leaves out")
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_handed_back_as_it_was(mixed: Any, fails: bool) -> None:
    model, batches, covariances = mixed
    model.train()
    modules, weights = dict(model.named_modules()), copy.deepcopy(model.state_dict())
    flag, state = model.block.activation_relu_or_gelu, torch.get_rng_state()
    during: list[type] = []

    def watched() -> Iterator[Tensor]:
        yield from batches[:2]
        during.append(type(model.twice))
        if fails:
            raise OSError("the disk is gone")
        yield batches[2]

    if fails:
        with pytest.raises(OSError, match="the disk is gone"):
            lro.recalibrate(model, covariances, watched(), HALF, sensitivity=loss)
    else:
        lro.recalibrate(model, covariances, watched(), HALF, sensitivity=loss)
    assert during == [nn.Linear]
    assert dict(model.named_modules()) == modules and all(module.training for module in modules.values())
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    assert model.block.activation_relu_or_gelu == flag
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.filterwarnings("ignore:calibration leaves out")
@pytest.mark.parametrize("side", ["input", "output"])
def test_outputs_of_other_weights_are_no_rows_of_the_dense_model(side: str, mixed: Any) -> None:
    model, batches, _ = mixed
    covariances = lro.calibrate(model, batches, sensitivity=loss, side=side)
    found = lro.recalibrate(model, covariances, batches, HALF, sensitivity=loss, side=side)
    for fqn, gradient in found.sensitivities.items():
        assert (gradient.weighted is covariances[fqn].token_weighted) == (side == "output")


@pytest.mark.filterwarnings("ignore:calibration leaves out")
def test_rows_alike_and_a_refit_s_config(mixed: Any) -> None:
    model, batches, _ = mixed
    covariances = lro.calibrate(model, batches, sensitivity=loss, token_weights=False)
    config = lro.CompressionConfig(lro.ParameterBudget(0.55, "loss"), projection="loss", refit="sequential")
    found = lro.recalibrate(model, covariances, batches, config, sensitivity=loss)
    assert all(gradient.weighted is None for gradient in found.sensitivities.values())
    same = lro.recalibrate(model, covariances, batches, HALF, sensitivity=loss)
    for fqn, gradient in found.sensitivities.items():
        assert torch.equal(gradient.second_moment, same[fqn].output_gradients.second_moment)


def test_transformers_layers(tmp_path: Any) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50, n_positions=16)
    model = transformers.GPT2LMHeadModel(config).eval()
    batches = [{"input_ids": torch.randint(50, (4, 12))} for _ in range(2)]
    options: dict[str, Any] = {"sensitivity": "fisher", "filter_fn": lambda module, fqn: fqn != "lm_head"}
    covariances = lro.calibrate(model, batches, **options)
    before = model.transformer.h[0].mlp.c_fc
    found = lro.recalibrate(model, covariances, batches, **options)
    assert model.transformer.h[0].mlp.c_fc is before and "Conv1D" in type(before).__name__
    lro.compress_(model, found, HALF)


def test_bad_input_is_told_before_anything_happens(mixed: Any) -> None:
    model, batches, covariances = mixed
    modules = dict(model.named_modules())
    unfelt = lro.calibrate(model, batches, filter_fn=lambda module, fqn: fqn == "head")
    with pytest.raises(ValueError, match="hold no sensitivities"):
        lro.recalibrate(model, unfelt, batches, sensitivity=loss)
    with pytest.raises(ValueError, match="sensitivity must be given"):
        lro.recalibrate(model, covariances, batches)
    with pytest.raises(TypeError, match="covariances must come from calibrate"):
        lro.recalibrate(model, {}, batches, sensitivity=loss)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="config must be a CompressionConfig"):
        lro.recalibrate(model, covariances, batches, lro.ParameterBudget(0.5), sensitivity=loss)  # type: ignore[arg-type]
    never = iter([0])  # no batch
    with pytest.raises(ValueError, match="filter_fn does not keep: head"):
        lro.recalibrate(model, covariances, never, sensitivity=loss, filter_fn=lambda module, fqn: fqn != "head")
    with pytest.raises(ValueError, match="token_weights must be True, as of the first calibrate; got False"):
        lro.recalibrate(model, covariances, never, sensitivity=loss, token_weights=False)
    with pytest.raises(TypeError, match="keyword arguments of calibrate; it has no masks"):
        lro.recalibrate(model, covariances, never, sensitivity=loss, masks="mask")
    assert next(never) == 0
    with pytest.raises(ValueError, match="side must stream what the first calibrate did; it differs at conv, twice"):
        lro.recalibrate(model, covariances, batches, sensitivity=loss, side="output")
    with pytest.raises(ValueError, match="batches was empty"):
        lro.recalibrate(model, covariances, iter(()), sensitivity=loss)
    assert dict(model.named_modules()) == modules


TWO = lro.CompressionConfig(lro.Ranks({"0": 8, "2": 8}), projection="loss")


def two_layers() -> tuple[nn.Sequential, list[Tensor], lro.Covariances]:
    model, batches = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16)), [torch.randn(20, 32)]
    return model, batches, lro.calibrate(model, batches, sensitivity=loss)


def test_in_inference_mode() -> None:
    model, batches, covariances = two_layers()
    with torch.inference_mode():
        found = lro.recalibrate(model, covariances, batches, TWO, sensitivity=loss)
    assert not any(gradient.second_moment.is_inference() for gradient in found.sensitivities.values())


def test_layers_are_chosen_among_the_dense_ones() -> None:
    """A filter may be a set of modules."""
    model, batches, _ = two_layers()
    chosen = {model[2]}
    options: dict[str, Any] = {"sensitivity": loss, "filter_fn": lambda module, fqn: module in chosen}
    covariances = lro.calibrate(model, batches, **options)
    config = lro.CompressionConfig(lro.Ranks({"2": 8}))
    found = lro.recalibrate(model, covariances, batches, config, **options)
    assert list(found.sensitivities) == ["2"] and found["2"].output_gradients.count == 40


def test_sums_of_inputs_need_not_be_shared_as_they_were() -> None:
    """They are not added to."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(32, 16), nn.Linear(32, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x).relu()

    model, batches = Two(), [torch.randn(20, 32)]
    covariances = lro.calibrate(model, batches, sensitivity=loss, share_inputs=False)
    config = lro.CompressionConfig(lro.Ranks({"a": 8}))
    found = lro.recalibrate(model, covariances, batches, config, sensitivity=loss)
    assert found["a"] is covariances["a"] is not found["b"] and found["a"].output_gradients.count == 40


@pytest.mark.parametrize("rows", ["none", "no call"])
def test_an_expert_that_is_not_reached_halfway_keeps_its_sums(rows: str) -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router, self.rare, self.head = nn.Linear(32, 32, bias=False), nn.Linear(32, 32), nn.Linear(32, 16)

        def forward(self, x: Tensor) -> Tensor:
            x = self.router(x)
            routed = x[:, 0] > 0.1
            if rows == "none" or routed.any():
                x = x.index_put((routed,), self.rare(x[routed]))
            return self.head(x)

    model, batches = Experts(), [torch.randn(20, 32)]
    covariances = lro.calibrate(model, batches, sensitivity=loss)
    config = lro.CompressionConfig(lro.Ranks({"head": 8}))
    found = lro.recalibrate(model, covariances, [torch.zeros(20, 32)], config, sensitivity=loss)  # routed nowhere
    for fqn, gradient in found.sensitivities.items():
        same = torch.equal(gradient.second_moment, covariances[fqn].output_gradients.second_moment)
        assert same == (fqn == "rare") and gradient.count == 40, "all are over the samples of both"


def test_a_swap_that_is_interrupted() -> None:
    class Interrupted(nn.Sequential):
        def __setattr__(self, name: str, value: Any) -> None:
            if name == "2" and isinstance(value, lro.LowRankLinear):
                raise KeyboardInterrupt
            super().__setattr__(name, value)

    _, batches, covariances = two_layers()
    model = Interrupted(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16))
    modules = dict(model.named_modules())
    with pytest.raises(KeyboardInterrupt):
        lro.recalibrate(model, covariances, batches, TWO, sensitivity=loss)
    assert dict(model.named_modules()) == modules


def test_a_search_s_journal_is_left_to_the_compression(tmp_path: Any) -> None:
    """Its trials are of other covariances, which the journal would refuse afterwards."""
    model, batches, covariances = two_layers()
    target = model(batches[0]).detach()

    def evaluate(student: nn.Module) -> float:
        return -float((student(batches[0]) - target).square().mean())

    policy = lro.AccuracyGuided(evaluate, max_drop=1.0, journal=tmp_path / "trials")
    config = lro.CompressionConfig(policy, projection="loss")
    found = lro.recalibrate(model, covariances, batches, config, sensitivity=loss)
    assert not (tmp_path / "trials").exists()
    lro.compress_(model, found, config)


def test_subspaces_of_the_sensitivities_before_are_refused() -> None:
    """The moments that they name are the same objects."""
    model, batches, covariances = two_layers()
    spaces = layer_subspaces({"0": model[0], "2": model[2]}, covariances)
    found = lro.recalibrate(model, covariances, batches, TWO, sensitivity=loss)
    with pytest.raises(ValueError, match=r"subspaces\['0'\] was made from other covariances"):
        lro.compress_(model, found, TWO, subspaces=spaces)


@pytest.mark.filterwarnings("ignore:calibration leaves out")
def test_every_run_draws_anew(mixed: Any) -> None:
    """Also a third: the same labels again would add the same noise again."""
    model, batches, _ = mixed
    nothing = lro.CompressionConfig(lro.Ranks({"head": None}))
    covariances = lro.calibrate(model, batches, sensitivity="output")
    twice = lro.recalibrate(model, covariances, batches, nothing, sensitivity="output")
    thrice = lro.recalibrate(model, twice, batches, nothing, sensitivity="output")
    first = covariances["head"].output_gradients.second_moment
    second = twice["head"].output_gradients.second_moment - first
    third = thrice["head"].output_gradients.second_moment - first - second
    for one, other in ((first, second), (second, third), (first, third)):
        assert (one - other).norm() > 0.01 * one.norm()
    again = lro.recalibrate(model, covariances, batches, nothing, sensitivity="output")
    assert torch.equal(again["head"].output_gradients.second_moment, twice["head"].output_gradients.second_moment)
