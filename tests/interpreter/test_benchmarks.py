"""The tuner and the symmetric kernel that is an opponent, in Triton's CPU interpreter."""

import functools
import os
import re
import time

import pytest
import torch

if not os.environ.get("TRITON_INTERPRET"):
    pytest.skip("needs TRITON_INTERPRET=1 in a process of its own", allow_module_level=True)

from benchmarks import measure, shapes, tune, tuners
from benchmarks.measure import Timing
from benchmarks.symmetric_kernel import symmetric_product
from lowrank_ops.ops.covariance._triton import Config
from lowrank_ops.ops.linear._triton_config import DecodeConfig, PrefillConfig

pytestmark = pytest.mark.interpreter
CPU = torch.device("cpu")


class SmallCovariance(tuners.CovarianceTuner):
    """Tiles as small as the interpreter is slow."""

    options = {"triton": {"block_t": (16, 32), "split": (1, 2)}}  # noqa: RUF012

    def starts(self, problem):
        return [tune.Candidate("triton", Config(16, 16, 4, 2, split=1))]


class SmallConvolution(tuners.ConvCovarianceTuner):
    options = {"triton": {"block_t": (16, 32), "split": (1, 2)}}  # noqa: RUF012
    convs = (shapes.Conv(1, 8, 5, 2, 1, 0), shapes.Conv(1, 3, 5, 2, 2, 1))

    def starts(self, problem):
        return [tune.Candidate("triton", Config(16, 16, 4, 2, split=1))]


class SmallLinear(tuners.LowRankLinearTuner):
    options = {"triton.decode": {"block_n": (16, 32), "slices": (1, 2), "fold": (False, True)}}  # noqa: RUF012

    def starts(self, problem):
        return [
            tune.Candidate("triton.decode", DecodeConfig(16, 16, 32, 4, 2, 32, 16, 16, 4, 2)),
            tune.Candidate("triton.prefill", PrefillConfig(16, 32, 32, 16, 0, 4, 2, 2)),
            tune.Candidate("two_products", None),
        ]


COVARIANCE_SHAPE = {"tokens": 32, "features": 16, "dtype": "bf16"}
LINEAR_SHAPE = {"tokens": 3, "in_features": 64, "rank": 8, "out_features": 32, "dtype": "bfloat16"}


def once(arms, rotation, seconds):
    """Runs every arm once, and takes for the slower the one that has the larger numbers in its name."""
    for arm in arms.values():
        arm(*rotation[-1])
    return {name: Timing(float(sum(map(int, re.findall(r"\d+", name)))), 0.0, 0.0, 1) for name in arms}


@pytest.fixture(autouse=True)
def few_copies(monkeypatch):
    monkeypatch.setattr(tune, "copies_to_rotate", lambda tensors: 2)
    monkeypatch.setattr(tune, "time_arms", once)


@pytest.mark.parametrize(
    "tuner, shape",
    [
        (SmallCovariance(), COVARIANCE_SHAPE),
        *((SmallConvolution(), shape) for shape in SmallConvolution().shapes() if shape["dtype"] == "bf16"),
        (SmallLinear(), LINEAR_SHAPE),
    ],
    ids=lambda value: " ".join(map(str, value.values())) if isinstance(value, dict) else value.op,
)
def test_tuning_a_toy_shape(tuner, shape, monkeypatch):
    """With the clock of the host; what wins in the interpreter means nothing."""
    monkeypatch.setattr(tune, "time_arms", functools.partial(measure.time_arms, clock=time.thread_time))
    monkeypatch.setattr(measure.sample, "__defaults__", (1, 1))
    tuned = tune.tune_shape(tuner, shape, CPU, 0.01)
    entry = tuned.entry
    assert entry["shape"] == shape and entry["us"] > 0
    assert entry["impl"] in {candidate.impl for candidate in tuner.starts(None)}
    assert not any(reason.startswith("wrong") for reason in tuned.tried.values()), tuned.tried
    assert " us" in tuned.change


def test_the_search_goes_downhill_over_several_fields():
    class Start(SmallCovariance):
        def starts(self, problem):
            return [tune.Candidate("triton", Config(16, 32, 4, 2, split=2))]

    tuned = tune.tune_shape(Start(), COVARIANCE_SHAPE, CPU, 0.01)
    assert (tuned.entry["config"]["block_t"], tuned.entry["config"]["split"]) == (16, 1)
    assert "->" in tuned.change
    for steps, found in ((0, (32, 2)), (1, (16, 2))):
        config = tune.tune_shape(Start(), COVARIANCE_SHAPE, CPU, 0.01, steps).entry["config"]
        assert (config["block_t"], config["split"]) == found


def test_a_wrong_candidate_is_never_timed_and_never_wins(monkeypatch):
    """split=0 has the smallest number and would win."""
    timed = []
    monkeypatch.setattr(tune, "time_arms", lambda arms, *rest: timed.extend(arms) or once(arms, *rest))

    class Wrong(SmallCovariance):
        options = {"triton": {"split": (0, 1)}}  # noqa: RUF012

        def arm(self, candidate, problem):
            honest = super().arm(candidate, problem)
            if candidate.config.split == 1:
                return honest
            return lambda state, total, x: state.fill_(1.0)

    tuned = tune.tune_shape(Wrong(), COVARIANCE_SHAPE, CPU, 0.01)
    assert tuned.entry["config"]["split"] == 1 and not any("split=0" in name for name in timed)
    assert any(reason.startswith("wrong") and "split=0" in name for name, reason in tuned.tried.items())


def test_a_candidate_that_raises_is_passed_over():
    class Raises(SmallCovariance):
        def arm(self, candidate, problem):
            def run(state, total, x):
                raise RuntimeError("out of resources")

            return super().arm(candidate, problem) if candidate.config.block_t == 16 else run

    tuned = tune.tune_shape(Raises(), COVARIANCE_SHAPE, CPU, 0.01)
    assert tuned.entry["config"]["block_t"] == 16
    assert any("out of resources" in reason for reason in tuned.tried.values())


def test_an_illegal_candidate_is_not_launched():
    launched = []

    class Refuses(SmallCovariance):
        def refuse(self, candidate, problem):
            return "too large" if candidate.config.block_t == 32 else None

        def arm(self, candidate, problem):
            launched.append(candidate.config.block_t)
            return super().arm(candidate, problem)

    tuned = tune.tune_shape(Refuses(), COVARIANCE_SHAPE, CPU, 0.01)
    assert set(launched) == {16} and "too large" in tuned.tried.values()


def test_nothing_that_works():
    class None_(SmallCovariance):
        def refuse(self, candidate, problem):
            return "no"

    assert tune.tune_shape(None_(), COVARIANCE_SHAPE, CPU, 0.01).entry is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("tokens, features", [(40, 33), (16, 16), (7, 70)], ids=str)
def test_symmetric_kernel(dtype, tokens, features):
    x = torch.randn(tokens, features, generator=torch.Generator().manual_seed(0)).to(dtype)
    product = symmetric_product(x, block_d=16, block_t=16)
    exact = x.double().T @ x.double()
    assert (product.double() - exact).abs().max() <= 2 * (x.float().T @ x.float() - exact).abs().max() + 1e-6
    torch.testing.assert_close(product, product.T)  # the order of sums may differ inside a diagonal tile
