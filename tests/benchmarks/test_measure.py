"""Timing: what is called when, what becomes of the samples, and an arm that fails."""

import time

import pytest
import torch

from benchmarks import measure


def test_every_round_calls_all_and_begins_with_another():
    order = []
    probes = {name: lambda number, name=name: order.append((name, number)) or 1.0 for name in "abc"}
    times = measure.sample(probes, seconds=0, least=3)
    assert [name for name, _ in order] == list("abcbcacab")
    assert [number for _, number in order] == list(range(9))  # no two calls share tensors that rotate
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3, "c": 3}


def test_sampling_ends_with_the_time_or_the_most():
    assert len(measure.sample({"a": lambda number: 0.0}, seconds=60, most=7)["a"]) == 7
    start = time.perf_counter()
    measure.sample({"a": lambda number: time.sleep(0.01) or 0.01}, seconds=0.1, least=2)
    assert time.perf_counter() - start < 5


def test_median_and_90th_percentile():
    timing = measure.summarize([value * 1e-6 for value in (10, 1, 2, 3, 4, 5, 6, 7, 8, 9)])
    assert timing.median == pytest.approx(5.5)
    assert timing.p90 == pytest.approx(9)
    assert timing.eager == timing.median
    assert measure.summarize([1e-6], [3e-6]).eager == pytest.approx(3)


def test_settling_waits_for_samples_that_agree():
    samples = iter([9.0, 5.0, 3.0, 1.0, 1.01, 1.0, 7.0])
    measure.settle(lambda number: next(samples), at_most=60)
    assert next(samples) == 7.0


def test_rotation_exceeds_the_cache():
    for shape in ((1000, 1000), (20000, 10000)):
        tensors = (torch.empty(shape, device="meta"),)
        copies = measure.copies_to_rotate(tensors)
        assert copies * tensors[0].nbytes > measure.ROTATED_BYTES
        assert (copies - 1) * tensors[0].nbytes <= measure.ROTATED_BYTES
    assert measure.copies_to_rotate((torch.empty(1),)) == measure.MOST_COPIES


def test_calls_take_the_copies_in_turn():
    rotation = [(torch.full((1,), float(number)),) for number in range(3)]
    seen = []
    probe = measure.call_probe(lambda x: seen.append(x.item()), rotation)
    for number in range(4):
        probe(number)
    assert seen == [0, 0, 1, 2, 0]  # the first is the call that warms up


def test_a_failing_arm_leaves_the_others():
    def broken(x):
        raise ValueError("no such thing\nand more")

    rotation = [(torch.randn(64, 64),)]
    results = measure.time_arms(
        {"broken": broken, "small": torch.sum, "large": lambda x: x @ x @ x @ x}, rotation, 0.05
    )
    assert results["broken"] == "ValueError: no such thing"
    assert 0 < results["small"].median <= results["small"].p90
    assert results["large"].samples >= measure.LEAST_SAMPLES


def test_only_failing_arms():
    def broken(x):
        raise RuntimeError

    assert measure.time_arms({"broken": broken}, [(torch.ones(1),)], 0.1) == {"broken": "RuntimeError: "}


def test_a_threads_clock_leaves_out_sleep():
    arms = {"sleeps": lambda x: time.sleep(0.02)}
    slept = measure.time_arms(arms, [(torch.ones(1),)], 0.05, clock=time.thread_time)["sleeps"].median
    waited = measure.time_arms(arms, [(torch.ones(1),)], 0.05)["sleeps"].median
    assert slept < 10_000 < 20_000 <= waited


def test_ceilings_and_environment():
    limits = measure.ceilings(torch.device("cpu"), seconds=0.05)
    assert limits.copy > 1e8 and set(limits.matmul) == {"float32"} and limits.matmul["float32"] > 1e8
    facts = measure.environment(torch.device("cpu"))
    assert facts["torch"] == torch.__version__ and facts["device"] and facts["date"].endswith("UTC")
    assert facts["commit"] == "unknown" or len(facts["commit"].removesuffix("+changes")) == 12


@pytest.mark.gpu
def test_graph_timing_on_a_gpu():
    x = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    rotation = [(x.clone(),) for _ in range(measure.copies_to_rotate((x,)))]
    results = measure.time_arms({"once": lambda x: x @ x, "twice": lambda x: x @ x @ x}, rotation, 0.5)
    assert 1.7 < results["twice"].median / results["once"].median < 2.3
    assert results["once"].eager >= results["once"].median
