"""Calibration, compression and compressed layers on side streams, where the inputs arrive late."""

import copy
import threading

import pytest
import torch
from torch import nn

import lowrank_ops as lro
from lowrank_ops.layers import EightBitLinear, PivotedLinear
from lowrank_ops.layers.group import groups_in

from .device import on_streams_at_once

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
CYCLES = 20_000_000  # about ten milliseconds, so that a kernel on another stream than its input's starts too early
RANKS = {"conv": 8, "q": 16, "k": 24, "mix": 16, "wide": 24}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(8, 32, 3, padding=1)
        self.q, self.k = nn.Linear(32, 64), nn.Linear(32, 64)
        self.mix, self.wide, self.last = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 40)

    def forward(self, x):
        x = self.conv(x).relu().flatten(2).mT
        x = self.q(x) * self.k(x)
        return self.last(self.wide(self.mix(x).tanh()).tanh())


def late(model, x):
    """The model's output for an input that the current stream computes late."""
    torch.cuda._sleep(CYCLES)
    return model(x * 0.5)


def squared(output, batch):
    return output.square().sum((1, 2))


def network():
    return Net().to(DEVICE)


def batches():
    torch.manual_seed(1)
    return [torch.randn(4, 8, 6, 6) for _ in range(3)]


def calibrated(model, sensitivity):
    return lro.calibrate(model, batches(), sensitivity=sensitivity, forward=late)


def compressed():
    """A model with two factors, a group, pivoted and 8-bit layers, and how it is to be compared."""
    model = network()
    config = lro.CompressionConfig(lro.Ranks(RANKS), group=True)
    lro.compress_(model, lro.calibrate(model, batches()), config)
    model.mix = PivotedLinear.from_linear(model.mix.to_dense(), 16)
    model.wide.quantize_("int8")
    model.last = EightBitLinear.from_linear(model.last)
    assert len(groups_in(model)) == 1
    return model.eval()


def on_side_stream(call):
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        result = call()
    torch.cuda.synchronize()
    return result


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for fqn, layer in expected.items():
        for name, moments in layer.moments().items():
            other = found[fqn].moments()[name]
            assert other.count == moments.count
            torch.testing.assert_close(other.second_moment, moments.second_moment, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sensitivity", [None, "output", squared], ids=["none", "output", "loss"])
def test_calibration_follows_the_current_stream(sensitivity):
    model = network()
    expected = calibrated(model, sensitivity)
    torch.cuda.synchronize()
    assert_same(on_side_stream(lambda: calibrated(model, sensitivity)), expected)


def test_two_threads_calibrate_on_streams_of_their_own():
    expected = calibrated(network(), squared)
    torch.cuda.synchronize()
    found = {}

    def work(name):
        found[name] = on_side_stream(lambda: calibrated(network(), squared))

    threads = [threading.Thread(target=work, args=(name,)) for name in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in range(2):
        assert_same(found[name], expected)


def test_compression_follows_the_current_stream():
    model, x = network(), batches()[0].to(DEVICE)
    covariances = calibrated(model, squared)
    expected = copy.deepcopy(model)
    lro.compress_(expected, covariances, lro.Ranks(RANKS))
    torch.cuda.synchronize()
    on_side_stream(lambda: lro.compress_(model, covariances, lro.Ranks(RANKS)))
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected(x), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_compressed_layers_follow_the_current_stream():
    model = compressed()
    xs = [x.to(DEVICE) for x in batches()]
    expected = [model(x * 0.5) for x in xs]
    results = on_streams_at_once([lambda x=x: late(model, x) for x in xs], 5)
    for outputs, y in zip(results, expected, strict=True):
        for output in outputs:
            torch.testing.assert_close(output, y, rtol=1e-3, atol=1e-3)


def test_training_follows_the_current_stream():
    model, xs = network(), [x.to(DEVICE) for x in batches()]
    student = copy.deepcopy(model)
    lro.compress_(student, calibrated(model, None), lro.Ranks(RANKS))
    other = copy.deepcopy(student)
    torch.cuda.synchronize()
    expected = lro.finetune_(student, xs, teacher=model, forward=late)
    found = on_side_stream(lambda: lro.finetune_(other, xs, teacher=model, forward=late))
    assert found.losses == pytest.approx(expected.losses, rel=1e-2)
