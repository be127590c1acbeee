"""The tuner's search and the symmetric kernel that is a baseline, in Triton's CPU interpreter."""

import dataclasses
import os
import re

import pytest
import torch

if not os.environ.get("TRITON_INTERPRET"):
    pytest.skip("needs TRITON_INTERPRET=1 in a process of its own", allow_module_level=True)

from benchmarks import bench_covariance, bench_lowrank_linear, shapes, suite, tune, tuners
from benchmarks.harness import Timing
from benchmarks.symmetric_kernel import symmetric_product
from benchmarks.tuners import Candidate
from lowrank_ops.ops.covariance._triton import Config
from lowrank_ops.ops.linear._triton_config import DecodeConfig, PrefillConfig

pytestmark = pytest.mark.interpreter
CPU = torch.device("cpu")
COVARIANCE = bench_covariance.case(32, 16, "bf16")


class SmallCovariance(tuners.CovarianceTuner):
    """Tiles as small as the interpreter is slow."""

    options = {"triton": {"block_t": (16, 32), "split": (1, 2)}}  # noqa: RUF012

    def starts(self, problem):
        return [Candidate("triton", Config(16, 32, 4, 2, split=2))]


class SmallConvolution(SmallCovariance, tuners.ConvCovarianceTuner):
    pass


class SmallLinear(tuners.LowRankLinearTuner):
    options = {"triton.decode": {"block_n": (16, 32), "slices": (1, 2), "fold": (False, True)}}  # noqa: RUF012

    def starts(self, problem):
        return [
            Candidate("triton.decode", DecodeConfig(16, 16, 32, 4, 2, 32, 16, 16, 4, 2)),
            Candidate("triton.prefill", PrefillConfig(16, 32, 32, 16, 0, 4, 2, 2)),
            Candidate("two_products", None),
        ]


@pytest.fixture(autouse=True)
def timed(monkeypatch):
    """Every candidate runs once; the slower one is the one that has the larger numbers in its name."""
    names = []

    def once(runs, rotation, seconds):
        names.extend(runs)
        for run in runs.values():
            run(*rotation[-1])
        return {name: Timing(float(sum(map(int, re.findall(r"\d+", name)))), 0.0, 0.0, 1) for name in runs}

    monkeypatch.setattr(tune, "copies_to_rotate", lambda tensors: 2)
    monkeypatch.setattr(tune, "time_variants", once)
    return names


@pytest.fixture
def searched(tmp_path):
    def searched(tuner, case=COVARIANCE, steps=9, ended=()):
        search = tune.Search(tuner, case, CPU, tune.Attempts(tmp_path / "attempt", [*ended], CPU), 0.01, steps)
        return search.fastest(), search.failed

    return searched


@pytest.mark.parametrize(
    ("tuner", "case"),
    [
        (SmallCovariance(), COVARIANCE),
        (SmallConvolution(), bench_covariance.conv_case(shapes.Conv(1, 8, 5, 2, 1, 0), "bf16")),
        (SmallConvolution(), bench_covariance.conv_case(shapes.Conv(1, 3, 5, 2, 2, 1), "bf16")),
        (SmallLinear(), bench_lowrank_linear.case(shapes.Layer(64, 32, 8), 3, "bf16")),
    ],
    ids=["covariance", "patches", "strided patches", "linear"],
)
def test_every_candidate_of_a_small_search_is_right(searched, tuner, case):
    found, failed = searched(tuner, case)
    assert found is not None and not any(reason.startswith("wrong") for reason in failed.values()), failed


@pytest.mark.parametrize(("steps", "expected"), [(0, (32, 2)), (1, (16, 2)), (9, (16, 1))])
def test_the_search_goes_downhill(searched, steps, expected):
    (best, _, current, _), _ = searched(SmallCovariance(), steps=steps)
    assert (best.config.block_t, best.config.split) == expected and current.config.block_t == 32


def test_a_wrong_candidate_is_never_timed_and_never_wins(searched, timed):
    """It would win: it has the smallest number."""

    class Wrong(SmallCovariance):
        def runner(self, candidate, problem):
            honest = super().runner(candidate, problem)
            return honest if candidate.config.split == 2 else lambda state, total, x: state.fill_(1.0)

    (best, *_), failed = searched(Wrong())
    assert best.config.split == 2 and not any("split=1" in name for name in timed)
    assert any(reason.startswith("wrong") and "split=1" in name for name, reason in failed.items())


def test_a_candidate_that_raises_or_is_illegal_is_passed_over(searched):
    class Refuses(SmallCovariance):
        def refuse(self, candidate, problem):
            return "too large" if candidate.config.block_t == 16 else None

        def runner(self, candidate, problem):
            def run(state, total, x):
                raise RuntimeError("out of resources")

            return run if candidate.config.split == 1 else super().runner(candidate, problem)

    (best, *_), failed = searched(Refuses())
    assert best.config == dataclasses.replace(best.config, block_t=32, split=2)
    assert set(failed.values()) == {"too large", "RuntimeError: out of resources"}


def test_nothing_is_found_where_nothing_runs(searched):
    class Nothing(SmallCovariance):
        def refuse(self, candidate, problem):
            return "no"

    assert searched(Nothing())[0] is None


def test_a_kernel_that_ended_a_process_is_not_run_again(searched, timed):
    (start,) = SmallCovariance().starts(None)
    ended = [start._replace(config=dataclasses.replace(start.config, block_t=16)).kernel()]
    _, failed = searched(SmallCovariance(), ended=ended)
    assert suite.ENDED in failed.values() and not any("block_t=16" in name and "split=2" in name for name in timed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("tokens, features", [(40, 33), (16, 16), (7, 70)], ids=str)
def test_symmetric_kernel(dtype, tokens, features):
    x = torch.randn(tokens, features, generator=torch.Generator().manual_seed(0)).to(dtype)
    product = symmetric_product(x, block_d=16, block_t=16)
    exact = x.double().T @ x.double()
    assert (product.double() - exact).abs().max() <= 2 * (x.float().T @ x.float() - exact).abs().max() + 1e-6
    torch.testing.assert_close(product, product.T)  # the order of sums may differ inside a diagonal tile
