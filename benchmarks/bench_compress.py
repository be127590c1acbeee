"""compress_ against SVD-LLM's factorization of the same layers: ``python -m benchmarks.bench_compress``.

Blocks of Linears with the shapes of SmolLM2-135M or of a Llama of 1.1B parameters, random: weights with a falling
spectrum in bfloat16, activations with a falling spectrum, a mean and outlier channels. Or (``--folder``) blocks of a
language model of transformers, calibrated on Python's language reference.

Every repetition runs every variant, in one process on one thread, on processor time; a figure is the smallest of a
variant. SVD-LLM's factorization (Cholesky of the second moment, SVD of W L, inverse of L by triangular solves) is timed
as favorably as possible: one Cholesky factor for layers that share an input, second moments that are regular, and no
choice of ranks. Its published code takes a Cholesky factor and an inverse in float64 for every Linear, and the SVD in
float32; that is the third baseline.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lowrank_ops as lro
from lowrank_ops.calibration import LayerStatistics, Moments

from .suite import environment, write

RESULTS = Path(__file__).parent / "results" / "compress.json"
SHAPES = {"smollm2-135m": (576, 192, 1536), "llama-1.1b": (2048, 256, 5632)}  # width, keys, hidden
INPUTS = {"attention": 0, "heads": 0, "mlp": 0, "hidden": 2}  # indices of their features among these
LAYERS = {
    "q_proj": ("attention", 0),
    "k_proj": ("attention", 1),
    "v_proj": ("attention", 1),
    "o_proj": ("heads", 0),
    "gate_proj": ("mlp", 2),
    "up_proj": ("mlp", 2),
    "down_proj": ("hidden", 0),
}
COUNTED = ("cholesky_ex", "cholesky", "eigh", "eigvalsh", "qr", "svd", "inv")


def random_rows(rows: int, features: int) -> Tensor:
    """Rows with a falling spectrum, a mean and outlier channels, (rows, features), float64."""
    scales = torch.logspace(0, -2, features)
    x = torch.randn(rows, features) * scales @ torch.randn(features, features) / features**0.5
    x += 0.1 * torch.randn(features) + 0.01 * torch.randn(rows, features)
    x[:, torch.randperm(features)[:3]] *= 100
    return x.double()


def moments_of(rows: Tensor, weights: Tensor | None = None) -> Moments:
    """Sums over rows, weighted if asked."""
    weighted = rows if weights is None else rows * weights.unsqueeze(-1)
    return Moments(weighted.T @ rows, weighted.sum(0), len(rows))


def random_model(
    blocks: int, rows: int, shape: tuple[int, int, int] = SHAPES["smollm2-135m"]
) -> tuple[nn.Module, dict[str, lro.Covariances]]:
    """The layers, and statistics without gradients, with them, and with token weights as well."""
    torch.manual_seed(0)
    model = nn.ModuleDict()
    kinds: dict[str, dict[str, LayerStatistics]] = {"plain": {}, "gradients": {}, "token weights": {}}
    for block in range(blocks):
        layers = nn.ModuleDict()
        token_weights = torch.rand(rows).double().square() * 3
        x = {name: random_rows(rows, shape[index]) for name, index in INPUTS.items()}
        plain = {name: moments_of(part) for name, part in x.items()}
        for name, (source, index) in LAYERS.items():
            features, inputs = shape[index], shape[INPUTS[source]]
            layer = nn.Linear(inputs, features, bias=False, dtype=torch.bfloat16)
            down, up = torch.randn(features // 4, inputs), torch.randn(features, features // 4)
            weight = up @ down / features**0.5 + torch.randn(features, inputs)
            layer.weight = nn.Parameter((0.02 * weight).bfloat16(), requires_grad=False)
            layers[name] = layer
            fqn, gradients = f"{block}.{name}", moments_of(1e-3 * random_rows(rows, features))
            weighted = moments_of(x[source], token_weights)
            kinds["plain"][fqn] = LayerStatistics("input", plain[source])
            kinds["gradients"][fqn] = LayerStatistics("input", plain[source], gradients)
            kinds["token weights"][fqn] = LayerStatistics("input", plain[source], gradients, weighted)
        model[str(block)] = layers
    return model, {kind: lro.Covariances(statistics) for kind, statistics in kinds.items()}


def on_smaller_side(layer: nn.Module, statistics: LayerStatistics) -> LayerStatistics:
    """What ``calibrate(side="smaller")`` streams: of a layer whose output is narrower, the output."""
    weight = layer.get_parameter("weight").detach().double()
    if weight.shape[0] >= weight.shape[1]:
        return statistics

    def of_output(moments: Moments | None) -> Moments | None:
        if moments is None:
            return None
        shift = None if moments.shift is None else weight @ moments.shift.double()
        return Moments(weight @ moments.second_moment @ weight.T, weight @ moments.total, moments.count, shift)

    outputs = of_output(statistics.activations)
    assert outputs is not None
    return LayerStatistics("output", outputs, statistics.output_gradients, of_output(statistics.token_weighted))


def real_model(folder: Path, blocks: int, tokens: int) -> tuple[nn.Module, dict[str, lro.Covariances]]:
    """The same of the first blocks of a language model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from demo.language_model import texts

    model = AutoModelForCausalLM.from_pretrained(folder)
    sequences = texts(AutoTokenizer.from_pretrained(folder), tokens)[0]
    found = lro.calibrate(
        model,
        [{"input_ids": rows} for rows in sequences.split(2)],
        filter_fn=lambda module, fqn: any(f".{block}." in f".{fqn}." for block in range(blocks)) and "layers" in fqn,
        sensitivity="fisher",
    )
    layers = nn.ModuleDict()  # only these are timed
    renamed = {fqn: fqn.replace(".", "_") for fqn in found}
    for fqn, name in renamed.items():
        layers[name] = model.get_submodule(fqn)
    kinds = {
        "plain": {renamed[fqn]: LayerStatistics(part.side, part.activations) for fqn, part in found.items()},
        "gradients": {
            renamed[fqn]: LayerStatistics(part.side, part.activations, part.output_gradients)
            for fqn, part in found.items()
        },
        "token weights": {renamed[fqn]: part for fqn, part in found.items()},
    }
    return layers, {kind: lro.Covariances(statistics) for kind, statistics in kinds.items()}


