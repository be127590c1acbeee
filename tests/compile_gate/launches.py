"""Records the Triton launches that the dispatcher would make on a GPU of each arch, as kernels to compile.

Each case poses a problem, lets the op choose a configuration and launches it on CPU tensors, with the launch replaced
by a recorder. The recorder specializes arguments as Triton's launch does, so that the gate compiles what would run.
Configurations of tuned tables are launched on the cases of their kind.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from triton.runtime.jit import KernelInterface
from triton.tools.tensor_descriptor import TensorDescriptor

from lowrank_ops.ops import _tuning, covariance, grouped, linear
from lowrank_ops.ops._backend import Backend, Device, choose
from lowrank_ops.ops._triton_device import arch_of
from lowrank_ops.ops.covariance import _triton, _triton_conv
from lowrank_ops.ops.grouped import _triton as grouped_triton
from lowrank_ops.ops.linear import _triton as linear_triton
from lowrank_ops.ops.linear._triton_config import MAX_DECODE_TOKENS, DecodeConfig, PrefillConfig

DEVICES = {
    80: Device("cuda", 0, (8, 0), 108, 166912),  # A100
    90: Device("cuda", 0, (9, 0), 132, 232448),  # H100
    100: Device("cuda", 0, (10, 0), 148, 232448),  # B200
}
WITHOUT_MMA = ("reduce_kernel", "sum_kernel")
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
INT8, FP8 = torch.int8, torch.float8_e4m3fn
_NAMES = {BF16: "bf16", FP16: "fp16", FP32: "fp32", FP64: "fp64", INT8: "i8", FP8: "fp8e4nv"}


class Launch(NamedTuple):
    """A kernel with everything that Triton needs to compile it without a device."""

    case: str  # what was launched
    kernel: Any  # the triton.jit function
    signature: dict[str, str]  # argument -> "*bf16", "i32" or "tensordesc<bf16[64, 128]>"
    constexprs: dict[str, Any]
    attrs: dict[tuple[int, ...], Any]  # (argument index,) -> [["tt.divisibility", 16]]
    options: dict[str, Any]  # num_warps, num_stages, launch_pdl
    shared_limit: int  # bytes that the configuration's predicate allows for
    tma: bool  # must load by TMA
    mma: bool | str  # must use the arch's newest tensor-core instruction, or the one named

    @property
    def name(self) -> str:
        return f"{self.case} {self.kernel.__name__}"


def launches(op: str, arch: int) -> list[Launch]:
    """All distinct kernels that the cases of ``op`` launch on ``arch`` (80, 90 or 100)."""
    distinct = {}
    for launch in CASES[op](DEVICES[arch]):
        key = (launch.kernel, *(repr(sorted(part.items())) for part in launch[2:6]))
        distinct.setdefault(key, launch)
    return list(distinct.values())


@contextlib.contextmanager
def recorded() -> Iterator[list[tuple[Any, tuple[Any, ...], dict[str, Any]]]]:
    """Collects (kernel, args, kwargs) of every launch instead of running it."""
    calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def getitem(kernel, grid):
        return lambda *args, **kwargs: calls.append((kernel, args, kwargs))

    with mock.patch.object(KernelInterface, "__getitem__", getitem):
        yield calls


def specialized(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    """Signature, constexprs, attributes and options of a launch, by the rules of Triton's launch."""
    names = [parameter.name for parameter in kernel.params]
    values = dict(zip(names, args, strict=False)) | {name: kwargs[name] for name in names if name in kwargs}
    options = {name: value for name, value in kwargs.items() if name not in names}
    signature, constexprs, attrs = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        name, value = parameter.name, values[parameter.name]
        is_one = isinstance(value, int) and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or is_one:
            constexprs[name] = value
            continue
        if isinstance(value, TensorDescriptor):
            signature[name] = f"tensordesc<{_NAMES[value.base.dtype]}{list(value.block_shape)}>"
            continue
        if isinstance(value, torch.Tensor):
            signature[name], address = f"*{_NAMES[value.dtype]}", value.data_ptr()
        else:
            signature[name], address = "i32" if abs(value) < 2**31 else "i64", value
        unspecialized = parameter.do_not_specialize or parameter.do_not_specialize_on_alignment
        if not unspecialized and address % 16 == 0:
            attrs[(index,)] = [["tt.divisibility", 16]]
    return signature, constexprs, attrs, options


def _tuned(op: str, device: Device, impl: str, kind: type) -> Iterator[tuple[dict[str, Any], Any]]:
    """The configurations that a tuned table has for ``impl``, each with its shape."""
    for entry in _tuning.load(op, f"sm{arch_of(device.capability)}"):
        if (config := _tuning.configured(entry, impl, kind)) is not None:
            yield entry["shape"], config


