"""What is to be reached on a GPU, shape by shape; :mod:`benchmarks.grade` holds results against it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from . import shapes

AUTO = "lowrank_ops auto"
BACKENDS = ("lowrank_ops reference", "lowrank_ops triton", "lowrank_ops cuda")
LAUNCH_US = 2.0  # granted beside the floor where a call takes microseconds
DTYPE = "bf16"

Group = Mapping[str, Mapping[str, Any]]  # the rows of one shape by arm
Shape = Mapping[str, int | str]


class Target(NamedTuple):
    """One requirement on a figure of every one of some shapes."""

    number: int
    text: str
    op: str
    shapes: Sequence[Shape]
    figure: Callable[[Group], float | None]  # None: not measured
    required: float
    at_most: bool = False
    share: float = 1.0  # of the shapes that have to reach it

    def reached(self, figure: float) -> bool:
        return figure <= self.required if self.at_most else figure >= self.required


def targets() -> list[Target]:
    """What is to be shown, by its number."""
    covariance = [
        shapes.covariance(tokens, features, DTYPE)
        for features in shapes.COVARIANCE_FEATURES
        for tokens in shapes.COVARIANCE_TOKENS
    ]
    linear = [shapes.linear(layer, tokens, DTYPE) for layer in shapes.STORED_LAYERS for tokens in shapes.TOKENS]
    few = [shape for shape in linear if _number(shape, "tokens") <= 256]
    many = [shape for shape in linear if _number(shape, "tokens") >= 2048]

    def wide(least: int, most: int = 1 << 30) -> list[Shape]:
        return [shape for shape in covariance if least <= _number(shape, "features") <= most]

    long = [shape for shape in wide(768, 1024) if shape["tokens"] == max(shapes.COVARIANCE_TOKENS)]
    moments, layer, gemm, two = "covariance_update_", "lowrank_linear", over("torch_mm"), over("two_linears")
    small, large = _model("ViT-B/16", 0.5), _model("ViT-L/16", 0.25)
    calibrated = {"model": "ViT-L/16", "dtype": DTYPE}
    dense, near = over("dense", ours="lowrank_ops"), 1 / 1.03
    return [
        Target(1, "covariance: over the best other arm", moments, covariance, over(), 1.0),
        Target(1, "d >= 4096: over the product with float32 output", moments, wide(4096), gemm, 1.6),
        Target(1, "d = 3072: the same", moments, wide(3072, 3072), gemm, 1.25),
        Target(1, "d = 768, 1024, most tokens: the same", moments, long, gemm, 1.15),
        Target(1, "d >= 3072: over the float32 product", moments, wide(3072), over("float32_product"), 10.0),
        Target(2, "M <= 256, at most half the parameters: over dense", layer, _halved(few), over("dense"), 1.0),
        Target(2, "M <= 256, ViT: over two linears", layer, _vit(few), two, 1.5),
        Target(2, "M <= 256, rank 512 to 1024: the same", layer, _ranks(few, 512, 1024), two, 1.3),
        Target(2, "M = 1, rank >= 746: (floor + 2 us) / time", layer, _ranks(_single(few), 746), of_floor, 0.75),
        Target(3, "M >= 2048: best arm's time / ours", layer, many, near_best, 1 / 1.02),
        Target(3, "M >= 2048, rank <= 256: over two linears", layer, _ranks(many, 0, 256), two, 1.15),
        Target(4, "ViT-B/16 at 50%, batch 64, compiled: over dense", "model", [{**small, "batch": 64}], dense, 1.4),
        Target(4, "ViT-L/16 at 25%, batch 64, compiled: over dense", "model", [{**large, "batch": 64}], dense, 2.2),
        Target(4, "both at batch 1", "model", [{**small, "batch": 1}, {**large, "batch": 1}], dense, 1.0),
        Target(4, "ViT-L/16: calibration / forward", "calibration", [calibrated], cost_over_forward, 1.3, at_most=True),
        Target(5, "covariance: best backend's time / auto's", moments, covariance, near_best_backend, near, share=0.95),
        Target(5, "lowrank_linear: the same", layer, linear, near_best_backend, near, share=0.95),
    ]  # fmt: skip


def graded(op: str, shape: Shape) -> bool:
    """Whether a target speaks of a shape of an op."""
    return any(wanted.items() <= shape.items() for target in _listed() if target.op == op for wanted in target.shapes)


@functools.cache
def _listed() -> list[Target]:
    return targets()


def over(*others: str, ours: str = AUTO) -> Callable[[Group], float | None]:
    """Times faster than the fastest of ``others``, or of all opponents where none is named."""

    def figure(group: Group) -> float | None:
        names = others or tuple(name for name in group if not name.startswith("lowrank_ops"))
        return _ratio(group, ours, [name for name in names if name in group])

    return figure


def near_best(group: Group) -> float | None:
    """The time of the fastest arm of all, ours included, as a share of our own choice's."""
    return _ratio(group, AUTO, [name for name in group if name != AUTO])


def near_best_backend(group: Group) -> float | None:
    """The time of the fastest backend as a share of our own choice's."""
    return _ratio(group, AUTO, [name for name in BACKENDS if name in group])


def of_floor(group: Group) -> float | None:
    """The floor and a launch as a share of the time."""
    row = group.get(AUTO)
    if row is None or not _sound(row):
        return None if row is None else 0.0
    return float((row["floor_us"] + LAUNCH_US) / row["median_us"])


def cost_over_forward(group: Group) -> float | None:
    """Times that calibration takes longer than the forward passes alone."""
    ratio = _ratio(group, "lowrank_ops", ["forward"] if "forward" in group else [])
    if ratio is None:
        return None
    return 1 / ratio if ratio else float("inf")


def _ratio(group: Group, ours: str, others: Sequence[str]) -> float | None:
    row = group.get(ours)
    if row is None:
        return None
    if not _sound(row):
        return 0.0
    times = [group[name]["median_us"] for name in others if _sound(group[name])]
    return min(times) / row["median_us"] if times else None


def _sound(row: Mapping[str, Any]) -> bool:
    return bool(row["correct"] and row["median_us"])


def _number(shape: Shape, key: str) -> int:
    return int(shape[key])


def _halved(found: Iterable[Shape]) -> list[Shape]:
    kept = []
    for shape in found:
        width, height, stored = (_number(shape, key) for key in ("in_features", "out_features", "rank"))
        if 2 * (stored - 7) * (width + height) <= width * height:  # stored ranks are rounded up to multiples of 8
            kept.append(shape)
    return kept


def _vit(found: Iterable[Shape]) -> list[Shape]:
    return [shape for shape in found if _number(shape, "in_features") <= 1024]


def _ranks(found: Iterable[Shape], least: int, most: int = 1 << 30) -> list[Shape]:
    return [shape for shape in found if least <= _number(shape, "rank") <= most]


def _single(found: Iterable[Shape]) -> list[Shape]:
    return [shape for shape in found if shape["tokens"] == 1]


def _model(name: str, fraction: float) -> Shape:
    return {"model": name, "parameters": f"{fraction:.0%}", "mode": "compiled", "dtype": DTYPE}
