"""Optimizers that hold the parameters of replaced layers warn; others do not."""

import copy
import gc
import warnings

import pytest
import torch
from torch import nn

import lowrank_ops as lro
from lowrank_ops.layers import convert_attention_, quantize_, to_plain_layers
from lowrank_ops.models import old_optimizers
from tests.mixtures import mixture, tokens


def model_and_covariances():
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    return model, lro.calibrate(model, [torch.randn(64, 16)])


def step(model, optimizer):
    model(torch.randn(4, 16)).sum().backward()
    optimizer.step()


def steps_without_warning(model, optimizer):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(model, optimizer)


def compress(model, covariances, folder):
    lro.compress_(model, covariances, lro.Ranks({"re:.*": 4}))


def load(model, covariances, folder):
    smaller = copy.deepcopy(model)
    lro.compress_(smaller, covariances, lro.Ranks({"0": 4}))
    lro.save_pretrained(smaller, folder)
    lro.load_pretrained(model, folder)


@pytest.mark.parametrize(("change", "held"), [(compress, 4), (load, 4)])
def test_an_older_optimizer_warns_once(change, held, tmp_path):
    model, covariances = model_and_covariances()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    steps_without_warning(model, optimizer)
    change(model, covariances, tmp_path)
    with pytest.warns(UserWarning, match=f"this SGD holds {held} parameters of layers that have been replaced"):
        step(model, optimizer)
    steps_without_warning(model, optimizer)
    steps_without_warning(model, torch.optim.Adam(model.parameters()))


def test_converted_attention_is_noticed():
    model = nn.MultiheadAttention(16, 2)
    holder = nn.ModuleDict({"a": model})
    optimizer = torch.optim.SGD(holder.parameters(), lr=0.1)
    convert_attention_(holder)
    with pytest.warns(UserWarning, match="holds 2 parameters"):  # out_proj keeps its own
        optimizer.step()


def test_factors_that_change_their_format_are_noticed():
    model, covariances = model_and_covariances()
    compress(model, covariances, None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    quantize_(model)
    eight_bit = torch.optim.SGD(model.parameters(), lr=0.1)
    model[0].dequantize_()
    for older, held in ((optimizer, 4), (eight_bit, 2)):
        with pytest.warns(UserWarning, match=f"holds {held} parameters"):
            step(model, older)
    steps_without_warning(model, torch.optim.SGD(model.parameters(), lr=0.1))


def test_fused_experts_that_were_split_are_noticed():
    torch.manual_seed(0)
    model = mixture(layers=1)
    covariances = lro.calibrate(model, [tokens()])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    lro.compress_(model, covariances, lro.Ranks({"model.layers.0.mlp.experts.1.down_proj": 8}))
    with pytest.warns(UserWarning, match="holds 2 parameters"):  # of all experts
        optimizer.step()


def test_layers_replaced_for_a_while_are_no_reason():
    model, covariances = model_and_covariances()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    lro.search_ranks(model, covariances, lambda model: 1.0, max_drop=0.5)
    smaller = copy.deepcopy(model)
    compress(smaller, covariances, None)
    to_plain_layers(smaller)
    steps_without_warning(model, optimizer)


def test_nothing_is_kept_of_parameters_that_nobody_holds():
    gc.collect()
    before = len(old_optimizers._replaced)
    model, covariances = model_and_covariances()
    compress(model, covariances, None)
    del covariances
    gc.collect()
    assert len(old_optimizers._replaced) == before