def _record(case, config, launch, *, shared_limit, tma=False):
    with recorded() as calls:
        launch()
    assert calls, case
    for kernel, args, kwargs in calls:
        parts = specialized(kernel, args, kwargs)
        without_mma = kernel.__name__ in WITHOUT_MMA
        # The rows of the weights in an MMA.
        rows = {"down_kernel": "block_r", "up_kernel": "block_n"}.get(kernel.__name__.removeprefix("grouped_"))
        mma = "HMMA" if rows and getattr(config, rows) < 64 else not without_mma
        yield Launch(case, kernel, *parts, shared_limit, tma and not without_mma, mma)


# --- covariance_update_ -------------------------------------------------------------------------------------------

FEW, MANY = 64, 12608  # tokens: one split, whose program adds to the state, or several
WIDE, NARROW = 1032, 200  # features; multiples of 8 but not of 16, which specializes least
COVARIANCE = {
    "bf16 wide state fp64": (BF16, WIDE, FEW, FP64, {}),
    "bf16 wide partial fp64": (BF16, WIDE, MANY, FP64, {}),
    "bf16 wide partial fp32": (BF16, WIDE, MANY, FP32, {}),
    "fp16 wide atomic fp32": (FP16, WIDE, MANY, FP32, {"deterministic": False}),
    "bf16 wide unaligned state fp32": (BF16, WIDE + 1, FEW, FP32, {}),
    "bf16 narrow state fp64": (BF16, NARROW - 24, FEW, FP64, {}),
    "bf16 narrow partial fp32": (BF16, NARROW - 24, MANY, FP32, {}),
    "bf16 narrow unaligned state fp32": (BF16, NARROW - 25, FEW, FP32, {}),
    "fp32 bf16x3 state fp64": (FP32, NARROW, FEW, FP64, {}),
    "fp32 bf16x3 unaligned partial fp64": (FP32, NARROW + 1, MANY, FP64, {}),
    "fp32 tf32 state fp64": (FP32, NARROW, FEW, FP64, {"allow_tf32": True}),
    "fp32 tf32 unaligned partial fp32": (FP32, NARROW + 1, MANY, FP32, {"allow_tf32": True}),
}


def _covariance(device):
    tuned = list(_tuned("covariance_update", device, "triton", _triton.Config))
    for case, (dtype, features, tokens, state_dtype, options) in COVARIANCE.items():
        offset = 1 if "unaligned" in case else 0  # elements off 16 bytes, where the row stride is odd as well
        x = torch.empty(offset + tokens * features, dtype=dtype)[offset:].view(tokens, features)
        state = torch.empty(features, features, dtype=state_dtype), torch.empty(features, dtype=state_dtype)
        problem = covariance.describe(state[0], x, **options)._replace(device=device)
        assert choose(covariance.TABLE, problem, "auto").backend is Backend.TRITON, case
        assert _triton.plan(problem).constants["DEST"] in case, case
        configs = [_triton.config_for(problem)]
        if "wide state fp64" in case or case.endswith("bf16x3 state fp64"):
            configs += [config for shape, config in tuned if (shape["dtype"] == "fp32") == (dtype == FP32)]
        for config in configs:
            plan = _triton.plan_with(problem, config)
            yield from _record(
                case,
                config,
                lambda plan=plan, state=state, x=x, problem=problem: _triton.launch(plan, *state, x, problem),
                shared_limit=config.shared_bytes(dtype.itemsize),
                tma=device.capability >= (9, 0) and "unaligned" not in case,
            )


# --- conv_covariance_update_ --------------------------------------------------------------------------------------

FEW_IMAGES, MANY_IMAGES = 1, 64
CONVOLUTION = {
    "vector bf16 state fp64": (BF16, "channels last", 24, FEW_IMAGES, FP64, {}),
    "vector fp16 atomic fp32": (FP16, "channels last", 24, MANY_IMAGES, FP32, {"deterministic": False}),
    "vector fp32 tf32 partial fp32": (FP32, "channels last", 24, MANY_IMAGES, FP32, {"allow_tf32": True}),
    "scalar bf16 state fp64": (BF16, "nchw", 24, FEW_IMAGES, FP64, {}),
    "scalar bf16 partial fp32": (BF16, "nchw", 24, MANY_IMAGES, FP32, {}),
    "scalar fp32 bf16x3 state fp64": (FP32, "nchw", 24, FEW_IMAGES, FP64, {}),
    "scalar bf16 channels-last partial fp64": (BF16, "channels last", 21, MANY_IMAGES, FP64, {}),
}


