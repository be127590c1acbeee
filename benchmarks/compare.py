"""Two files of results side by side: ``python -m benchmarks.compare OLD.json NEW.json [--tolerance 0.1]``.

Compared are speed-ups over opponents, which were timed in turn with ours, and not times: those change with the machine
and with who else uses it. The exit code is 1 where a speed-up fell by more than the tolerance, or where a result of
ours that was right is wrong, and 2 where the files have no speed-up in common.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .suite import load


class Change(NamedTuple):
    """One speed-up, or being right, then and now."""

    label: str
    old: float
    new: float  # 0 for a result that is wrong now

    @property
    def ratio(self) -> float:
        return self.new / self.old


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """Every speed-up of ours that both documents have, the largest loss first."""
    before, after = dict(_speedups(old)), dict(_speedups(new))
    wrong = {_label(row) for row in _ours(new) if not row["correct"]}
    found = [Change(label, before[label], after[label]) for label in before.keys() & after.keys()]
    found += [
        Change(label, figure, 0.0)
        for label, figure in before.items()
        if label not in after and label.rpartition(" over ")[0] in wrong
    ]
    return sorted(found, key=lambda change: (change.ratio, change.label))


def _ours(document: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for suite in document["suites"].values():
        yield from (row for row in suite["rows"] if row["arm"].startswith("lowrank_ops"))


def _speedups(document: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for row in _ours(document):
        for other, figure in row["speedup"].items():
            yield f"{_label(row)} over {other}", figure


def _label(row: Mapping[str, Any]) -> str:
    return " ".join([row["op"], *(f"{key}={value}" for key, value in row["shape"].items()), row["arm"]])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument(
        "--tolerance", type=float, default=0.1, help="share of a speed-up that may be lost (default 0.1)"
    )
    parsed = parser.parse_args(arguments)
    found = changes(load(parsed.old), load(parsed.new))
    if not found:
        print(f"{parsed.old} and {parsed.new} have no speed-up in common: nothing was compared", file=sys.stderr)
        return 2
    fallen = [change for change in found if change.ratio < 1 - parsed.tolerance]
    risen = [change for change in reversed(found) if change.ratio > 1 + parsed.tolerance]
    for title, listed in (("slower", fallen), ("faster", risen)):
        for change in listed:
            now = f"{change.old:.2f} -> {change.new:.2f}" if change.new else f"{change.old:.2f} -> wrong"
            print(f"{title}: {now}  {change.label}")
    print(
        f"{len(found)} speed-ups compared: {len(fallen)} fell and {len(risen)} rose by more than {parsed.tolerance:.0%}"
    )
    return int(bool(fallen))


if __name__ == "__main__":
    sys.exit(main())
