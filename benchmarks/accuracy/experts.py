"""Do experts share a basis? ``python -m benchmarks.accuracy.experts``, a table of docs/results.md.

Trains a small Mixtral on the bytes of docstrings, then compares factors of its experts' projections at equal numbers of
parameters: own output directions for each expert, at one rank or at ranks that follow the error; one input basis, or
one output basis, for all experts of a layer. Covariances are about zero and factors have no bias. Errors are of test
texts, relative to the outputs' squares. The loss is in nats per byte, with one kind of projection replaced everywhere.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import lowrank_ops as lro
from lowrank_ops.models.experts import experts_listed

from . import vision
from .corpora import corpus
from .results import Results

RESULTS = vision.RESULTS.with_name("experts.json")
SIZES = {"8 of 256, 2 per token": (8, 256, 2), "32 of 64, 4 per token": (32, 64, 4)}
BUDGETS = (0.3, 0.5, 0.7)
PROJECTIONS = ("gate_up_proj", "down_proj")
LENGTH, BATCH, LEARNING_RATE = 128, 16, 3e-3

Weights = Mapping[str, Tensor]  # of the experts of one layer, (out_features, in_features)


def per_expert(weights: Weights, moments: Weights, budget: float) -> dict[str, Tensor]:
    """The first output directions of each expert, as many for all."""
    rank = int(budget * _size(weights) / sum(_shape(weights)))
    return {fqn: _onto(_directions(weights[fqn], moments[fqn])[1][:, :rank], weights[fqn]) for fqn in weights}


def own_ranks(weights: Weights, moments: Weights, budget: float) -> dict[str, Tensor]:
    """The same, with the largest variances of all experts of the layer."""
    found = {fqn: _directions(weights[fqn], moments[fqn]) for fqn in weights}
    total = int(budget * _size(weights) / sum(_shape(weights)) * len(weights))
    threshold = torch.cat([values for values, _ in found.values()]).sort(descending=True)[0][total]
    return {fqn: _onto(basis[:, values > threshold], weights[fqn]) for fqn, (values, basis) in found.items()}


def shared_input(weights: Weights, moments: Weights, budget: float) -> dict[str, Tensor]:
    """V for all experts, by the stacked weights at the sum of the moments; then the best U of each for W' = U V."""
    out_features, in_features = _shape(weights)
    rank = min(in_features, int(budget * len(weights) * _size(weights) / (len(weights) * out_features + in_features)))
    values, vectors = torch.linalg.eigh(torch.stack(list(moments.values())).sum(0))
    root = vectors * values.clamp_min(0).sqrt()
    _, inner = _directions(root.mT, torch.stack([weight.mT @ weight for weight in weights.values()]).sum(0))
    basis = inner[:, :rank].mT @ torch.linalg.pinv(root)
    fitted = {}
    for fqn, weight in weights.items():
        moment = moments[fqn] + 1e-6 * moments[fqn].diagonal().mean() * torch.eye(in_features)
        fitted[fqn] = weight @ moment @ basis.mT @ torch.linalg.pinv(basis @ moment @ basis.mT) @ basis
    return fitted


def shared_output(weights: Weights, moments: Weights, budget: float) -> dict[str, Tensor]:
    """The first output directions of all experts together."""
    out_features, in_features = _shape(weights)
    rank = min(out_features, int(budget * len(weights) * _size(weights) / (len(weights) * in_features + out_features)))
    outputs = torch.stack([weights[fqn] @ moments[fqn] @ weights[fqn].mT for fqn in weights]).sum(0)
    _, basis = _directions(torch.eye(out_features, dtype=outputs.dtype), outputs)
    return {fqn: _onto(basis[:, :rank], weight) for fqn, weight in weights.items()}


METHODS: dict[str, Callable[[Weights, Weights, float], dict[str, Tensor]]] = {
    "own basis, one rank": per_expert,
    "own basis, own ranks": own_ranks,
    "shared input basis": shared_input,
    "shared output basis": shared_output,
}


def _shape(weights: Weights) -> tuple[int, int]:
    out_features, in_features = next(iter(weights.values())).shape
    return out_features, in_features


