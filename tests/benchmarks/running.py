"""What runs a suite in a test: its arguments, and ceilings that need not be measured."""

import argparse

from benchmarks.measure import Ceilings

LIMITS = Ceilings(1e10, {"float32": 5e10})


def arguments(**changes):
    options = {"dry_run": False, "device": "cpu", "seconds": 0.02, "only": "", "out": None}
    options |= {"resume": False, "budget": float("inf"), "commit": None, "graded": False}
    return argparse.Namespace(**options | changes)
