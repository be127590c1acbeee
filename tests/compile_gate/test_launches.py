"""Compiles every kernel that the dispatcher may launch, for every arch, and shows that the gate catches faults."""

import dataclasses

import pytest

from lowrank_ops.ops import _tuning
from lowrank_ops.ops.covariance import _triton, _triton_conv
from lowrank_ops.ops.linear import _triton as linear_triton
from lowrank_ops.ops.linear import _triton_config
from tests.compile_gate.gate import ARCHS, assert_clean, compile_launch, loads_in_flight, unfenced_mmas
from tests.compile_gate.launches import CASES, DEVICES, launches, linear_problems

LAUNCHES = {(op, arch): launches(op, arch) for op in CASES for arch in ARCHS}
# ptxas of Triton 3.9 spills 8 bytes here, with 4 warps as with 8 and below the register limit; that of 3.6 does not.
KNOWN_SPILLS = {(100, "fp32 tf32 unaligned partial fp32 covariance_kernel"): 8}
ONES = ("covariance_kernel", "conv_covariance_kernel", "reduce_kernel")  # kernels that specialize on integers


@pytest.mark.parametrize(
    "arch, launch",
    [
        pytest.param(arch, launch, id=f"{op}-sm{arch}-{launch.name}".replace(" ", "-"))
        for (op, arch), listed in LAUNCHES.items()
        for launch in listed
    ],
)
def test_kernel_is_clean(arch, launch):
    report = compile_launch(launch, arch)
    # With 8-bit factors Triton 3.9 does not pipeline the second loop for sm_100, so that it loads after each tile.
    pipelined = arch >= 90 and not (arch == 100 and launch.name.endswith("8-bit prefill_kernel"))
    in_flight = 1 if launch.kernel.__name__.endswith("prefill_kernel") and pipelined else 0
    spills = KNOWN_SPILLS.get((arch, launch.name), 0)
    assert_clean(report, arch, tma=launch.tma, mma=launch.mma, spills=spills, in_flight=in_flight)
    # supports() refuses by an estimate of shared memory, which must not be below what the compiler takes.
    assert report.shared <= launch.shared_limit


@pytest.mark.parametrize("arch", ARCHS)
def test_every_configuration_is_launched(arch):
    linear_configs = {dataclasses.replace(config, **parts(config)) for config, *_ in linear_problems(DEVICES[arch])}
    name = f"sm{arch}"
    shipped = (*_triton_config.shipped_decode(name), *_triton_config.shipped_prefill(name))
    assert linear_configs == {config for config in shipped if not linear_triton.unfenced(config, DEVICES[arch])}
    for op, heuristic in (
        ("covariance_update_", _triton.HEURISTIC),
        ("conv_covariance_update_", _triton_conv.HEURISTIC),
    ):
        launched = {tiles(launch) for launch in LAUNCHES[op, arch]}
        assert {
            (config.block_d, config.block_t, config.num_warps, config.num_stages)
            for (of, _), config in heuristic.items()
            if of == arch
        } == launched - {None}


def parts(config):
    return {"parts": 1} if isinstance(config, _triton_config.PrefillConfig) else {}


def tiles(launch):
    if "BLOCK_T" not in launch.constexprs:
        return None
    constants, options = launch.constexprs, launch.options
    return constants["BLOCK_D"], constants["BLOCK_T"], options["num_warps"], options["num_stages"]


def test_tuned_configurations_are_launched(monkeypatch):
    config = dataclasses.replace(_triton.HEURISTIC[80, "narrow"], block_t=128)
    shape = {"tokens": 96, "features": 64, "dtype": "bf16", "loads": "vector"}
    decode = dataclasses.replace(_triton_config.shipped_decode("sm80")[0], block_k=64)
    sizes = {"tokens": 4, "in_features": 256, "rank": 8, "out_features": 64, "dtype": "bfloat16"}
    entries = {
        "covariance_update": {"shape": shape, "impl": "triton", "config": dataclasses.asdict(config)},
        "conv_covariance_update": {"shape": shape, "impl": "triton", "config": dataclasses.asdict(config)},
        "lowrank_linear": {"shape": sizes, "impl": "triton.decode", "config": dataclasses.asdict(decode)},
        "lowrank_linear_grouped": {"shape": sizes, "impl": "triton.decode", "config": dataclasses.asdict(decode)},
    }
    monkeypatch.setattr(_tuning, "load", lambda op, arch: (entries[op],))
    monkeypatch.setattr(_tuning, "nearest", lambda op, arch, shape: None)
    for op in ("covariance_update_", "conv_covariance_update_"):
        assert any(launch.constexprs.get("BLOCK_T") == 128 for launch in launches(op, 80))
    for op in ("lowrank_linear", "lowrank_linear_grouped"):
        assert any(launch.constexprs.get("BLOCK_K") == 64 for launch in launches(op, 80))