def _size(weights: Weights) -> int:
    return next(iter(weights.values())).numel()


def _directions(weight: Tensor, moment: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues of W C W^T in descending order, and its eigenvectors."""
    values, vectors = torch.linalg.eigh(weight @ moment @ weight.mT)
    return values.flip(0), vectors.flip(1)


def _onto(basis: Tensor, weight: Tensor) -> Tensor:
    return basis @ (basis.mT @ weight)


def build(experts: int, width: int, per_token: int) -> nn.Module:
    """A Mixtral of bytes with 2 layers of 128 features."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=256, hidden_size=128, intermediate_size=width, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, num_local_experts=experts, num_experts_per_tok=per_token, output_router_logits=True,
            router_aux_loss_coef=0.02,
        )
    )  # fmt: skip


def batches(texts: list[str], count: int, seed: int) -> list[Tensor]:
    """Random pieces of the texts as bytes, (batch, length)."""
    data = torch.tensor(list("\n".join(texts).encode()))
    starts = torch.randint(len(data) - LENGTH, (count, BATCH), generator=torch.Generator().manual_seed(seed))
    return [torch.stack([data[start : start + LENGTH] for start in batch]) for batch in starts]


def train_(model: nn.Module, data: list[Tensor]) -> None:
    """One step per batch, at a learning rate that falls to zero."""
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, len(data))
    for x in tqdm(data, desc="training", unit="step"):
        model(x, labels=x).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


@torch.no_grad()
def loss(model: nn.Module, data: list[Tensor]) -> float:
    """Nats per byte."""
    found = [F.cross_entropy(model(x).logits[:, :-1].flatten(0, 1), x[:, 1:].flatten()) for x in data]
    return float(torch.stack(found).mean())


def compare(model: nn.Module, size: str, calibration: list[Tensor], test: list[Tensor], results: Results) -> None:
    """Measure all methods, budgets and projections on a trained model."""
    sums = [
        {
            fqn: layer.activations.second_moment
            for fqn, layer in lro.calibrate(model, data, filter_fn=_is_expert).items()
        }
        for data in (calibration, test)
    ]
    results.add({"size": size, "method": "dense"}, {"loss": loss(model, test)})
    with experts_listed(model):
        for budget in BUDGETS:
            for projection in PROJECTIONS:
                names = [fqn for fqn in sums[0] if fqn.endswith(projection)]
                dense = {fqn: model.get_submodule(fqn).get_parameter("weight").detach().clone() for fqn in names}
                for method, make in METHODS.items():
                    new: dict[str, Tensor] = {}
                    for layer in ("layers.0.", "layers.1."):
                        weights = {fqn: weight.double() for fqn, weight in dense.items() if layer in fqn}
                        new |= make(weights, {fqn: sums[0][fqn] for fqn in weights}, budget)
                    lost = sum(_square(dense[fqn].double() - new[fqn], sums[1][fqn]) for fqn in names)
                    whole = sum(_square(dense[fqn].double(), sums[1][fqn]) for fqn in names)
                    _set(model, new)
                    case = {"size": size, "projection": projection, "budget": budget, "method": method}
                    results.add(case, {"error": lost / whole, "loss": loss(model, test)})
                    _set(model, dense)


def _is_expert(module: nn.Module, fqn: str) -> bool:
    return ".experts." in fqn


def _square(weight: Tensor, moment: Tensor) -> float:
    return float(((weight @ moment) * weight).sum())


def _set(model: nn.Module, weights: Weights) -> None:
    with torch.no_grad():
        for fqn, weight in weights.items():
            model.get_submodule(fqn).get_parameter("weight").copy_(weight)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    texts, results = corpus("docstrings", 400), Results(arguments.results)
    for size in arguments.sizes:
        if results.find({"size": size, "projection": PROJECTIONS[-1], "budget": BUDGETS[-1]}) is None:
            model = build(*SIZES[size])
            train_(model, batches(texts.calibration, arguments.steps, seed=1))
            compare(model.eval(), size, batches(texts.validation, 24, seed=2), batches(texts.test, 8, seed=3), results)
    for row in results.rows:
        print(*row.values(), sep="  ")


if __name__ == "__main__":
    main()
