"""The memory that a call uses."""

import gc
import itertools
from collections.abc import Callable

import torch


def peak_bytes(call: Callable[[], object]) -> int:
    """Peak bytes of CPU memory that a call adds, by torch's allocator."""
    gc.collect()  # else tensors of an earlier call could count as freed in this one
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate((event.nbytes() for event in events), initial=0))