def _convolution(device):
    kernel_size, stride, padding, dilation = (3, 3), (2, 2), (1, 1), (1, 1)
    tuned = list(_tuned("conv_covariance_update", device, "triton", _triton.Config))
    for case, (dtype, layout, channels, images, state_dtype, options) in CONVOLUTION.items():
        x = torch.empty(images, channels, 24, 40, dtype=dtype)
        if layout == "channels last":
            x = x.to(memory_format=torch.channels_last)
        features = channels * 9
        state = torch.empty(1, features, features, dtype=state_dtype), torch.empty(1, features, dtype=state_dtype)
        problem = covariance.describe_conv(*state, x, kernel_size, stride, padding, dilation, **options)
        problem = problem._replace(device=device)
        if _triton_conv.unfenced(problem):
            continue
        assert choose(covariance.CONV_TABLE, problem, "auto").backend is Backend.TRITON, case
        plan = _triton_conv.plan(problem).plan
        assert plan.constants["DEST"] in case and (plan.vector > 1) == case.startswith("vector"), case
        loads = _triton_conv.table_shape(problem)["loads"]
        configs = [_triton_conv.config_for(problem)]
        configs += [
            config for shape, config in tuned if (shape["dtype"] == "fp32", shape["loads"]) == (dtype == FP32, loads)
        ]
        for config in configs:
            conv = _triton_conv.plan_with(problem, config)
            yield from _record(
                case,
                config,
                lambda conv=conv, state=state, x=x: _triton_conv.launch(conv, *state, x),
                shared_limit=config.shared_bytes(dtype.itemsize),
            )


# --- lowrank_linear -----------------------------------------------------------------------------------------------

DECODE = [  # tokens, in_features, rank: every block_m, with the slices summed by up_kernel and by sum_kernel
    *((1, 4096, rank) for rank in (136, 264)),
    *((16, in_features, rank) for rank in (136, 264) for in_features in (512, 2048, 4096)),
    *((64, in_features, 136) for in_features in (256, 1024, 4096)),
    *((256, in_features, 104) for in_features in (128, 512, 4096)),
]
PREFILL = [(tokens, 4096, rank) for rank in (64, 128, 136, 192, 256) for tokens in (300, 12608)]
BACKWARD = ((64, 4096, 136), (12608, 4096, 136))
OUT_FEATURES = 2056
# tokens, in_features, rank and format by arch: what the cast of 8-bit factors changes most, which is where wgmma reads
# them from shared memory. Under sm_89 no kernel casts fp8.
EIGHT_BIT = {
    80: [(12608, 4096, 136, INT8), (16, 4096, 264, INT8)],
    90: [(12608, 4096, 136, INT8), (12608, 4096, 256, FP8), (64, 4096, 136, INT8), (16, 4096, 136, FP8)],
    100: [(12608, 4096, 136, INT8)],
}


def linear_problems(device: Device) -> Iterator[tuple[Any, Any, tuple[torch.Tensor, ...]]]:
    """Configuration, problem and tensors, with row-major factors and with those of the backward."""
    for impl, sizes in (("triton.decode", DECODE), ("triton.prefill", PREFILL)):
        config_of = linear_triton.decode_config if impl == "triton.decode" else linear_triton.prefill_config
        for tokens, in_features, rank in sizes:
            problem, tensors = _linear_problem(device, tokens, in_features, rank, OUT_FEATURES)
            if linear_triton.unfenced(config_of(problem), device):
                continue
            assert choose(linear.TABLE, problem, "auto").name == impl, (tokens, in_features, rank)
            yield config_of(problem), problem, tensors
            if (tokens, in_features, rank) in BACKWARD:
                problem, tensors = _linear_problem(device, tokens, in_features, rank, OUT_FEATURES, transposed=True)
                yield config_of(problem), problem, tensors
    for impl, kind in (("triton.decode", DecodeConfig), ("triton.prefill", PrefillConfig)):
        for shape, config in _tuned("lowrank_linear", device, impl, kind):
            sizes = (shape[key] for key in ("tokens", "in_features", "rank", "out_features"))
            eight_bit = next((form for form in (INT8, FP8) if str(form)[6:] in shape["dtype"]), None)
            if not linear_triton.unfenced(config, device):
                yield config, *_linear_problem(device, *sizes, eight_bit=eight_bit)


