"""Bytes of memory: read from text, written as text, and free on a device."""

import torch

from lowrank_ops.models.memory import free_memory, parse_bytes, size


def test_free_memory_is_known_here() -> None:
    free = free_memory(torch.device("cpu"))
    assert free is None or free > 0


def test_bytes_are_read_and_written() -> None:
    assert parse_bytes("8GB") == 8 * 10**9 and parse_bytes("1.5 GiB") == 3 << 29 and parse_bytes(4096) == 4096
    assert [size(count) for count in (512, 1536, 3 << 19, 3 << 29)] == ["512 B", "1.5 KiB", "1.5 MiB", "1.5 GiB"]