def published_svd_llm(model: nn.Module, covariances: lro.Covariances, ratio: float) -> None:
    """The steps of SVD-LLM's published code."""
    for fqn, statistics in covariances.items():
        weight, moments = model.get_submodule(fqn).get_parameter("weight").float(), statistics.activations
        root = torch.linalg.cholesky(moments.second_moment.double())
        inverse = torch.linalg.inv(root).float()
        u, s, vt = torch.linalg.svd(weight @ root.float(), full_matrices=False)
        rank = int(ratio * weight.numel() / sum(weight.shape))
        scale = s[:rank].sqrt()
        (u[:, :rank] * scale).bfloat16(), (scale.unsqueeze(-1) * (vt[:rank] @ inverse)).bfloat16()


def svd_llm(model: nn.Module, covariances: lro.Covariances, dtype: torch.dtype, ratio: float) -> None:
    """Cholesky of each second moment, SVD of W L, and the two factors."""
    roots: dict[int, Tensor] = {}
    for fqn, statistics in covariances.items():
        weight, moments = model.get_submodule(fqn).get_parameter("weight").to(dtype), statistics.activations
        if id(moments) not in roots:
            moment = (moments.second_moment / moments.count).to(dtype)
            moment.diagonal().add_(1e-6 * moment.diagonal().mean())
            roots[id(moments)] = torch.linalg.cholesky(moment)
        root = roots[id(moments)]
        u, s, vt = torch.linalg.svd(weight @ root, full_matrices=False)
        rank = int(ratio * weight.numel() / sum(weight.shape))
        scale = s[:rank].sqrt()
        down = torch.linalg.solve_triangular(root, scale.unsqueeze(-1) * vt[:rank], upper=False, left=False)
        (u[:, :rank] * scale).bfloat16(), down.bfloat16()


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Calls of torch.linalg's decompositions."""
    calls: Counter[str] = Counter()
    kept = {name: getattr(torch.linalg, name) for name in COUNTED}

    def counting(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            calls[name] += 1
            return kept[name](*arguments, **options)

        return call

    try:
        for name in COUNTED:
            setattr(torch.linalg, name, counting(name))
        yield calls
    finally:
        for name in COUNTED:
            setattr(torch.linalg, name, kept[name])


def variants(model: nn.Module, statistics: dict[str, lro.Covariances], ratio: float) -> dict[str, Callable[[], object]]:
    """What is timed, by name; each call works on a copy of the model that shares its weights."""
    budget = lro.ParameterBudget(ratio)

    def copied() -> nn.Module:
        return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})

    def compress(kind: str, side: str = "input", **options: Any) -> Callable[[], object]:
        config, given = lro.CompressionConfig(budget, **options), statistics[kind]
        if side == "smaller":
            given = lro.Covariances(
                {fqn: on_smaller_side(model.get_submodule(fqn), part) for fqn, part in given.items()}
            )
        return lambda: lro.compress_(copied(), given, config)

    return {
        "SVD-LLM float32": lambda: svd_llm(model, statistics["plain"], torch.float32, ratio),
        "SVD-LLM float64": lambda: svd_llm(model, statistics["plain"], torch.float64, ratio),
        "SVD-LLM as published": lambda: published_svd_llm(model, statistics["plain"], ratio),
        "output": compress("plain"),
        "utilized": compress("plain", projection="utilized"),
        "loss": compress("gradients"),
        "loss, token weights": compress("token weights"),
        "output, side='smaller'": compress("plain", "smaller"),
        "loss, side='smaller'": compress("gradients", "smaller"),
        "loss, token weights, side='smaller'": compress("token weights", "smaller"),
    }


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--blocks", type=int, default=4, help="of seven Linears each")
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m", help="of random blocks")
    parser.add_argument("--folder", type=Path, help="a language model of transformers, instead of random blocks")
    parser.add_argument("--rows", type=int, default=4096, help="calibration rows, or tokens of the model")
    parser.add_argument("--variants", nargs="*", help="what is timed; by default all")
    parser.add_argument("--ratio", type=float, default=0.5, help="of the parameters that are kept")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help=f"file of results, such as {RESULTS.relative_to(Path.cwd())}")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    facts = environment(torch.device("cpu")) | {"clock": "process_time"}
    if options.folder is None:
        model, statistics = random_model(options.blocks, options.rows, SHAPES[options.shape])
    else:
        model, statistics = real_model(options.folder, options.blocks, options.rows)
    runs = variants(model, statistics, options.ratio)
    runs = {name: run for name, run in runs.items() if not options.variants or name in options.variants}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    calls: dict[str, dict[str, int]] = {}
    warm = options.repeats > 1
    for repeat in range(options.repeats + warm):  # the first of several is not timed
        for name, run in runs.items():
            with counted() as calls[name]:
                start = time.process_time()
                run()
                if repeat or not warm:
                    seconds[name].append(time.process_time() - start)
    best = {name: min(times) for name, times in seconds.items()}
    rows = [
        {
            "variant": name,
            "seconds": round(best[name], 4),
            "over_svd_llm_float32": round(best[name] / best["SVD-LLM float32"], 3),
            "over_svd_llm_float64": round(best[name] / best["SVD-LLM float64"], 3),
            "over_svd_llm_as_published": round(best[name] / best.get("SVD-LLM as published", torch.nan), 3),
            "decompositions": dict(calls[name]),
        }
        for name in runs
    ]
    for row in rows:
        print(*row.values(), sep="  ")
    if options.out:
        shape = {name: getattr(options, name) for name in ("blocks", "rows", "ratio", "repeats", "shape")}
        shape["model"] = "random" if options.folder is None else options.folder.name
        write(
            options.out, {"environment": facts, "settings": shape, "layers": len(LAYERS) * options.blocks, "rows": rows}
        )


if __name__ == "__main__":
    main()
