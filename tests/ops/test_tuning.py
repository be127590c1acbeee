"""Tuned tables that were edited, or come from another version: what does not fit is named, and so is what would."""

import json

import pytest
import torch

from lowrank_ops.ops import _tuning, covariance, linear
from lowrank_ops.ops._backend import Device, choose
from lowrank_ops.ops.covariance import _cuda as covariance_cuda
from lowrank_ops.ops.covariance import _triton as covariance_triton
from lowrank_ops.ops.covariance import _triton_conv as conv_triton
from lowrank_ops.ops.linear import _cuda as linear_cuda
from lowrank_ops.ops.linear import _triton_config as linear_config

H100 = Device("cuda", 0, (9, 0), 132, 232448)
TILES = {"block_d": 64, "block_t": 32, "num_warps": 4, "num_stages": 2}
DECODE = {"block_m": 16, "block_r": 16, "block_k": 64, "down_warps": 4, "down_stages": 2, "block_n": 32, "slab": 64}
DECODE |= {"rest": 64, "up_warps": 4, "up_stages": 2}
PREFILL = {"block_m": 64, "block_n": 64, "block_k": 32, "piece_0": 64, "piece_1": 0, "warps": 4}
PREFILL |= {"stages_k": 2, "stages_n": 2}
PLAN = {"kernel": "", "splits": 2}


def moments():
    x, state = (torch.empty(size, 64, dtype=torch.float16, device="meta") for size in (96, 64))
    return covariance.describe(state.float(), x)._replace(device=H100)


def patches():
    x = torch.empty(2, 16, 9, 9, dtype=torch.float16, device="meta")
    state, total = torch.empty(1, 144, 144, device="meta"), torch.empty(1, 144, device="meta")
    return covariance.describe_conv(state, total, x, (3, 3), (1, 1), (0, 0), (1, 1))._replace(device=H100)


def layer(tokens):
    sizes = (tokens, 64), (8, 64), (32, 8), (32,)
    factors = (torch.empty(size, dtype=torch.float16, device="meta") for size in sizes)
    return linear.describe(*factors, "none")._replace(device=H100)


def keys(tokens):
    return {"tokens": tokens, "in_features": 64, "rank": 8, "out_features": 32, "dtype": "float16"}


# What asks for a configuration, with a problem, and an entry that is right.
ASKED = {
    "covariance_update triton": (
        covariance_triton.config_for, moments, {"tokens": 96, "features": 64, "dtype": "fp16"}, TILES,
    ),
    "covariance_update cuda": (
        covariance_cuda.choice_for, moments, {"tokens": 96, "features": 64, "dtype": "fp16"}, PLAN,
    ),
    "conv_covariance_update triton": (conv_triton.config_for, patches, {"tokens": 98, "dtype": "fp16"}, TILES),
    "conv_covariance_update cuda": (covariance_cuda.conv_choice_for, patches, {"tokens": 98, "dtype": "fp16"}, PLAN),
    "lowrank_linear triton.decode": (linear_config.decode_config, lambda: layer(4), keys(4), DECODE),
    "lowrank_linear triton.prefill": (linear_config.prefill_config, lambda: layer(512), keys(512), PREFILL),
    "lowrank_linear cuda.decode": (linear_cuda.choice_for, lambda: layer(4), keys(4), PLAN),
}  # fmt: skip


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """Writes an op's table, of one entry, where ``_tuning`` looks for it."""
    monkeypatch.setattr(_tuning, "files", lambda package: tmp_path)
    for module, name in ((covariance_cuda, "_planned"), (covariance_cuda, "_planned_conv"), (linear_cuda, "_planned")):
        monkeypatch.setattr(module, name, lambda *problem: ("", "a plan"))  # as if there were a planner
    cached = (_tuning.load, choose, *(function for function, *_ in ASKED.values()))

    def forget():
        for function in cached:
            function.cache_clear()

    def write(op, **entry):
        path = tmp_path / "tuned" / f"{op}.sm90.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"op": op, "arch": "sm90", "entries": [entry]}))
        forget()
        return path

    yield write
    forget()


@pytest.mark.parametrize("asked", ASKED)
def test_a_config_with_an_unknown_key_is_refused_by_name(shipped, asked):
    function, pose, shape, config = ASKED[asked]
    op, impl = asked.split()
    shipped(op, shape=shape, impl=impl, config=config, us=1.5)
    found = function(pose())
    assert {key: getattr(found, key) for key in config} == config
    first = next(iter(config))
    path = shipped(op, shape=shape, impl=impl, config={**config, "blok": 64})
    with pytest.raises(ValueError, match="the unknown config key 'blok'; accepted are ") as error:
        function(pose())
    told = str(error.value)
    assert told.startswith(f"{path}: ") and f"'{impl}' at the shape {shape}" in told
    assert f"accepted are {first}, " in told and "python -m benchmarks.tune" in told and "remove the file" in told


def test_a_config_that_lacks_a_key_is_refused_by_name(shipped):
    shape = {"tokens": 96, "features": 64, "dtype": "fp16"}
    path = shipped("covariance_update", shape=shape, impl="triton", config={"block_d": 64, "stages": 2})
    told = f"{path}: .* has the unknown config key 'stages' and no config key 'block_t' and no config key 'num_warps'"
    with pytest.raises(ValueError, match=told):
        covariance_triton.config_for(moments())


def test_the_compile_gate_is_told_as_well(shipped):
    shape = {"tokens": 4, "rank": 8, "dtype": "float16"}
    shipped("lowrank_linear", shape=shape, impl="triton.decode", config={**DECODE, "blok": 64})
    with pytest.raises(ValueError, match="the unknown config key 'blok'"):
        linear_config.shipped_decode("sm90")


@pytest.mark.parametrize(
    "change, told",
    [
        ({"confg": {}}, "the unknown key 'confg'; accepted are shape, impl, config, us"),
        ({"table": "mine"}, "the unknown key 'table'; accepted are shape, impl, config, us"),
        ({"config": None}, "no key 'config'; accepted are shape, impl, config, us"),
        ({"shape": {"tokens": 4, "width": 8}}, "the unknown shape key 'width'; accepted are tokens, in_features, rank"),
    ],
)
def test_the_keys_of_an_entry_and_of_its_shape_are_held_to_what_there_is(shipped, change, told):
    entry = {"shape": keys(4), "impl": "triton.decode", "config": DECODE, **change}
    path = shipped("lowrank_linear", **{key: value for key, value in entry.items() if value is not None})
    with pytest.raises(ValueError) as error:
        choose(linear.TABLE, layer(4), "auto")
    assert str(error.value).startswith(f"{path}: ") and told in str(error.value)


def test_an_implementation_without_a_config_keeps_its_own_choice(shipped):
    shape = {"tokens": 96, "features": 64, "dtype": "fp16"}
    for impl in ("triton", "cuda", "two_products"):
        shipped("covariance_update", shape=shape, impl=impl, config={})
        assert covariance_triton.config_for(moments()) == covariance_triton.HEURISTIC[90, "narrow"]
