"""Calibration in several processes: the sums of one process, and one error in every process if one of them fails."""

import copy
import time

import pytest
import torch
from torch import nn

import lowrank_ops as lro
from tests.calibration.comparing import assert_same_statistics, cubed


class Experts(nn.Module):
    """Layers that share their input, and two experts, of which a batch reaches one."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 4), nn.Linear(6, 4)
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x, expert=0):
        return self.experts[expert](self.a(x) * self.b(x))


def setting():
    torch.manual_seed(0)
    model, x = Experts().double(), torch.randn(10, 6, dtype=torch.float64)
    return model, [(x[:3], 1), (x[3:4], 0), (x[4:], 1)]


def calibrated(model, batches, **options):
    return lro.calibrate(model, batches, filter_fn=lambda module, fqn: True, **options)


OPTIONS = {"plain": {}, "by loss": {"sensitivity": cubed}}


def error_of(function):
    """What it raises, and after how many seconds."""
    started = time.monotonic()
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}", time.monotonic() - started
    return "", time.monotonic() - started


def shifted(batches, rank):
    """Means that are large beside the spread, and differ between the processes."""
    return [(x + 1000 * (1 + rank), expert) for x, expert in batches]


def _process(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model, batches = setting()
    narrow, narrow_batches = copy.deepcopy(model).float(), [(x.float(), expert) for x, expert in batches]
    mine = batches[:1] if rank else batches[1:]
    for name, options in OPTIONS.items():
        calibrated(model, mine, **options).all_reduce_().save(f"{folder}/{name}{rank}")
    calibrated(model, shifted(mine, rank)).all_reduce_().save(f"{folder}/shifted{rank}")
    nothing = {"forward": lambda model, batch: None} if rank else {}
    calibrated(model, batches, **nothing).all_reduce_().save(f"{folder}/nothing reached{rank}")

    def fails_in_a_block():
        with lro.Calibrator(model) as calibrator:
            model(*batches[0])
            if rank:
                raise RuntimeError("bad label in sample 7")
        calibrator.covariances.all_reduce_()

    def refused(**options):
        covariances = calibrated(narrow, narrow_batches, **options)
        before = covariances["a"].activations.second_moment.clone()
        try:
            covariances.all_reduce_()
        finally:
            assert torch.equal(covariances["a"].activations.second_moment, before)

    attempts = {
        "no batches": lambda: calibrated(model, [] if rank else batches).all_reduce_(),
        "no collection": lambda: calibrated(model, batches[0][0] if rank else batches).all_reduce_(),
        "block": fails_in_a_block,
        "side": lambda: refused(side="output" if rank else "input"),
        "dtype": lambda: refused(dtype=torch.float32 if rank else torch.float64),
        "loss": lambda: refused(sensitivity=cubed if rank else None),
        "layers": lambda: lro.calibrate(
            model, batches, filter_fn=lambda module, fqn: not rank or fqn != "b"
        ).all_reduce_(),
    }
    found = {}
    for name, attempt in attempts.items():
        found[name] = error_of(attempt)
        torch.distributed.barrier()
    torch.save(found, f"{folder}/errors{rank}")
    calibrated(model, mine).all_reduce_().save(f"{folder}/again{rank}")  # errors leave nothing behind
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(_process, (folder,), nprocs=2)
    return folder


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", ["plain", "by loss", "again"])
def test_sums_are_those_of_one_process(folder, name, rank):
    """Batches are uneven, and each process reaches an expert that the other one does not reach."""
    model, batches = setting()
    whole = calibrated(model, batches, **OPTIONS.get(name, {}))
    assert_same_statistics(lro.Covariances.load(folder / f"{name}{rank}"), whole)
    merged = calibrated(model, batches[:1], **OPTIONS.get(name, {})).merge(
        calibrated(model, batches[1:], **OPTIONS.get(name, {}))
    )
    assert_same_statistics(merged, whole)
    assert not whole.unreached


@pytest.mark.parametrize("rank", [0, 1])
def test_sums_about_different_shifts_are_one(folder, rank):
    model, batches = setting()
    whole = calibrated(model, shifted(batches[1:], 0) + shifted(batches[:1], 1))
    assert_same_statistics(lro.Covariances.load(folder / f"shifted{rank}"), whole, 1e-9)


@pytest.mark.parametrize("rank", [0, 1])
def test_process_that_reached_no_layer_adds_nothing(folder, rank):
    model, batches = setting()
    assert_same_statistics(lro.Covariances.load(folder / f"nothing reached{rank}"), calibrated(model, batches))


FAILED = "RuntimeError: the statistics of all processes cannot be summed, because calibration failed on rank 1: "
DIFFER = "ValueError: all_reduce_: the processes must hold the same layers, sides, shapes, dtypes; they differ at "


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("no batches", f"{FAILED}ValueError: batches was empty", "ValueError: batches was empty"),
        ("no collection", f"{FAILED}TypeError: batches must be", "TypeError: batches must be a collection"),
        ("block", f"{FAILED}RuntimeError: bad label in sample 7", "RuntimeError: bad label in sample 7"),
        ("side", f"{DIFFER}a, b, experts.0, experts.1", None),
        ("dtype", f"{DIFFER}a, b, experts.0, experts.1", None),
        ("loss", "ValueError: all_reduce_: the processes must all hold output gradients, or none", None),
        ("layers", f"{DIFFER}b", None),
    ],
)
def test_failure_of_one_is_an_error_in_all(folder, name, first, second):
    for rank, expected in ((0, first), (1, second or first)):
        message, seconds = torch.load(folder / f"errors{rank}")[name]
        assert message.startswith(expected)
        assert seconds < 5
