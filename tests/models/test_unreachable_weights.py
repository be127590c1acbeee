"""Layers whose weights or calls cannot be reached are named, with the cause and the remedy."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

import lowrank_ops as lro
from lowrank_ops.models.layers import find_layers


class Quantized(nn.Linear):
    pass


Quantized.__module__ = "bitsandbytes.nn.modules"


@pytest.fixture(scope="module")
def process_group(tmp_path_factory):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def model_with(layer: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), layer)


def float8() -> nn.Module:
    layer = nn.Linear(8, 8)
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    return layer


def sparse() -> nn.Module:
    layer = nn.Linear(8, 8)
    layer.weight = nn.Parameter(layer.weight.detach().to_sparse_csr(), requires_grad=False)
    return layer


def frozen() -> nn.Module:
    return torch.jit.freeze(torch.jit.script(nn.Sequential(nn.Linear(8, 8)).eval()))


def forward_traced() -> nn.Module:
    block = nn.Sequential(nn.Linear(8, 8))
    block.forward = torch.jit.trace(block, torch.ones(1, 8)).forward
    return block


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (forward_traced, "TorchScript module, which hides its layers"),
        (lambda: nn.Linear(8, 8, device="meta"), "on the meta device and has no values; load the weights"),
        (lambda: nn.Linear(8, 8, bias=False, device="meta"), "on the meta device"),
        (lambda: Quantized(8, 8), r"quantized \(Quantized of bitsandbytes\); compress the float model"),
        (float8, "of torch.float8_e4m3fn, not a plain float tensor; convert it"),
        (sparse, r"sparse \(torch.sparse_csr\); make it dense first"),
        (frozen, "TorchScript module, which hides its layers"),
        (lambda: torch.compile(nn.Sequential(nn.Linear(8, 8))), "compiled, which hides its layers"),
        (lambda: torch.jit.script(nn.Sequential(nn.Linear(8, 8))), "TorchScript module, which hides its layers"),
        (lambda: torch.jit.trace(nn.Linear(8, 8), torch.ones(1, 8)), "TorchScript module"),
    ],
)
def test_unreachable_layers_are_named_with_a_remedy(make, reason):
    model = model_with(make())
    with pytest.warns(UserWarning, match=rf"1: .*{reason}"):
        calibrator = lro.Calibrator(model)
    assert list(calibrator.skipped) == ["1"]


@pytest.mark.parametrize("make", [sparse, frozen])
def test_other_layers_beside_them_are_compressed(make):
    model = model_with(make()).train(False)
    lro.compress_(model, lro.calibrate(model, [torch.randn(20, 8)]), lro.Ranks({"0": 3}))
    assert isinstance(model[0], lro.LowRankLinear)


def test_blocks_compiled_in_place_are_named():
    block = nn.Sequential(nn.Linear(8, 8))
    block.compile()
    layers, skipped = find_layers(model_with(block))
    assert list(layers) == ["0"] and "compiled" in skipped["1"]


def test_sharded_weights_are_named(process_group):
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    layer = nn.Linear(8, 8)
    layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh))
    assert isinstance(layer.weight, DTensor)
    assert "DTensor; compress the whole module before it is sharded" in find_layers(model_with(layer))[1]["1"]


def test_compress_names_layers_that_lost_their_values():
    model = model_with(nn.Linear(8, 8))
    covariances = lro.calibrate(model, [torch.randn(20, 8)])
    with pytest.raises(ValueError, match=r"(?s)hold none.*  0: its weight is on the meta device"):
        lro.compress_(model.to("meta"), covariances, 4)
    with pytest.raises(ValueError, match=r"(?s)covariances has none.*  0: its weight is on the meta device"):
        lro.utilization(model, covariances)
    with pytest.raises(ValueError, match="layer '0' cannot be timed: its weight is on the meta device"):
        lro.measure_latency(model, torch.randn(2, 8))
    with pytest.raises(ValueError, match="teacher has parameters on the meta device"):
        lro.finetune_(model_with(nn.Linear(8, 8)), [torch.randn(2, 8)], teacher=model)


def test_compress_refuses_models_wrapped_for_parallel_training(process_group):
    inner = model_with(nn.Linear(8, 8))
    wraps = {
        "DataParallel": nn.DataParallel,
        "DistributedDataParallel": nn.parallel.DistributedDataParallel,
    }
    for name, wrap in wraps.items():
        for model in (wrap(copy.deepcopy(inner)), nn.Sequential(wrap(copy.deepcopy(inner)))):
            before = dict(model.named_modules())
            covariances = lro.calibrate(model, [torch.randn(20, 8)])
            with pytest.raises(ValueError, match=rf"is wrapped by {name}.* Compress the module first, then wrap it"):
                lro.compress_(model, covariances, 4)
            with pytest.raises(ValueError, match=f"is wrapped by {name}"):
                lro.layers.convert_attention_(model)
            assert dict(model.named_modules()) == before


@pytest.mark.parametrize(
    "function",
    [
        lambda model, path: lro.save_pretrained(model.to("meta"), path),
        lambda model, path: lro.measure_latency(model, [torch.randn(2, 8)]),
        lambda model, path: lro.layers.convert_attention_(model),
    ],
    ids=["save_pretrained", "measure_latency", "convert_attention_"],
)
def test_weights_that_accelerate_moves_are_named(function, tmp_path):
    model = model_with(nn.Linear(8, 8))
    model[1]._hf_hook = object()
    with pytest.raises(ValueError, match=r"1 cannot be used as it is: .*accelerate"):
        function(model, tmp_path / "saved")


@pytest.mark.parametrize("inside", [False, True])
def test_compress_refuses_models_whose_parameters_are_sharded(process_group, inside):
    model = model_with(nn.Linear(8, 8))
    covariances = lro.calibrate(model, [torch.randn(20, 8)])
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    torch.distributed.fsdp.fully_shard(model[1] if inside else model, mesh=mesh)
    with pytest.raises(ValueError, match=r"is wrapped by FSDPModule.* Compress the module first, then wrap it"):
        lro.compress_(model, covariances, lro.Ranks({"0": 4}))
    with pytest.raises(ValueError, match="is wrapped by FSDPModule"):
        lro.search_ranks(model, covariances, lambda trial: 1.0, 0.1)
