"""Benchmarks of lowrank_ops against what one would use instead, run from a checkout as ``python -m benchmarks.X``.

``shapes`` lists what is measured, ``measure`` times, ``rows`` checks and compares, ``suite`` is the command line that
the ``bench_*`` files share, ``tables`` and ``plot`` read the JSON in ``results/``, ``tune`` writes the tuned tables.
"""