def planted(case, **constexprs):
    """The launch of a covariance case on sm_90 with other constexprs."""
    (launch,) = (
        launch
        for launch in LAUNCHES["covariance_update_", 90]
        if launch.case == case and launch.kernel.__name__ == "covariance_kernel"
    )
    return launch._replace(constexprs=launch.constexprs | constexprs)


def test_gate_catches_spills():
    launch = planted("bf16 wide state fp64", BLOCK_D=256)
    signature = launch.signature | {"x": "tensordesc<bf16[64, 256]>"}
    launch = launch._replace(signature=signature, options={"num_warps": 8, "num_stages": 2})
    with pytest.raises(AssertionError, match=r"spills .* LDL"):
        assert_clean(compile_launch(launch, 90), 90, tma=True)


def test_gate_catches_too_much_shared_memory():
    launch = planted("bf16 wide state fp64")
    large = launch._replace(options=launch.options | {"num_stages": 8})
    with pytest.raises(AssertionError, match="bytes of shared memory"):
        assert_clean(compile_launch(large, 90), 90, tma=True)


def test_gate_catches_loads_without_tma():
    with pytest.raises(AssertionError, match="UTMALDG"):
        assert_clean(compile_launch(planted("bf16 narrow unaligned state fp32"), 90), 90, tma=True)


@pytest.mark.skipif(not LAUNCHES["lowrank_linear", 90][-1].name.startswith("prefill"), reason="refused by this Triton")
def test_gate_catches_loops_that_wait_for_all_loads():
    launch = next(launch for launch in LAUNCHES["lowrank_linear", 90] if launch.name.startswith("prefill"))
    fewer = launch._replace(constexprs=launch.constexprs | {"STAGES_N": 2})
    with pytest.raises(AssertionError, match=r"\[2, 0\] groups of loads"):
        assert_clean(compile_launch(fewer, 90), 90, in_flight=1)


LOOP = """
.L_x_1:
        /*0010*/                   DEPBAR.LE SB0, 0x1 ;
        /*0020*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
{fence}        /*0040*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
        /*0050*/                   LDGSTS.E.BYPASS.128 [R5], desc[UR10][R2.64] ;
        /*0060*/                   LDGDEPBAR ;
        /*0070*/              @!P0 BRA `(.L_x_1) ;
        /*0080*/                   DEPBAR.LE SB0, 0x0 ;
"""


def test_gate_catches_missing_fences():
    fence = "        /*0030*/                   FENCE.VIEW.ASYNC.S ;\n"
    assert unfenced_mmas(LOOP.format(fence=fence)) == 0
    assert unfenced_mmas(LOOP.format(fence="")) == 1
    assert unfenced_mmas(LOOP.format(fence="").replace("HGMMA.64x64x16.F32", "HMMA.16816.F32")) == 0
    assert loads_in_flight(LOOP.format(fence="")) == [1]


@pytest.mark.parametrize("kernel", ONES)
def test_integers_of_one_compile(kernel):
    """Triton makes an integer argument of 1 a constant, on which a kernel must not call a tensor's methods."""
    op = "conv_covariance_update_" if kernel == "conv_covariance_kernel" else "covariance_update_"
    launch = next(
        launch
        for launch in LAUNCHES[op, 90]
        if launch.kernel.__name__ == kernel and not launch.tma and "bf16x3" not in launch.case
    )
    specialized = {parameter.name for parameter in launch.kernel.params if not parameter.do_not_specialize}
    ones = {name: 1 for name, kind in launch.signature.items() if kind == "i32" and name in specialized}
    assert ones
    launch = launch._replace(constexprs=launch.constexprs | ones, attrs={})
    assert_clean(compile_launch(launch, 90), 90, mma=False)
