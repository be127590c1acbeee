"""The native library: it loads, needs only torch's stable interface of 2.10, and plans as the planner does."""

import importlib.util
import itertools
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch

from benchmarks.tuners import TUNERS, on_device
from lowrank_ops.ops import (
    BackendUnavailableError,
    _backend,
    _native,
    conv_covariance_update_,
    covariance,
    covariance_update_,
    explain,
    grouped,
    lowrank_linear,
)
from lowrank_ops.ops._backend import Device
from lowrank_ops.ops._native import plan
from lowrank_ops.ops.covariance import _cuda as covariance_cuda
from lowrank_ops.ops.covariance import describe as describe_covariance
from lowrank_ops.ops.linear import TABLE as LOWRANK_TABLE
from lowrank_ops.ops.linear import _cuda as lowrank_cuda
from lowrank_ops.ops.linear import describe as describe_lowrank
from tests.native import symbols

ROOT = Path(__file__).parents[2]
H200 = Device("cuda", 0, (9, 0), 132, 232448)


def test_loads(library: Path) -> None:
    assert _native.unavailable() is None
    ops = ("covariance_update_", "conv_covariance_update_", "lowrank_linear", "lowrank_linear_grouped")
    for name in (f"_cuda_{op}" for op in ops):
        assert hasattr(torch.ops.lowrank_ops, name)


def test_names_its_toolkit(library: Path) -> None:
    assert re.fullmatch(r"1[23]\.\d+", _native.toolkit())


@pytest.mark.parametrize("counted", [(66, 32, 15), None])
def test_clusters_that_cannot_be_counted_are_estimated(monkeypatch, counted) -> None:
    """Or a call of auto would fail, which may not run a CUDA kernel at all."""

    def clusters(ordinal: int) -> tuple[int, ...]:
        if counted is None:
            raise RuntimeError("the kernel does not load")
        return counted

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(_native, "device_facts", lambda device: H200)
    monkeypatch.setattr(_native, "unavailable", lambda: None)
    monkeypatch.setattr(torch.ops.lowrank_ops, "_clusters", clusters, raising=False)
    assert _native.machine.__wrapped__(H200) == (90, 132, 232448, counted or ())


@pytest.mark.parametrize("kernel", _native.KERNELS)
def test_every_listed_kernel_can_be_chosen(library: Path, kernel: str) -> None:
    """doctor --verify runs the kernels of this list."""
    if kernel.startswith("covariance"):
        text = plan("covariance_update_", "sm_90", torch.bfloat16, tokens=4096, features=1024, kernel=kernel)
    else:
        tokens = 4096 if kernel.startswith("prefill") else 8
        sizes = {"in_features": 768, "rank": 136, "out_features": 768}
        text = plan("lowrank_linear", "sm_90", torch.bfloat16, tokens=tokens, **sizes, kernel=kernel)
    assert text.startswith(f"{kernel}: ")


@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm")
def test_needs_only_the_stable_interface_of_torch(library: Path) -> None:
    needed, weak = symbols.undefined(library)
    assert weak <= symbols.WEAK
    assert symbols.minimum(needed) == ((2, 10), set())


def test_the_symbol_check_sees_unstable_and_newer_functions() -> None:
    assert symbols.minimum({"aoti_torch_get_dim"}) == (symbols.BEFORE, set())
    assert symbols.minimum({"aoti_torch_get_dim", "torch_call_dispatcher"}) == ((2, 10), set())
    for name in ("_ZN3c106detail14torchCheckFailEPKcS2_jS2_", "PyList_New", "cuLaunchKernel"):
        assert symbols.minimum({"aoti_torch_get_dim", name})[1] == {name}
    newer = {name for name, version in symbols.since().items() if version > (2, 10)}
    if torch.__version__ >= "2.11":
        assert "torch_from_blob" in newer
    assert all(symbols.minimum({name})[0] > (2, 10) for name in newer)


