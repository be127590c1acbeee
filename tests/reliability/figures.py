"""Writes the tables of ``docs/reliability.md`` from figures.json: ``python -m tests.reliability.figures``."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.reliability.campaign import FIGURES

MUTANTS = FIGURES.with_name("mutants.json")
PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
MARK = re.compile(r"(<!-- figures: (?P<name>[\w ]+) -->\n).*?(<!-- end -->)", re.S)
# Campaigns by table, by the beginning of their names.
CAMPAIGNS = {
    "fuzzing": (
        "lowrank_linear", "lowrank_experts", "covariance_update_", "conv_covariance_update_", "unfit arguments",
        "choice of", "mutated bytes", "forged headers", "edited JSON", "factors of rows of any scale",
    ),
    "kills": ("killed", "interrupted"),
    "numerics": ("predicted and measured error", "covariance over many tokens"),
    "concurrency": ("models in threads", "one layer in threads", "data loader", "DDP of"),
    "memory": ("memory over", "more than 2^31 elements"),
}  # fmt: skip


def table(rows: list[list[str]]) -> str:
    head, *body = [
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in rows
    ]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body]) + "\n"


def campaigns(known: dict[str, Any], starts: tuple[str, ...]) -> Iterator[list[str]]:
    names = [name for start in starts for name in sorted(known) if name.startswith(start)]
    names = list(dict.fromkeys(names))
    fields = {key: None for name in names for key in known[name] if key not in ("torch", "python", "seconds", "left")}
    order = [key for key in ("cases", "tokens", "elements", *sorted(fields)) if key in fields]
    order = list(dict.fromkeys(order))
    yield ["campaign", *(key.replace("_", " ") for key in order), "left"]
    for name in names:
        values = known[name]
        cells = [values.get(key, "") for key in order]
        shown = [f"{cell:,}" if isinstance(cell, int) else f"{cell}" for cell in cells]
        yield [name, *shown, str(values.get("left", 0))]


def interval(successes: int, trials: int) -> tuple[float, float]:
    """Wilson's 95% confidence interval of a share."""
    z2 = 1.96**2
    middle, half = successes + z2 / 2, (z2 * (successes * (trials - successes) / trials + z2 / 4)) ** 0.5
    return (middle - half) / (trials + z2), (middle + half) / (trials + z2)


def mutants(found: dict[str, Any]) -> Iterator[list[str]]:
    rows, total, killed = found["mutants"], Counter[str](), Counter[str]()
    for row in rows:
        room = row["file"].split("/")[0]
        for key in (room, "all"):
            total[key] += 1
            killed[key] += not row["survived"]
    yield ["module", "mutants tried", "killed", "share", "95% interval"]
    for room in [*sorted(total - Counter(all=total["all"])), "all"]:
        low, high = interval(killed[room], total[room])
        yield [
            room,
            str(total[room]),
            str(killed[room]),
            f"{killed[room] / total[room]:.1%}",
            f"{low:.0%} to {high:.0%}",
        ]


def rendered(name: str, known: dict[str, Any]) -> str:
    if name == "mutants":
        return table([*mutants(json.loads(MUTANTS.read_text()))])
    if name == "matrix":
        return table(known[name])
    return table([*campaigns(known, CAMPAIGNS[name])])


def page(text: str) -> str:
    known = json.loads(FIGURES.read_text())
    return MARK.sub(lambda match: f"{match[1]}\n{rendered(match['name'], known)}\n{match[3]}", text)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
