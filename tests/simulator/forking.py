"""Runs pytest in forks that have torch imported already: arguments in by line, exit statuses out by line."""

from __future__ import annotations

import json
import os
import signal
import sys

import pytest
import torch  # noqa: F401  what takes long to import

import tests.ops.inputs
import tests.tolerance  # noqa: F401


def run(arguments: list[str], out: str) -> int:
    child = os.fork()
    if child == 0:
        signal.alarm(900)
        file = os.open(out, os.O_WRONLY | os.O_CREAT)
        for stream in (1, 2):
            os.dup2(file, stream)
        status = pytest.main(arguments)
        sys.stdout.flush()
        os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    for line in sys.stdin:
        print(run(*json.loads(line)), flush=True)
