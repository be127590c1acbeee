"""Are budgets met? ``python -m benchmarks.accuracy.budgets [--out FILE]``: every budget, every allocation, two models.

The demo's Vision Transformer and a small BERT of random weights (transformers), 15 to 75% of the layers' parameters,
MACs or time. For time also the latency of the whole model, dense and compressed in turn on this CPU: layers are only a
part of it, and other load on the machine affects it.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import lowrank_ops as lro
from lowrank_ops.demo.data import load_images
from lowrank_ops.demo.vit import load_vit
from lowrank_ops.latencies import LayerLatencies
from lowrank_ops.layers.latency import time_in_turn
from lowrank_ops.models.running import call_model
from lowrank_ops.ranks import choose_ranks
from lowrank_ops.ranks.costs import Price, in_macs, in_parameters, nanoseconds
from lowrank_ops.subspaces import LayerSubspaces, layer_subspaces

from .results import Results, study_parser

FRACTIONS = (0.15, 0.25, 0.35, 0.5, 0.75)
ALLOCATIONS = ("uniform", "variance", "loss")
TOLERANCE = 0.01


class Subject(NamedTuple):
    """A calibrated model and one batch, whose latency is measured."""

    model: nn.Module
    covariances: lro.Covariances
    spaces: dict[str, LayerSubspaces]
    batch: Any


def vit(images: int = 400) -> Subject:
    """The demo's model, calibrated by the first images that ship with it."""
    return _subject(load_vit(), list(load_images("calibration")[0][:images].split(100)))


def bert(layers: int = 3, width: int = 128, texts: int = 48) -> Subject:
    """A BERT encoder of random weights on random tokens."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=500,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=4 * width,
    )
    model = BertModel(config, add_pooling_layer=False).eval()
    return _subject(model, [{"input_ids": torch.randint(500, (16, 32))} for _ in range(texts // 16)])


def _subject(model: nn.Module, batches: list[Any]) -> Subject:
    torch.manual_seed(0)
    covariances = lro.calibrate(model, batches, sensitivity="output")
    layers = {fqn: module for fqn, module in model.named_modules() if fqn in covariances}
    return Subject(model, covariances, layer_subspaces(layers, covariances), batches[0])


SUBJECTS: Mapping[str, Callable[[], Subject]] = {"demo ViT": vit, "small BERT": bert}


def share(subject: Subject, ranks: Mapping[str, int | None], price: Price) -> float:
    """The cost of layers at these ranks, relative to dense."""
    spent = sum(price.of(fqn, space, ranks[fqn]) for fqn, space in subject.spaces.items())
    return spent / sum(price.dense(fqn, space) for fqn, space in subject.spaces.items())


def policies(latencies: LayerLatencies | None) -> Iterator[tuple[str, Price, Callable[[float, str], Any]]]:
    """Each budget's name, price and policy; time only if latencies are given."""
    yield "parameters", in_parameters(), lro.ParameterBudget
    yield "MACs", in_macs(), lro.FlopBudget
    if latencies is not None:
        yield "latency", nanoseconds(latencies), lambda fraction, how: lro.LatencyBudget(fraction, latencies, how)


def whole_latency(subject: Subject, ranks: Mapping[str, int | None], rounds: int) -> tuple[float, float]:
    """Median seconds of a forward of the whole model, dense and compressed."""
    small = copy.deepcopy(subject.model)
    chosen = lro.Ranks({fqn: rank for fqn, rank in ranks.items() if rank is not None})
    lro.compress_(small, subject.covariances, lro.CompressionConfig(chosen))
    with torch.inference_mode():
        variants = {
            name: partial(call_model, model, subject.batch)
            for name, model in (("dense", subject.model), ("small", small))
        }
        times = time_in_turn(variants, torch.device("cpu"), rounds)
    return times["dense"], times["small"]


def measure(name: str, subject: Subject, results: Results, rounds: int) -> None:
    """Add the rows of one model that are missing."""
    print(f"{name}: timing its layers", flush=True)
    latencies = lro.measure_latency(subject.model, subject.batch, rounds=rounds, progress=True)
    for unit, price, policy in policies(latencies):
        for allocation in ALLOCATIONS:
            for fraction in FRACTIONS:
                case = {"model": name, "budget": unit, "allocation": allocation, "fraction": fraction}
                if results.find(case) is not None:
                    continue
                try:
                    ranks = choose_ranks(policy(fraction, allocation), subject.spaces)
                except ValueError as error:
                    results.add(case, {"refused": str(error)})
                    continue
                row: dict[str, Any] = {"share": share(subject, ranks, price), "load": round(os.getloadavg()[0], 1)}
                if unit == "latency":
                    row["dense_ms"], row["ms"] = (1e3 * time for time in whole_latency(subject, ranks, rounds))
                results.add(case, row)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: the cost of each budget's ranks, in % of dense."""
    lines = ["| model | budget | allocation | " + " | ".join(f"{fraction:.0%}" for fraction in FRACTIONS) + " |"]
    lines.append("| --- " * 3 + "| ---: " * len(FRACTIONS) + "|")
    groups: dict[tuple[str, str, str], dict[float, dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["budget"], row["allocation"]), {})[row["fraction"]] = row
    for key, found in groups.items():
        lines.append("| " + " | ".join([*key, *(_cell(found.get(fraction)) for fraction in FRACTIONS)]) + " |")
    return "\n".join(lines)


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "not measured"
    if "refused" in row:
        return "cannot be met"
    whole = f" ({row['ms'] / row['dense_ms']:.0%})" if "ms" in row else ""
    return f"{row['share']:.2%}{whole}"


def main() -> int:
    """The command line; 1 if a budget was missed by more than 1%."""
    parser = study_parser("budgets", __doc__, Path("budgets.json"))
    parser.add_argument("--rounds", type=int, default=9, help="samples of each time")
    options = parser.parse_args()
    results = Results(options.out)
    for name, make in SUBJECTS.items():
        measure(name, make(), results, options.rounds)
    print(table(results.rows))
    print(f"\nIn brackets: time of the whole model, of dense; CPU, threads: {torch.get_num_threads()}.")
    missed = [row for row in results.rows if not _met(row)]
    for row in missed:
        print(f"MISSED: {row}")
    return int(bool(missed))


def _met(row: dict[str, Any]) -> bool:
    return "refused" in row or row["fraction"] - TOLERANCE <= row["share"] <= row["fraction"]


if __name__ == "__main__":
    raise SystemExit(main())
