"""Tuned tables with unknown or missing keys are refused by an error that names the file, the key and what is legal."""

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


# Per op and implementation: the function that reads the table, a problem, and a valid entry.
READERS = {
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
def write_table(tmp_path, monkeypatch):
    """Writes an op's table of one entry where ``_tuning`` reads it."""
    monkeypatch.setattr(_tuning, "files", lambda package: tmp_path)
    for module, name in ((covariance_cuda, "_planned"), (covariance_cuda, "_planned_conv"), (linear_cuda, "_planned")):
        monkeypatch.setattr(module, name, lambda *problem: ("", "a plan"))  # as if the native library were built
    cached = (_tuning.load, choose, *(function for function, *_ in READERS.values()))

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


@pytest.mark.parametrize("reader", READERS)
def test_unknown_config_key_is_named(write_table, reader):
    function, pose, shape, config = READERS[reader]
    op, impl = reader.split()
    write_table(op, shape=shape, impl=impl, config=config, us=1.5)
    found = function(pose())
    assert {key: getattr(found, key) for key in config} == config
    first = next(iter(config))
    path = write_table(op, shape=shape, impl=impl, config={**config, "blok": 64})
    with pytest.raises(ValueError, match="the unknown config key 'blok'; accepted are ") as error:
        function(pose())
    message = str(error.value)
    assert message.startswith(f"{path}: ") and f"'{impl}' at the shape {shape}" in message
    assert (
        f"accepted are {first}, " in message and "python -m benchmarks.tune" in message and "remove the file" in message
    )


def test_missing_config_key_is_named(write_table):
    shape = {"tokens": 96, "features": 64, "dtype": "fp16"}
    path = write_table("covariance_update", shape=shape, impl="triton", config={"block_d": 64, "stages": 2})
    message = f"{path}: .* the unknown config key 'stages' and no config key 'block_t' and no config key 'num_warps'"
    with pytest.raises(ValueError, match=message):
        covariance_triton.config_for(moments())


def test_listing_configurations_checks_the_table(write_table):
    shape = {"tokens": 4, "rank": 8, "dtype": "float16"}
    write_table("lowrank_linear", shape=shape, impl="triton.decode", config={**DECODE, "blok": 64})
    with pytest.raises(ValueError, match="the unknown config key 'blok'"):
        linear_config.shipped_decode("sm90")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"confg": {}}, "the unknown key 'confg'; accepted are shape, impl, config, us"),
        ({"table": "mine"}, "the unknown key 'table'; accepted are shape, impl, config, us"),
        ({"config": None}, "no key 'config'; accepted are shape, impl, config, us"),
        ({"shape": {"tokens": 4, "width": 8}}, "the unknown shape key 'width'; accepted are tokens, in_features, rank"),
    ],
)
def test_wrong_entry_and_shape_keys_are_named(write_table, change, message):
    entry = {"shape": keys(4), "impl": "triton.decode", "config": DECODE, **change}
    path = write_table("lowrank_linear", **{key: value for key, value in entry.items() if value is not None})
    with pytest.raises(ValueError) as error:
        choose(linear.TABLE, layer(4), "auto")
    assert str(error.value).startswith(f"{path}: ") and message in str(error.value)


@pytest.mark.parametrize("impl", ["triton", "cuda", "two_products"])
def test_entry_without_config_keeps_the_heuristic(write_table, impl):
    shape = {"tokens": 96, "features": 64, "dtype": "fp16"}
    write_table("covariance_update", shape=shape, impl=impl, config={})
    assert covariance_triton.config_for(moments()) == covariance_triton.HEURISTIC[90, "narrow"]