@pytest.mark.skipif(shutil.which("readelf") is None, reason="no readelf")
def test_depends_on_nothing_else(library: Path) -> None:
    dynamic = subprocess.run(["readelf", "-d", library], check=True, capture_output=True, text=True).stdout
    needed = set(re.findall(r"NEEDED.*\[(.+)\]", dynamic))
    system = {"libstdc++.so.6", "libgcc_s.so.1", "libc.so.6", "libm.so.6", "libdl.so.2", "librt.so.1",
              "libpthread.so.0", "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}  # fmt: skip
    assert {"libtorch.so", "libtorch_cpu.so"} <= needed
    assert needed <= system | {"libtorch.so", "libtorch_cpu.so"}
    assert "RUNPATH" not in dynamic and "RPATH" not in dynamic


def test_is_small(library: Path) -> None:
    """A wheel without the demo's data stays below 8 MB."""
    assert len(zlib.compress(library.read_bytes())) < 7 << 20


def test_cpu_tensors_reach_no_kernel(library: Path) -> None:
    """There is no CPU implementation."""
    _native.unavailable()
    with pytest.raises(NotImplementedError, match="_cuda_covariance_update_"):
        torch.ops.lowrank_ops._cuda_covariance_update_(torch.zeros(8, 8), torch.zeros(8), torch.zeros(4, 8), False)


def test_explicit_backend_on_a_cpu_tensor_says_why() -> None:
    with pytest.raises(BackendUnavailableError, match="needs a CUDA device"):
        covariance_update_(torch.zeros(8, 8), torch.zeros(8), torch.zeros(4, 8), backend="cuda")
    with pytest.raises(BackendUnavailableError, match="needs a CUDA device"):
        conv_covariance_update_(
            torch.zeros(1, 8, 8), torch.zeros(1, 8), torch.zeros(1, 2, 4, 4), kernel_size=(2, 2), backend="cuda"
        )
    with pytest.raises(BackendUnavailableError, match=r"cuda\.decode: it needs a CUDA device"):
        lowrank_linear(torch.zeros(2, 8), torch.zeros(4, 8), torch.zeros(3, 4), backend="cuda")


def test_a_missing_or_broken_library_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    problem = describe_covariance(torch.zeros(8, 8), torch.zeros(4, 8))._replace(device=H200)
    _native.unavailable.cache_clear()
    try:
        monkeypatch.setattr(_native, "LIBRARY", tmp_path / "liblowrank_ops.so")
        assert "was not built" in (covariance_cuda.supports(problem) or "")
        _native.unavailable.cache_clear()
        (tmp_path / "liblowrank_ops.so").write_bytes(b"not a library")
        assert "does not load" in (covariance_cuda.supports(problem) or "")
    finally:
        _native.unavailable.cache_clear()


def test_a_driver_older_than_the_runtime_is_refused(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a major version old drivers run newer runtimes."""
    _native.unavailable()
    driver, _ = _native.cuda_versions()
    assert bool(driver) == torch.cuda.is_available()
    problem = describe_covariance(torch.zeros(8, 8), torch.zeros(4, 8))._replace(device=H200)
    try:
        for found, refused in (("12.8", True), ("13.0", False), ("13.2", False), ("14.0", False), ("", False)):
            monkeypatch.setattr(_native, "cuda_versions", lambda found=found: (found, "13.1"))
            _native.unavailable.cache_clear()
            reason = covariance_cuda.supports(problem)
            assert (reason is not None) == refused, (found, reason)
            if refused:
                assert "by CUDA 13.1 and needs a driver for CUDA 13.0 or newer" in reason
                assert reason.endswith("the driver here is for CUDA 12.8")
    finally:
        _native.unavailable.cache_clear()


def test_supports_is_the_planner(library: Path) -> None:
    """Problems of a device that is not here: nothing is launched."""
    state = torch.zeros(64, 64)
    x = torch.zeros(100, 64, dtype=torch.bfloat16)
    problem = describe_covariance(state, x)._replace(device=H200)
    assert covariance_cuda.supports(problem) is None
    assert not covariance_cuda.prefers(problem)
    assert "not float64" in covariance_cuda.supports(problem._replace(dtype=torch.float64))
    assert describe_covariance(state, x.T.contiguous().T)._replace(device=H200) == problem  # which gets a copy
    assert covariance_cuda.supports(problem._replace(tokens=0)) is None
    old = H200._replace(capability=(7, 5))
    assert "8.0 or newer" in covariance_cuda.supports(problem._replace(device=old))

    tensors = [torch.zeros(*shape, dtype=torch.bfloat16) for shape in ((16, 64), (8, 64), (40, 8))]
    linear = describe_lowrank(*tensors, None, "gelu")._replace(device=H200)
    assert lowrank_cuda.supports_decode(linear) is None
    assert not lowrank_cuda.prefers_decode(linear)
    assert lowrank_cuda.supports_prefill(linear) == "16 tokens are for decode_sm90"
    many = linear._replace(tokens=65)
    assert lowrank_cuda.supports_prefill(many) is None
    assert lowrank_cuda.supports_decode(many) == "65 tokens are for prefill_sm90"
    # What is not row-major is copied, and the copy's rows may start elsewhere than on 16 bytes.
    assert lowrank_cuda.supports_prefill(many._replace(down_strides=(1, 8))) is None
    transposed = many._replace(in_features=66, down_strides=(1, 8))
    assert "must start on 16 bytes" in lowrank_cuda.supports_prefill(transposed)
    assert "at most 256, got 264" in lowrank_cuda.supports_prefill(many._replace(rank=264))
    assert "x.contiguous()" in lowrank_cuda.supports_decode(linear._replace(x_stride=0))
    assert lowrank_cuda.supports_decode(linear._replace(tokens=0)) is None


def test_float64_without_rows_is_explained(library: Path) -> None:
    """With nothing to launch every dtype is supported, and no table speaks for this one."""
    rows, image = torch.zeros(0, 64, dtype=torch.float64), torch.zeros(0, 4, 8, 8, dtype=torch.float64)
    problem = describe_covariance(torch.zeros(64, 64).double(), rows)._replace(device=H200)
    assert "cuda: can run\n" in _backend.explain(covariance.TABLE, problem)
    state, total = torch.zeros(1, 36, 36).double(), torch.zeros(1, 36).double()
    conv = covariance.describe_conv(state, total, image, (3, 3), (1, 1), (0, 0), (1, 1))._replace(device=H200)
    assert "cuda: can run\n" in _backend.explain(covariance.CONV_TABLE, conv)


def test_a_tuned_choice_is_followed_where_it_is_legal(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table's entry is of the nearest shape: what that could have, this problem may not."""
    tensors = [torch.zeros(*shape, dtype=torch.bfloat16) for shape in ((16, 1024), (8, 1024), (40, 8))]
    linear = describe_lowrank(*tensors, None, "none")._replace(device=H200)
    entry = {"impl": "cuda.decode", "config": {"kernel": "decode_sm80", "splits": 8}}
    monkeypatch.setattr(lowrank_cuda, "tuned_entry", lambda problem: entry)
    lowrank_cuda.choice_for.cache_clear()
    try:
        assert lowrank_cuda.plan(linear).startswith("decode_sm80: 16 tokens, 16 rows of down x 8 splits")
        assert lowrank_cuda.choice_for(linear) == _native.Choice("decode_sm80", 8)
        for other in (linear._replace(in_features=64), linear._replace(tokens=300)):
            assert lowrank_cuda.choice_for(other) == _native.Choice()
            assert "_sm90: " in lowrank_cuda.plan(other)
        some = linear._replace(tokens=200)  # more than it gets where nobody asks
        assert lowrank_cuda.plan(some).startswith("decode_sm80: 64 tokens, 16 rows of down x 8 splits")
        assert lowrank_cuda.supports_decode(some) is None
        assert lowrank_cuda.supports_prefill(some) == "200 tokens are for decode_sm80"
        entry = None
        lowrank_cuda.choice_for.cache_clear()
        assert lowrank_cuda.supports_decode(some) == "200 tokens are for prefill_sm90"
        assert lowrank_cuda.supports_prefill(some) is None
        entry = {"impl": "cuda.decode", "config": {"kernel": "", "splits": 2}}
        lowrank_cuda.choice_for.cache_clear()
        assert lowrank_cuda.choice_for(linear) == _native.Choice("", 2)
        many = linear._replace(tokens=100)  # whose cluster of 2 would be another kernel's
        assert lowrank_cuda.refuse(many, _native.Choice("", 2)) == ""
        assert lowrank_cuda.choice_for(many) == _native.Choice()
        for elsewhere in (None, {"impl": "triton.decode", "config": {"block_m": 16}}, {"impl": "cuda", "config": {}}):
            entry = elsewhere
            lowrank_cuda.choice_for.cache_clear()
            assert lowrank_cuda.choice_for(linear) == _native.Choice()
    finally:
        lowrank_cuda.choice_for.cache_clear()

    state, x = torch.zeros(64, 64), torch.zeros(1000, 64, dtype=torch.bfloat16)
    problem = describe_covariance(state, x)._replace(device=H200)
    tuned = {"impl": "cuda", "config": {"kernel": "covariance_sm80", "splits": 5}}
    monkeypatch.setattr(covariance_cuda._triton, "tuned_entry", lambda problem: tuned)
    covariance_cuda.choice_for.cache_clear()
    try:
        assert re.match("covariance_sm80: .* 1 tiles x 5 splits", covariance_cuda.plan(problem))
        assert covariance_cuda.choice_for(problem._replace(tokens=8)) == _native.Choice()
    finally:
        covariance_cuda.choice_for.cache_clear()


def test_the_tuner_has_legal_cuda_configurations_to_search(library: Path) -> None:
    """More than one plan around the starting points."""
    for op, impls in (
        ("covariance_update", ["cuda"]),
        ("lowrank_linear", ["cuda.decode", "cuda.prefill"]),
        ("lowrank_linear_grouped", ["cuda"]),
    ):
        tuner = TUNERS[op]
        for impl in impls:
            legal = set()
            for _, case in tuner.shapes()[::7]:
                problem = on_device(tuner, case, H200)
                start = next(start for start in tuner.starts(problem) if start.impl == impl)
                if tuner.refuse(start, problem) is None:
                    legal |= {near for near in tuner.neighbors(start) if tuner.refuse(near, problem) is None}
            assert len(legal) >= 3, (impl, legal)


def test_the_module_and_the_library_plan_alike(library: Path) -> None:
    if importlib.util.find_spec("lowrank_ops._planner") is None:
        pytest.skip("_planner was not built for this Python")
    from lowrank_ops import _planner

    assert _native.unavailable() is None
    known = [(80, 108, 166912), (86, 84, 101376), (90, 132, 232448), (100, 148, 232448), (70, 80, 98304), (0, 0, 0)]
    machines = [*((*machine, ()) for machine in known), (90, 132, 232448, (60, 30, 14))]
    dtypes = ["bfloat16", "float16", "float32", "float64"]
    for machine, dtype, source, tf32, tokens, features in itertools.product(
        machines, dtypes, ["matrix", "aligned_matrix", "patches"], [False, True], [1, 12608, 1 << 33], [1, 768, 11008]
    ):
        arguments = (tokens, features, 2, dtype, source, tf32, *machine, "", tokens % 5)
        mine = torch.ops.lowrank_ops._plan_covariance(*arguments)
        if "no code for" not in mine[0]:
            assert mine == _planner.plan_covariance(*arguments)
    for machine, dtype, tokens, rank in itertools.product(machines, dtypes, [1, 64, 65, 12608], [1, 136, 1492, 30000]):
        members = ([rank], [11008], False) if tokens == 1 else ([rank, 64], [11008, 40], False)
        linear = (tokens, 4096, *members, dtype, True, *machine)
        mine = torch.ops.lowrank_ops._plan_lowrank_linear(*linear)
        if "no code for" not in mine[0]:
            assert mine == _planner.plan_lowrank_linear(*linear)


def test_plans_for_devices_that_are_not_here(library: Path) -> None:
    assert _native.unavailable() is None
    shape = {"in_features": 4096, "rank": 136, "out_features": 4096}
    decode = plan("lowrank_linear", "sm_90", torch.bfloat16, tokens=16, **shape)
    assert decode.startswith("decode_sm90: ") and "clusters of" in decode
    assert plan("lowrank_linear", "sm_90", torch.float16, tokens=2048, **shape).startswith("prefill_sm90: ")
    unaligned = plan("lowrank_linear", "sm_90", torch.float16, tokens=16, aligned=False, **shape)
    assert unaligned.startswith("decode_sm80: ")
    wide = plan("covariance_update_", "sm_90", torch.bfloat16, tokens=4096, features=1024)
    assert wide.startswith("covariance_sm90_wide: ")
    for op, kernel in (("covariance_update_", "covariance_sm90"), ("conv_covariance_update_", "covariance_sm80")):
        assert plan(op, "sm_90", torch.bfloat16, tokens=4096, features=72).startswith(f"{kernel}: ")
    assert "not float64" in plan("covariance_update_", "sm_90", torch.float64, tokens=8, features=8)
    for op in ("covariance_update_", "conv_covariance_update_"):
        assert "TensorFloat-32" in plan(op, "sm_90", torch.float32, tokens=8, features=8, allow_tf32=True)
        for dtype, allowed in ((torch.float32, False), (torch.bfloat16, True)):
            assert "TensorFloat-32" not in plan(op, "sm_90", dtype, tokens=8, features=8, allow_tf32=allowed)


def test_explain_names_the_kernel_and_its_tiles(library: Path) -> None:
    """For tensors of a device that is not here; on the CPU there is only the reason."""
    assert _native.unavailable() is None
    state, x = torch.zeros(64, 64), torch.zeros(100, 64)
    problem = describe_covariance(state, x, allow_tf32=True)._replace(device=H200)
    lines = dict(line.split(": ", 1) for line in _backend.explain(covariance.TABLE, problem).splitlines())
    expected = plan("covariance_update_", "sm_90", torch.float32, tokens=100, features=64, allow_tf32=True)
    assert lines["cuda"] == f"can run, by {expected}"

    image = torch.zeros(2, 8, 9, 10)
    conv = covariance.describe_conv(state[None], state[:1], image, [3, 3], [1, 1], [0, 0], [1, 1])._replace(device=H200)
    assert "cuda: runs, by covariance_sm80: tile 128x128" in _backend.explain(covariance.CONV_TABLE, conv, "cuda")

    tensors = [torch.zeros(*shape, dtype=torch.bfloat16) for shape in ((16, 64), (8, 64), (40, 8))]
    linear = describe_lowrank(*tensors, None, "gelu")._replace(device=H200)
    text = _backend.explain(LOWRANK_TABLE, linear, "cuda")
    assert "cuda.decode: runs, by decode_sm90: 16 tokens" in text
    assert "cuda.prefill: cannot run: 16 tokens are for decode_sm90\n" in f"{text}\n"
    assert "cuda: cannot run: it needs a CUDA device" in explain("covariance_update_", state, state[0], x).splitlines()


@pytest.mark.parametrize(
    ("tokens", "in_features", "ranks", "outs", "says"),
    [
        (4, 768, (136,) * 3, (768,) * 3, "runs, by decode_sm90: 8 tokens"),
        (64, 4096, (512, 256, 256), (4096, 1024, 1024), "runs, by decode_sm90: 64 tokens"),
        (16, 4096, (752, 752), (11008, 11008), "runs, by decode_sm90: 16 tokens"),
        (16, 576, (128, 64, 60), (576, 192, 192), "runs, by decode_sm80: 64 tokens"),  # rows off 16 bytes
        (2048, 576, (128, 64, 64), (576, 192, 192), "runs, by prefill_sm90: "),
        (2048, 576, (128, 64, 60), (576, 192, 192), "cannot run: .* must start on 16 bytes"),
        (2048, 4096, (512, 256, 256), (4096, 1024, 1024), "cannot run: .* the rank must be at most 256, got 512"),
        (1, 64, (8,) * 4, (8,) * 4, "cannot run: it takes at most 3 members"),
    ],
)
def test_groups_are_planned(library: Path, tokens: int, in_features: int, ranks, outs, says: str) -> None:
    assert _native.unavailable() is None
    bf16 = {"dtype": torch.bfloat16}
    downs = [torch.empty(rank, in_features, **bf16) for rank in ranks]
    ups = [torch.empty(out, rank, **bf16) for rank, out in zip(ranks, outs, strict=True)]
    problem = grouped.describe(torch.empty(tokens, in_features, **bf16), downs, ups, [None] * len(ups))
    text = _backend.explain(grouped.TABLE, problem._replace(device=H200), "cuda")
    assert re.search(rf"^cuda: {says}", text, re.MULTILINE), text
    strided = _backend.explain(grouped.TABLE, problem._replace(device=H200, contiguous=False), "cuda")
    assert "cuda: cannot run: takes contiguous factors and biases" in strided.splitlines()


def test_plans_need_a_planner(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got 'sm_91'"):
        plan("lowrank_linear", "sm_91", torch.bfloat16, tokens=1)
    with pytest.raises(ValueError, match="op must be"):
        plan("matmul", "sm_90", torch.bfloat16, tokens=1)
    _native.unavailable.cache_clear()
    monkeypatch.setattr(_native, "LIBRARY", tmp_path / "liblowrank_ops.so")
    monkeypatch.setitem(sys.modules, "lowrank_ops._planner", None)
    try:
        with pytest.raises(RuntimeError, match="was not built"):
            plan("covariance_update_", "sm_90", torch.bfloat16, tokens=1, features=8)
    finally:
        _native.unavailable.cache_clear()


@pytest.mark.skipif(
    not (ROOT / "setup.py").is_file() or importlib.util.find_spec("setuptools") is None, reason="an installed package"
)
def test_an_install_without_nvcc_says_so_in_one_line() -> None:
    def install(choice: str) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": "/nowhere", "CUDA_HOME": "/nowhere", "LOWRANK_OPS_CUDA": choice}
        command = [sys.executable, "setup.py", "--quiet", "--version"]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)

    missing = install("AUTO")
    assert missing.returncode == 0 and len(missing.stderr.splitlines()) == 1
    assert missing.stderr.startswith("lowrank_ops: no nvcc, cmake, so without the CUDA library")
    assert install("OFF").returncode == 0 and not install("OFF").stderr
    demanded = install("ON")
    assert demanded.returncode != 0 and "this machine has no nvcc, cmake" in demanded.stderr


@pytest.mark.skipif(shutil.which("cmake") is None or shutil.which("c++") is None, reason="no CMake or compiler")
def test_the_cpp_tests_pass(tmp_path: Path) -> None:
    """Planner and index arithmetic, on the host."""
    options = ["-DLOWRANK_OPS_CUDA=OFF", f"-DPython_EXECUTABLE={sys.executable}"]
    subprocess.run(["cmake", "-S", ROOT, "-B", tmp_path, *options], check=True, capture_output=True)
    subprocess.run(["cmake", "--build", tmp_path, "--parallel", "2"], check=True, capture_output=True)
    result = subprocess.run(["ctest", "--test-dir", tmp_path, "--output-on-failure"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    assert "100% tests passed" in result.stdout
