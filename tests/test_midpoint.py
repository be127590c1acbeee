"""recalibrate: midpoint gradients against a model with the midpoint weights, and a model that is restored."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
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
    """Not at its minimum for any output, so that no gradient is small by chance."""
    return F.cross_entropy(3 * output, torch.arange(len(output)) % 10, reduction="sum")


HALF = lro.CompressionConfig(lro.ParameterBudget(0.55, "loss"), projection="loss")


pytestmark = pytest.mark.filterwarnings("ignore:calibration skips unsupported modules")


@pytest.fixture
def mixed() -> tuple[nn.Module, list[Tensor], lro.Covariances]:
    model = Mixed().double()
    batches = [torch.randn(6, 3, 4, 4).double() for _ in range(3)]
    return model, batches, lro.calibrate(model, batches, sensitivity=loss)


def midpoint_model(model: nn.Module, covariances: lro.Covariances, config: lro.CompressionConfig) -> nn.Module:
    """A dense model whose weights are the mean of the dense weights and of the products of the factors."""
    student, middle = copy.deepcopy(model), copy.deepcopy(model)
    lro.compress_(student, covariances, config)
    for fqn, module in student.named_modules():
        if isinstance(module, (lro.LowRankLinear, lro.LowRankConv2d)):
            layer = middle.get_submodule(fqn)
            assert isinstance(layer, (nn.Linear, nn.Conv2d)) and module.bias is not None
            layer.weight.data = (layer.weight.data + module.weight) / 2
            layer.bias = nn.Parameter((0 if layer.bias is None else layer.bias.data) / 2 + module.bias / 2)
    return middle


def test_midpoint_gradients_are_added_to_the_dense_ones(mixed: Any) -> None:
    model, batches, covariances = mixed
    found = lro.recalibrate(model, covariances, batches, HALF, sensitivity=loss)
    midpoint = lro.calibrate(midpoint_model(model, covariances, HALF), batches, sensitivity=loss)
    assert list(found) == list(covariances)
    for fqn, dense in covariances.items():
        dense_moment = dense.output_gradients.second_moment
        assert (midpoint[fqn].output_gradients.second_moment - dense_moment).norm() > 1e-3 * dense_moment.norm()
        assert found[fqn].side == dense.side
        for name in ("output_gradients", "token_weighted"):
            both, one, other = (getattr(statistics[fqn], name) for statistics in (found, covariances, midpoint))
            assert both.count == one.count + other.count
            both, one, other = (part.about(None) for part in (both, one, other))
            torch.testing.assert_close(both.second_moment, one.second_moment + other.second_moment)
            torch.testing.assert_close(both.total, one.total + other.total)


def test_activation_moments_are_those_of_the_dense_model(mixed: Any) -> None:
    model, batches, covariances = mixed
    found = lro.recalibrate(model, covariances, batches, sensitivity=loss)
    assert all(found[fqn].activations is covariances[fqn].activations for fqn in covariances)
    assert found.skipped == covariances.skipped and found.unreached == covariances.unreached
    lro.compress_(model, found, HALF)  # fits the model


def test_given_covariances_do_not_change(mixed: Any) -> None:
    model, batches, covariances = mixed
    before = copy.deepcopy(covariances)
    lro.recalibrate(model, covariances, batches, sensitivity=loss)
    for fqn, layer in covariances.items():
        for name, moments in layer.moments().items():
            same = before[fqn].moments()[name]
            assert torch.equal(moments.second_moment, same.second_moment) and moments.count == same.count


@pytest.mark.parametrize("fails", [False, True])
def test_model_is_restored(mixed: Any, fails: bool) -> None:
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


@pytest.mark.parametrize("side", ["input", "output"])
def test_token_weighted_outputs_are_the_dense_ones_alone(side: str, mixed: Any) -> None:
    model, batches, _ = mixed
    covariances = lro.calibrate(model, batches, sensitivity=loss, side=side)
    found = lro.recalibrate(model, covariances, batches, HALF, sensitivity=loss, side=side)
    for fqn, layer in found.items():
        assert (layer.token_weighted is covariances[fqn].token_weighted) == (side == "output")


def test_reconstruction_in_the_config_is_not_used(mixed: Any) -> None:
    model, batches, covariances = mixed
    config = replace(HALF, reconstruction="sequential")
    found = lro.recalibrate(model, covariances, batches, config, sensitivity=loss)
    same = lro.recalibrate(model, covariances, batches, HALF, sensitivity=loss)
    for fqn, layer in found.items():
        assert torch.equal(layer.output_gradients.second_moment, same[fqn].output_gradients.second_moment)


def test_unweighted_statistics_stay_unweighted(mixed: Any) -> None:
    model, batches, _ = mixed
    covariances = lro.calibrate(model, batches, sensitivity=loss, token_weights=False)
    found = lro.recalibrate(model, covariances, batches, HALF, sensitivity=loss)
    assert found.has_output_gradients and not found.has_token_weights


def test_transformers_conv1d() -> None:
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


def test_bad_arguments_are_errors_before_any_batch(mixed: Any) -> None:
    model, batches, covariances = mixed
    modules = dict(model.named_modules())
    no_gradients = lro.calibrate(model, batches, filter_fn=lambda module, fqn: fqn == "head")
    with pytest.raises(ValueError, match="hold no output gradients"):
        lro.recalibrate(model, no_gradients, batches, sensitivity=loss)
    with pytest.raises(ValueError, match="sensitivity must be that of the first calibrate"):
        lro.recalibrate(model, covariances, batches)
    with pytest.raises(TypeError, match="covariances must come from calibrate"):
        lro.recalibrate(model, {}, batches, sensitivity=loss)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="config must be a CompressionConfig"):
        lro.recalibrate(model, covariances, batches, "0.5", sensitivity=loss)  # type: ignore[arg-type]
    never = iter([0])  # no batch
    with pytest.raises(ValueError, match="filter_fn does not keep: head"):
        lro.recalibrate(model, covariances, never, sensitivity=loss, filter_fn=lambda module, fqn: fqn != "head")
    with pytest.raises(ValueError, match="token_weights must be True, as in the first calibrate; got False"):
        lro.recalibrate(model, covariances, never, sensitivity=loss, token_weights=False)
    with pytest.raises(TypeError, match="calibrate has no keyword argument 'masks'"):
        lro.recalibrate(model, covariances, never, sensitivity=loss, masks="mask")
    assert next(never) == 0
    with pytest.raises(ValueError, match="side must stream what the first calibrate did; it differs at conv, twice"):
        lro.recalibrate(model, covariances, batches, sensitivity=loss, side="output")
    with pytest.raises(ValueError, match="batches was empty"):
        lro.recalibrate(model, covariances, iter(()), sensitivity=loss)
    assert dict(model.named_modules()) == modules


TWO = lro.CompressionConfig(lro.Ranks({"0": 8, "2": 8}), projection="loss")


@pytest.fixture
def two_layers() -> tuple[nn.Sequential, list[Tensor], lro.Covariances]:
    model, batches = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16)), [torch.randn(20, 32)]
    return model, batches, lro.calibrate(model, batches, sensitivity=loss)


def test_inference_mode_gives_ordinary_sums(two_layers: Any) -> None:
    model, batches, covariances = two_layers
    with torch.inference_mode():
        found = lro.recalibrate(model, covariances, batches, TWO, sensitivity=loss)
    assert not any(layer.output_gradients.second_moment.is_inference() for layer in found.values())


def test_filter_is_applied_to_the_dense_layers(two_layers: Any) -> None:
    """It may select modules by identity."""
    model, batches, _ = two_layers
    chosen = {model[2]}
    options: dict[str, Any] = {"sensitivity": loss, "filter_fn": lambda module, fqn: module in chosen}
    covariances = lro.calibrate(model, batches, **options)
    config = lro.CompressionConfig(lro.Ranks({"2": 8}))
    found = lro.recalibrate(model, covariances, batches, config, **options)
    assert list(found) == ["2"] and found["2"].output_gradients.count == 40


def test_inputs_may_be_shared_in_one_run_only() -> None:
    """Activation moments are not added."""

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
    assert found["a"].activations is covariances["a"].activations is not found["b"].activations
    assert found["a"].output_gradients.count == 40


@pytest.mark.parametrize("rows", ["none", "no call"])
def test_expert_not_reached_at_the_midpoint_keeps_its_sums(rows: str) -> None:
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
    for fqn, layer in found.items():
        gradients, before = layer.output_gradients, covariances[fqn].output_gradients
        assert torch.equal(gradients.second_moment, before.second_moment) == (fqn == "rare")
        assert gradients.count == 40, "the samples of both runs"


def test_model_is_restored_after_an_interrupt(two_layers: Any) -> None:
    class Interrupted(nn.Sequential):
        def __setattr__(self, name: str, value: Any) -> None:
            if name == "2" and isinstance(value, lro.LowRankLinear):
                raise KeyboardInterrupt
            super().__setattr__(name, value)

    _, batches, covariances = two_layers
    model = Interrupted(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16))
    modules = dict(model.named_modules())
    with pytest.raises(KeyboardInterrupt):
        lro.recalibrate(model, covariances, batches, TWO, sensitivity=loss)
    assert dict(model.named_modules()) == modules


def test_subspaces_of_the_first_calibration_are_an_error(two_layers: Any) -> None:
    """Their activation moments are the same objects."""
    model, batches, covariances = two_layers
    spaces = layer_subspaces({"0": model[0], "2": model[2]}, covariances)
    found = lro.recalibrate(model, covariances, batches, TWO, sensitivity=loss)
    with pytest.raises(ValueError, match=r"subspaces\['0'\] was computed from other covariances"):
        lro.compress_(model, found, TWO, subspaces=spaces)


def test_every_run_draws_other_signs(mixed: Any) -> None:
    """The same signs in a third run would add the same noise again."""
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
