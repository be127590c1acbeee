"""Replacement: all layers or none, with refusals that name the layer."""

import copy

import pytest
import torch
from torch import nn

import lowrank_ops as lro
from lowrank_ops.factors import factorize
from lowrank_ops.layers.replace import replace_
from lowrank_ops.models.layers import tied_layers
from lowrank_ops.subspaces import layer_subspaces


def factors_of(layer, rank):
    x = torch.randn(3, 4, 5, 5) if isinstance(layer, nn.Conv2d) else torch.randn(50, layer.in_features)
    space = layer_subspaces({"": layer}, lro.calibrate(layer, [x]))[""]
    return factorize(space, rank)


def test_layers_are_replaced_in_place():
    model = nn.Sequential(nn.Conv2d(4, 4, 2, groups=2), nn.Flatten(), nn.ModuleDict({"fc": nn.Linear(64, 8)})).eval()
    conv, linear = model[0], model[2]["fc"]
    assert replace_(model, {"0": factors_of(conv, 2), "2.fc": factors_of(linear, 8)}) is model
    assert isinstance(model[0], lro.LowRankConv2d) and isinstance(model[2]["fc"], lro.LowRankLinear)
    assert not model[0].training
    x = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(model[0](x), conv(x))
    torch.testing.assert_close(model[2]["fc"].to_dense().weight, linear.weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_new_layers_take_the_flags_of_the_old(dtype):
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)).to(dtype)
    model[1].requires_grad_(False)
    model[2].bias.requires_grad_(False)
    replace_(model, {str(i): factors_of(copy.deepcopy(model[i]).float(), 4).to(dtype) for i in range(3)})
    flags = [[getattr(layer, name).requires_grad for name in ("down", "up", "bias")] for layer in model]
    assert flags == [[True, True, True], [False, False, False], [True, True, False]]


def test_no_factors_change_nothing():
    model = nn.Sequential(nn.Linear(4, 4))
    layer = model[0]
    assert replace_(model, {}) is model and model[0] is layer


def test_a_model_that_is_the_layer_returns_the_new_layer():
    linear = nn.Linear(16, 16)
    new = replace_(linear, {"": factors_of(linear, 16)})
    assert isinstance(new, lro.LowRankLinear)


def test_a_module_used_at_two_places_is_replaced_at_both():
    shared = nn.Linear(16, 16)
    model = nn.Sequential(shared, nn.ReLU(), nn.Sequential(shared), shared)
    replace_(model, {"0": factors_of(shared, 4)})
    assert isinstance(model[0], lro.LowRankLinear) and model[0] is model[2][0] is model[3]


def tied_embedding():
    model = nn.ModuleDict({"embedding": nn.Embedding(20, 16), "head": nn.Linear(16, 20, bias=False)})
    model["head"].weight = model["embedding"].weight
    return model, "head", "'embedding'"


def tied_linears():
    model = nn.ModuleDict({"a": nn.Linear(16, 16), "b": nn.Linear(16, 16)})
    model["b"].weight = model["a"].weight
    return model, "b", "'a'"


def hooked(register):
    def make():
        model = nn.ModuleDict({"a": nn.Linear(16, 16)})
        getattr(model["a"], register)(lambda *args: None)
        return model, "a", "has hooks"

    return make


HOOKS = (
    "register_forward_pre_hook",
    "register_forward_hook",
    "register_full_backward_pre_hook",
    "register_full_backward_hook",
    "register_state_dict_pre_hook",
    "register_state_dict_post_hook",
    "register_load_state_dict_pre_hook",
    "register_load_state_dict_post_hook",
)


def hooked_parameter(register):
    """Gradients that are masked, and an optimizer that steps during the backward pass."""

    def make():
        model = nn.ModuleDict({"a": nn.Linear(16, 16)})
        getattr(model["a"].bias, register)(lambda *args: None)
        return model, "a", "has hooks"

    return make


PARAMETER_HOOKS = ("register_hook", "register_post_accumulate_grad_hook")


@pytest.mark.parametrize(
    "make", [tied_embedding, tied_linears, *map(hooked, HOOKS), *map(hooked_parameter, PARAMETER_HOOKS)]
)
def test_tied_weights_and_hooks_are_refused(make):
    model, fqn, reason = make()
    layers = dict(model)
    with pytest.raises(ValueError, match=f"layer '{fqn}' .*{reason}"):
        replace_(model, {fqn: factors_of(nn.Linear(16, 20), 2)})
    assert all(model[name] is layer for name, layer in layers.items())


def test_what_torch_leaves_of_a_norm_is_no_hook():
    model = nn.Sequential(nn.Linear(16, 20), nn.Linear(20, 16))
    nn.utils.parametrize.remove_parametrizations(nn.utils.parametrizations.weight_norm(model[0]), "weight")
    nn.utils.remove_spectral_norm(nn.utils.spectral_norm(model[1]))
    assert model[0]._load_state_dict_pre_hooks
    replace_(model, {"0": factors_of(nn.Linear(16, 20), 2), "1": factors_of(nn.Linear(20, 16), 2)})
    assert all(isinstance(layer, lro.LowRankLinear) for layer in model)


def test_tied_layers_name_each_other():
    assert tied_layers(tied_embedding()[0]) == {"embedding": "head", "head": "embedding"}
    assert not tied_layers(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))


@pytest.mark.parametrize(
    ("fqn", "reason"), [("c", "no such layer"), ("", "no such layer"), ("attention", "nn.MultiheadAttention applies")]
)
def test_names_that_are_not_layers_are_refused(fqn, reason):
    model = nn.ModuleDict({"a": nn.Linear(16, 16), "attention": nn.MultiheadAttention(16, 2)})
    factors = factors_of(model["a"], 2)
    with pytest.raises(ValueError, match=f"factors names layers that cannot be replaced: '{fqn}': {reason}"):
        replace_(model, {"a": factors, fqn: factors})
    assert type(model["a"]) is nn.Linear


def test_an_error_in_the_last_layer_changes_nothing():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError):  # factors of another shape
        replace_(model, {"0": factors_of(model[0], 2), "1": factors_of(nn.Linear(8, 8), 2)})
    assert all(type(layer) is nn.Linear for layer in model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("error", [TypeError("fixed"), KeyboardInterrupt()])
def test_an_error_during_the_swap_restores_the_layers(error):
    class Fixed(nn.Module):
        """Refuses to replace ``second``."""

        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
            self.made = True

        def __setattr__(self, name, value):
            if name == "second" and hasattr(self, "made"):
                raise error
            super().__setattr__(name, value)

    model = Fixed()
    first, second = model.first, model.second
    factors = {"first": factors_of(first, 4), "second": factors_of(second, 4)}
    with pytest.raises(type(error)):
        replace_(model, factors)
    assert model.first is first and model.second is second
