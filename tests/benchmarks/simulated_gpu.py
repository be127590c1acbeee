"""A GPU in name only: the parts of ``torch.cuda`` that the benchmarks use, on two clocks that count microseconds.

Work is done at once, on the CPU, while its time is booked on the device's clock, behind what is already there; under
capture it is only kept, to be done by replays.
"""

from contextlib import contextmanager
from types import SimpleNamespace

import torch

CALL, REPLAY = 5.0, 40.0  # host time of a launch and of a graph's


class OnGpu(torch.Tensor):
    """A CPU tensor that says otherwise."""

    is_cuda = True


def on_gpu(tensor):
    return tensor.as_subclass(OnGpu)


class SimulatedGpu:
    def __init__(self):
        self.host = self.device = 0.0
        self.capturing = None  # the graph
        self.stream = "default"
        self.log = []

    def launch(self, work, cost):
        """``work`` in ``cost`` microseconds of the device."""
        if self.capturing is not None:
            self.capturing.append((work, cost))
            return
        self.host += CALL
        self._do([(work, cost)])

    def clock(self):
        """Seconds of the host."""
        return self.host / 1e6

    def install(self, monkeypatch):
        for name, function in {
            "synchronize": self._synchronize,
            "current_stream": lambda: SimpleNamespace(wait_stream=lambda other: None),
            "Stream": lambda: SimpleNamespace(wait_stream=lambda other: None),
            "stream": self._on_side_stream,
            "CUDAGraph": lambda: _Graph(self),
            "graph": self._capture,
            "Event": lambda enable_timing: _Event(self),
            "_sleep": lambda cycles: self._do([(lambda: None, cycles / 2000)]),
            "reset_peak_memory_stats": lambda: self.log.append("peak reset"),
            "max_memory_allocated": lambda: 5_000_000,
            "empty_cache": lambda: None,
        }.items():
            monkeypatch.setattr(torch.cuda, name, function)

    def _do(self, works):
        self.device = max(self.device, self.host)
        for work, cost in works:
            work()
            self.device += cost

    def _synchronize(self, device=None):
        assert self.capturing is None, "synchronized in the middle of a capture"
        self.host = max(self.host, self.device)

    @contextmanager
    def _on_side_stream(self, stream):
        self.stream = "side"
        yield
        self.stream = "default"

    @contextmanager
    def _capture(self, graph):
        self._synchronize()
        self.capturing = graph.works
        try:
            yield
        finally:
            self.capturing = None


class _Graph:
    def __init__(self, gpu):
        self.gpu, self.works = gpu, []

    def replay(self):
        self.gpu.host += REPLAY
        self.gpu._do(self.works)


class _Event:
    def __init__(self, gpu):
        self.gpu, self.time = gpu, None

    def record(self):
        self.time = max(self.gpu.host, self.gpu.device)

    def synchronize(self):
        self.gpu.host = max(self.gpu.host, self.time)

    def elapsed_time(self, other):
        return (other.time - self.time) / 1e3
