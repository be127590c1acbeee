"""Benchmarks of lowrank_ops against alternatives, run from a checkout as ``python -m benchmarks.X``.

``bench_*`` are the suites over the shapes of ``shapes``; ``harness`` checks and times, ``suite`` is their command line.
``tune`` writes the tuned tables, ``gpu_run`` runs everything that needs a GPU, ``tables`` and ``plot`` show results.
"""