def _linear_problem(device, tokens, in_features, rank, out_features, transposed=False, eight_bit=None):
    x, y = torch.empty(tokens, in_features, dtype=BF16), torch.empty(tokens, out_features, dtype=BF16)
    factors = torch.empty(rank, in_features, dtype=BF16), torch.empty(out_features, rank, dtype=BF16)
    if transposed:
        factors = [factor.T.contiguous().T for factor in factors]
    bias, scales = torch.empty(out_features, dtype=BF16), (None, None)
    if eight_bit is not None:
        factors, scales = [factor.to(eight_bit) for factor in factors], (torch.empty(rank), torch.empty(out_features))
    problem = linear.describe(x, *factors, bias, "gelu", *scales)._replace(device=device)
    return problem, (x, *factors, bias, y, *scales)


def _eight_bit_problems(device):
    for tokens, in_features, rank, form in EIGHT_BIT[arch_of(device.capability)]:
        problem, tensors = _linear_problem(device, tokens, in_features, rank, OUT_FEATURES, eight_bit=form)
        decode = tokens <= MAX_DECODE_TOKENS
        config = linear_triton.decode_config(problem) if decode else linear_triton.prefill_config(problem)
        if not linear_triton.unfenced(config, device):
            assert choose(linear.TABLE, problem, "auto").name == ("triton.decode" if decode else "triton.prefill")
            yield config, problem, tensors


def _linear(device):
    for config, problem, tensors in (*linear_problems(device), *_eight_bit_problems(device)):
        decode = isinstance(config, DecodeConfig)
        make_launcher = linear_triton._decode_launcher if decode else linear_triton._prefill_launcher
        layout = "" if problem.down_strides[1] == 1 else " transposed"
        yield from _record(
            f"{'decode' if decode else 'prefill'} {problem.tokens}x{problem.in_features} rank {problem.rank}{layout}"
            f"{' 8-bit' if problem.scaled else ''}",
            config,
            lambda make=make_launcher, problem=problem, config=config, tensors=tensors: make(problem, config)(*tensors),
            shared_limit=config.shared_memory(),
        )


# --- lowrank_linear_grouped -----------------------------------------------------------------------------------------

# The tiles are those of lowrank_linear, so each arch compiles one configuration per kernel. Tokens, rank of the first.
GROUPED = {80: [(16, 136), (300, 136)], 90: [(64, 264), (12608, 136)], 100: [(1, 136), (12608, 192)]}


def _grouped(device, sizes=None):
    cases = [(*case, None) for case in sizes or GROUPED[arch_of(device.capability)]]
    for impl, kind in (("triton.decode", DecodeConfig), ("triton.prefill", PrefillConfig)):
        tuned = _tuned("lowrank_linear_grouped", device, impl, kind)
        cases += [(shape["tokens"], shape["rank"], config) for shape, config in tuned]
    for tokens, rank, tuned_config in cases:
        decode = isinstance(tuned_config, DecodeConfig) if tuned_config else tokens <= 256
        # Members of unequal ranks are prefilled one by one if tokens are many.
        ranks, out_features = (rank, 64, 104) if decode else (rank,) * 3, (2056, 512, 520)
        x = torch.empty(tokens, 4096, dtype=BF16)
        downs = [torch.empty(rank, 4096, dtype=BF16) for rank in ranks]
        ups = [torch.empty(out, rank, dtype=BF16) for rank, out in zip(ranks, out_features, strict=True)]
        biases = [torch.empty(out, dtype=BF16) for out in out_features]
        ys = [torch.empty(tokens, out, dtype=BF16) for out in out_features]
        problem = grouped.describe(x, downs, ups, biases)._replace(device=device)
        tiles_of = grouped_triton.decode_tiles if decode else grouped_triton.prefill_tiles
        config = tuned_config or tiles_of(problem)
        if linear_triton.unfenced(config, device):
            continue
        name = "decode" if decode else "prefill"
        assert tuned_config or choose(grouped.TABLE, problem, "auto").name == f"triton.{name}", (tokens, rank)
        make = grouped_triton._decode_launcher if decode else grouped_triton._prefill_launcher
        launcher, tensors = make(problem, config), (x, downs, ups, biases, ys)
        for launch in _record(
            f"{name} {tokens} tokens rank {rank}",
            config,
            lambda launcher=launcher, tensors=tensors: launcher(*tensors),
            shared_limit=config.shared_memory(),
        ):
            if launch.kernel.__name__ != "sum_kernel":  # that of lowrank_linear
                yield launch


CASES = {
    "covariance_update_": _covariance,
    "conv_covariance_update_": _convolution,
    "lowrank_linear": _linear,
    "lowrank_linear_grouped": _grouped,
}
