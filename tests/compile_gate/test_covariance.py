"""The covariance kernels' predicate against the compiler; and the gate shown to catch what it is there for."""

import dataclasses

import pytest

from lowrank_ops.ops.covariance import _triton, _triton_conv
from tests.compile_gate.gate import ARCHS, assert_clean, compile_specialization

ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}


@pytest.mark.parametrize("arch", ARCHS)
def test_predicate_knows_the_shared_memory(arch):
    """``supports`` refuses by an estimate made without a compiler; it must not be below what the compiler takes."""
    for kind, config in _triton._shipped_configs(arch):
        dtype = "fp32" if kind == "float32" else "bf16"
        product = "bf16x3" if kind == "float32" else "exact"
        specialization = _triton._specialization(arch, config, dtype, product, "even", "state", "fp64")
        assert compile_specialization(specialization, arch).shared <= config.shared_bytes(ITEMSIZE[dtype])
    for specialization in _triton_conv.shipped(arch):
        if "BLOCK_T" not in specialization.constexprs:  # a reduction, which takes no shared memory to speak of
            continue
        blocks = specialization.constexprs["BLOCK_D"], specialization.constexprs["BLOCK_T"]
        config = _triton.Config(*blocks, specialization.num_warps, specialization.num_stages)
        itemsize = ITEMSIZE[specialization.signature["x"].lstrip("*")]
        assert compile_specialization(specialization, arch).shared <= config.shared_bytes(itemsize)


@pytest.mark.parametrize("op", [_triton, _triton_conv], ids=["rows", "patches"])
@pytest.mark.parametrize("arch", ARCHS)
def test_the_reduction_of_every_configuration_is_listed(arch, op):
    listed = [entry for entry in op.shipped(arch) if entry.kernel is _triton.device_code().reduce_kernel]
    for _, config in op._shipped_configs(arch):
        for state in ("*fp32", "*fp64"):
            assert any(
                entry.constexprs["BLOCK_D"] == config.block_d and entry.signature["state"] == state for entry in listed
            )


def test_gate_catches_spills():
    config = dataclasses.replace(_triton.HEURISTIC[90, "wide"], block_d=256, num_stages=2)
    spilled = _triton._specialization(90, config, "bf16", "exact", "even", "state", "fp32")
    with pytest.raises(AssertionError, match=r"spills .* LDL"):
        assert_clean(compile_specialization(spilled, 90), 90, tma=True)


def test_gate_catches_too_much_shared_memory():
    config = dataclasses.replace(_triton.HEURISTIC[90, "wide"], num_stages=8)
    large = _triton._specialization(90, config, "bf16", "exact", "even", "state", "fp32")
    with pytest.raises(AssertionError, match="bytes of shared memory"):
        assert_clean(compile_specialization(large, 90), 90, tma=True)


def test_gate_catches_loads_that_miss_tma():
    odd = _triton._specialization(90, _triton.HEURISTIC[90, "narrow"], "bf16", "exact", "odd", "state", "fp32")
    with pytest.raises(AssertionError, match="UTMALDG"):
        assert_clean(compile_specialization(odd, 90), 90, tma=True)


def test_integers_that_are_one():
    """Triton makes an integer argument that is 1 a constant, on which a kernel must not call a tensor's methods."""
    update = _triton._specialization(90, _triton.HEURISTIC[90, "narrow"], "bf16", "exact", "odd", "partial", "fp32")
    reduction = _triton._reduction("fp32", 64, channels_last=True)
    convolution = _triton_conv._specialization(
        _triton_conv.HEURISTIC[90, "scalar"], "scalar", "bf16", "exact", False, "state", "fp32"
    )
    for specialization in (update, reduction, convolution):
        free = {parameter.name for parameter in specialization.kernel.params if not parameter.do_not_specialize}
        ones = {name: 1 for name in free - set(specialization.constexprs) if specialization.signature[name] == "i32"}
        assert ones
        constexprs = {**specialization.constexprs, **ones}
        specialization = specialization._replace(constexprs=constexprs, attrs=None)
        assert_clean(compile_specialization(specialization, 90), 90, mma=False)
