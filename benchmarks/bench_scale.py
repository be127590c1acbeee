"""Calibration and compression at scale, in processor time of one thread: ``python -m benchmarks.bench_scale PART``.

- ``calibrate``: seconds of a calibration relative to the plain forward passes over the same tokens, interleaved; of
  ``--folder``, or of the first ``--blocks`` of a Llama-shaped model and its head.
- ``memory``: peak memory of calibration and ``compress_`` under ``max_memory``, on the first ``--blocks`` of a
  Llama-shaped model of 1.1B random parameters in bfloat16, or of ``--folder``; each step in a process of its own.
- ``growth``: seconds of ``compress_`` of one layer by width, the exponent of the widest step, and what that predicts
  for known models. Predictions are no measurements.
- ``optimum``: output error and predicted loss of the factors of every layer of real models, above the optimum that
  NumPy finds from rows and gradients of its own.
- ``precision``: what products in float32, added to float64 sums, would cost in output error.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import lowrank_ops as lro
from lowrank_ops.calibration import LayerStatistics, Moments
from lowrank_ops.factors import factorize
from lowrank_ops.subspaces import layer_subspaces
from lowrank_ops.subspaces.loss import DAMPING

from .bench_compress import SHAPES, moments_of, random_rows
from .suite import environment, write

RESULTS = Path(__file__).parent / "results"
BLOCKS, VOCABULARY = 22, 32_000
NEGLIGIBLE = 1e-9  # share of the variance; eigenvalues in float64 are exact to about 1e-15 of it
LAYER_COUNTS = (4, 16, 64)
MEMORY = "2GB"
STEPS = ("plain", "output", "utilized", "fisher", "loss")  # each calibration, then the compression by its statistics
# Blocks of known models, and of each input of a block its features and those of the outputs computed from it.
KNOWN = {
    "Llama-2-7B": (32, [(4096, [4096] * 3), (4096, [4096]), (4096, [11008] * 2), (11008, [4096])]),
    "Llama-3-70B": (80, [(8192, [8192, 1024, 1024]), (8192, [8192]), (8192, [28672] * 2), (28672, [8192])]),
    "ViT-H/14": (32, [(1280, [3840]), (1280, [1280]), (1280, [5120]), (5120, [1280])]),
}


def seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def interleaved(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """The smallest time of each, over repetitions that run all of them."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(seconds(run))
    return {name: min(found) for name, found in times.items()}


def calibrate(options: argparse.Namespace) -> dict[str, Any]:
    """Ratios to the plain forward passes."""
    model = llama(options.blocks) if options.folder is None else loaded(options.folder)
    ids = torch.randint(1000, 30_000, (options.tokens // 512, 512), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": rows} for rows in ids.split(1)]

    @torch.no_grad()
    def forward() -> None:
        for batch in batches:
            model(**batch)

    def run(**settings: Any) -> Callable[[], object]:
        return lambda: lro.calibrate(model, batches, filter_fn=lambda module, fqn: "lm_head" not in fqn, **settings)

    runs: dict[str, Callable[[], object]] = {
        "forward": forward,
        "calibrate": run(),
        "calibrate, side='smaller'": run(side="smaller"),
        "calibrate, float32 sums": run(dtype=torch.float32),
        "calibrate, tokens=0.12": run(tokens=0.12),
        "calibrate, fisher, without token weights": run(sensitivity="fisher", token_weights=False),
        "calibrate, fisher": run(sensitivity="fisher"),
    }
    best = interleaved({name: run for name, run in runs.items() if name in (options.runs or runs)}, options.repeats)
    return {name: {"seconds": round(s, 2), "over_forward": round(s / best["forward"], 3)} for name, s in best.items()}


def loaded(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


def llama(blocks: int) -> nn.Module:
    """The Llama-shaped model, of random values in bfloat16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    width, _, hidden = SHAPES["llama-1.1b"]
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=hidden, num_hidden_layers=blocks,
        num_attention_heads=32, num_key_value_heads=4, max_position_embeddings=2048, dtype=torch.bfloat16,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model = model.to_empty(device="cpu").eval()
    for name, parameter in model.named_parameters():
        nn.init.ones_(parameter) if "norm" in name else nn.init.uniform_(parameter, -0.03, 0.03)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model


class PeakMemory(threading.Thread):
    """The largest number of bytes in use so far, sampled a hundred times a second.

    Pages of mapped files are not counted: the system takes them back when it needs memory.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes = 0
        self.start()

    def run(self) -> None:
        while True:
            status = Path("/proc/self/status").read_text()
            self.bytes = max(self.bytes, int(status.split("RssAnon:")[1].split()[0]) << 10)
            time.sleep(0.01)


def one_memory(options: argparse.Namespace) -> dict[str, Any]:
    """One step of :func:`memory`, in this process."""
    if options.folder is None:
        model, head = llama(BLOCKS), VOCABULARY
    else:
        model = loaded(options.folder)
        head = model.config.vocab_size
    held = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    peak, step = PeakMemory(), options.step
    kept = tuple(f"model.layers.{block}." for block in range(options.blocks))
    batch = [{"input_ids": torch.randint(head, (1, options.tokens), generator=torch.Generator().manual_seed(0))}]
    file = options.store / f"{'fisher' if step in ('fisher', 'loss') else 'plain'}.safetensors"

    def wanted(module: nn.Module, fqn: str) -> bool:
        return fqn.startswith(kept)

    time.sleep(0.1)
    before, start = peak.bytes, time.process_time()
    if step in ("plain", "fisher"):
        sensitivity = "fisher" if step == "fisher" else None
        found = lro.calibrate(
            model, batch, filter_fn=wanted, sensitivity=sensitivity, max_memory=MEMORY, offload="disk"
        )
        most = peak.bytes
        found.save(file)
    else:
        config = lro.CompressionConfig(lro.ParameterBudget(0.5, "uniform"), projection=step)
        lro.compress_(model, lro.Covariances.load(file, packed=True), config, wanted, max_memory=MEMORY)
        most = peak.bytes
    return {
        "step": step, "model_bytes": held, "before": before, "peak": most, "over_model": most - held,
        "seconds": round(time.process_time() - start, 1),
    }  # fmt: skip


def memory(options: argparse.Namespace) -> dict[str, Any]:
    """Peak memory of each step."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for step in options.steps:
            command = [sys.executable, "-m", "benchmarks.bench_scale", "memory", "--step", step, "--store", folder]
            command += ["--blocks", str(options.blocks), "--tokens", str(options.tokens)]
            command += [] if options.folder is None else ["--folder", str(options.folder)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found[step] = json.loads(done.stdout.splitlines()[-1])
            print(found[step], file=sys.stderr, flush=True)
    return found


def growth(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds by width, exponents, and predictions."""
    times: dict[str, dict[tuple[int, int], float]] = {name: {} for name in ("output", "utilized", "loss", "calibrate")}
    one_layer(64, 64)  # not timed: the first calls of a process take longer
    for width in options.widths:
        for shape in ((width, width), (width, 2 * width), (2 * width, width)):
            if max(shape) <= max(options.widths):
                for name, taken in one_layer(*shape).items():
                    times[name][shape] = taken
                    print(name, shape, round(taken, 3), file=sys.stderr, flush=True)
    last, widest = options.widths[-2:]
    exponents = {
        name: round(math.log(found[widest, widest] / found[last, last]) / math.log(widest / last), 2)
        for name, found in times.items()
    }
    by_count = {count: layers_of_512(count) for count in LAYER_COUNTS}
    models = {name: predicted(*shapes, times) for name, shapes in KNOWN.items()}
    return {
        "seconds": {name: {f"{i}->{o}": round(s, 4) for (i, o), s in found.items()} for name, found in times.items()},
        "exponents": exponents,
        "seconds by number of layers": by_count,
        "predicted, not measured": models,
    }


def layers_of_512(count: int) -> dict[str, float]:
    """Seconds of compressing so many Linears (512 to 512), each with statistics of its own."""
    torch.manual_seed(0)
    rows = random_rows(1024, 512)

    def run(projection: str, gradients: Moments | None) -> float:
        model = nn.ModuleDict({str(i): nn.Linear(512, 512, bias=False, dtype=torch.bfloat16) for i in range(count)})
        statistics = lro.Covariances({fqn: LayerStatistics("input", moments_of(rows), gradients) for fqn in model})
        config = lro.CompressionConfig(lro.ParameterBudget(0.5), projection=projection)
        return seconds(lambda: lro.compress_(model, statistics, config))

    return {"output": run("output", None), "loss": run("loss", moments_of(1e-3 * rows))}


def one_layer(inputs: int, outputs: int) -> dict[str, float]:
    """Seconds of compressing one Linear, and of the sums of 1,024 rows of its input."""
    torch.manual_seed(0)
    rows = random_rows(2 * max(inputs, outputs), max(inputs, outputs))
    x = rows[:, :inputs].contiguous()
    gradients = moments_of(1e-3 * rows[:, :outputs])
    plain = LayerStatistics("input", moments_of(x))
    model = nn.ModuleDict({"layer": nn.Linear(inputs, outputs, bias=False, dtype=torch.bfloat16)})
    weight = model["layer"].weight

    def run(projection: str, statistics: LayerStatistics) -> float:
        model["layer"] = nn.Linear(inputs, outputs, bias=False, dtype=torch.bfloat16)
        model["layer"].weight = weight
        config = lro.CompressionConfig(lro.ParameterBudget(0.5), projection=projection)
        return seconds(lambda: lro.compress_(model, lro.Covariances({"layer": statistics}), config))

    state, total = torch.zeros(inputs, inputs, dtype=torch.float64), torch.zeros(inputs, dtype=torch.float64)
    part = x[:1024].float()
    return {
        "output": run("output", plain),
        "utilized": run("utilized", plain),
        "loss": run("loss", LayerStatistics("input", plain.activations, gradients)),
        "calibrate": seconds(lambda: lro.ops.covariance_update_(state, total, part)),
    }


def predicted(
    blocks: int, block: list[tuple[int, list[int]]], times: dict[str, dict[tuple[int, int], float]]
) -> dict[str, Any]:
    """Seconds of one thread by a fit of a m^3 + b m^2 M + c m M^2 (m, M: the smaller and larger side), and bytes."""
    found: dict[str, Any] = {}
    layers = [(inputs, outputs) for inputs, of_input in block for outputs in of_input]
    for name in ("output", "utilized", "loss"):
        rows, values = zip(*((terms(*shape), s) for shape, s in times[name].items()), strict=True)
        weights = torch.tensor(values, dtype=torch.float64).reciprocal().unsqueeze(1)  # errors are relative
        design = torch.tensor(rows, dtype=torch.float64)
        fit = torch.linalg.lstsq(design * weights, torch.ones_like(weights)).solution.squeeze(1)
        each = [float(torch.tensor(terms(*layer), dtype=torch.float64) @ fit) for layer in layers]
        found[f"{name}, hours of one thread"] = round(blocks * sum(each) / 3600, 2)
    widest = max(inputs for inputs, _ in times["calibrate"])
    per_product = times["calibrate"][widest, widest] / (1024 * widest**2)
    sums = blocks * sum(inputs**2 for inputs, _ in block)
    found["sums of 131,072 rows, hours of one thread"] = round(131_072 * sums * per_product / 3600, 2)
    of_loss = blocks * sum(inputs**2 + outputs**2 for inputs, outputs in layers)
    for name, elements in (("sums", sums), ("sums with gradients and token weights", sums + of_loss)):
        found[f"{name}, GB packed"] = round(4 * elements / 1e9, 1)  # half of the float64 matrices
    found["one layer's float64 moments and weight, GB"] = round(
        max(8 * (i * i + o * o + i * o) for i, o in layers) / 1e9, 1
    )
    return found


def precision(options: argparse.Namespace) -> dict[str, Any]:
    """Output error above the optimum at half of the rank, if blocks of rows were multiplied in float32."""
    d, rows, found = 256, 8192, {}
    for name, exponent, outlier, mixed in (
        ("flat spectrum", 0, 1.0, 0.0),
        ("spectrum falling to 1e-4", -4, 1.0, 0.0),
        ("and three channels of 1e4 times the size", -4, 1e4, 0.0),
        ("and these in 97 other channels", -4, 1e4, 0.1),
    ):
        torch.manual_seed(0)
        x = torch.randn(rows, d) * torch.logspace(0, exponent, d) @ torch.linalg.qr(torch.randn(d, d)).Q
        x[:, :3] *= outlier
        x[:, 3:100] += mixed * x[:, :1]
        x -= x[:512].mean(0)
        weight = torch.randn(d, d).double()
        exact = weight @ (x.double().T @ x.double()) @ weight.T
        rounded = weight @ sum(((part.T @ part).double() for part in x.split(512)), torch.zeros(d, d)) @ weight.T
        values = torch.linalg.eigvalsh(exact)
        dropped = torch.linalg.eigh(rounded).eigenvectors[:, : d // 2]
        optimum, error = float(values[: d // 2].sum()), float((dropped * (exact @ dropped)).sum())
        found[name] = {"optimum": optimum / float(values.sum()), "above_the_optimum": error / optimum - 1}
    return found


def optimum(options: argparse.Namespace) -> dict[str, Any]:
    """The largest and the mean excess over the layers of each model, at half of each layer's break-even rank.

    Relative to the optimum where it is above NEGLIGIBLE; for the other layers, relative to the whole variance or loss.
    """
    from lowrank_ops.demo.data import load_images
    from lowrank_ops.demo.vit import load_vit

    found = {}
    if not options.layers:
        images = load_images("calibration")[0]
        found["demo ViT"] = excess(load_vit(), list(images[:400].split(100)), "fisher")
    for name, folder in (("MiniLM", options.encoder), ("SmolLM2-135M", options.folder)):
        if folder is not None:
            from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

            from demo.language_model import texts

            kind = AutoModel if name == "MiniLM" else AutoModelForCausalLM
            model = kind.from_pretrained(folder).eval()
            sequences = texts(AutoTokenizer.from_pretrained(folder), options.tokens)[0]
            batches = [{"input_ids": rows} for rows in sequences[:, :512].split(2)]
            found[name] = excess(model, batches, "pooled" if name == "MiniLM" else "fisher", options.layers)
    return found


def excess(model: nn.Module, batches: list[Any], sensitivity: Any, pattern: str = "") -> dict[str, Any]:
    """The excess over one model's layers whose names match ``pattern``; NumPy sums rows, calibration the gradients."""
    head = {fqn for fqn, module in model.named_modules() if fqn.endswith(("lm_head", "pooler.dense"))}
    layers = {fqn: m for fqn, m in model.named_modules() if isinstance(m, nn.Linear) and fqn not in head}
    layers = {fqn: m for fqn, m in layers.items() if re.search(pattern, fqn)}
    sums: dict[str, tuple[Any, Any, int]] = {}

    def add(fqn: str, x: torch.Tensor) -> None:
        rows = x.detach().reshape(-1, x.shape[-1]).double().numpy()
        moment, total, count = sums.get(fqn, (0, 0, 0))
        sums[fqn] = moment + rows.T @ rows, total + rows.sum(0), count + len(rows)

    handles = [m.register_forward_pre_hook(lambda m, x, fqn=fqn: add(fqn, x[0])) for fqn, m in layers.items()]
    with torch.no_grad():
        for batch in batches:
            model(**batch) if isinstance(batch, dict) else model(batch)
    for handle in handles:
        handle.remove()
    statistics = lro.calibrate(
        model, batches, filter_fn=lambda module, fqn: fqn in layers, sensitivity=sensitivity, token_weights=False
    )
    relative: dict[str, list[float]] = {"output": [], "loss": []}  # to the optimum
    of_all: dict[str, list[float]] = {"output": [], "loss": []}  # to the variance, or its loss
    for fqn, space in layer_subspaces(layers, statistics).items():
        weight = layers[fqn].weight.detach().double().numpy()
        rank = max(1, weight.size // sum(weight.shape) // 2)
        second, total, count = sums.pop(fqn)
        covariance = second / count - np.outer(total / count, total / count)
        if len(weight) > weight.shape[1]:
            squares, directions = np.linalg.eigh(covariance)
            inputs = directions * np.sqrt(squares.clip(0))
        gradients = statistics[fqn].output_gradients
        assert gradients is not None
        metric = gradients.second_moment.numpy() / gradients.count
        metric = metric + DAMPING * np.trace(metric) / len(metric) * np.eye(len(metric))
        for projection, m in (("output", np.eye(len(metric))), ("loss", metric)):
            factors = factorize(space, rank, projection)
            lost = weight - factors.up.numpy() @ factors.down.numpy()
            error = np.sum((m @ lost) * (lost @ covariance))
            scale = np.linalg.cholesky(m).T @ weight
            if len(weight) > weight.shape[1]:  # the same eigenvalues from the smaller matrix
                inner = inputs.T @ (scale.T @ scale) @ inputs
            else:
                inner = scale @ covariance @ scale.T
            eigenvalues = np.linalg.eigvalsh(inner)
            best, whole = eigenvalues[:-rank].sum(), eigenvalues.sum()
            if best > NEGLIGIBLE * whole:
                relative[projection].append(abs(float(error / best - 1)))
            else:  # beyond the numerical rank of the input, error and optimum are rounding errors
                of_all[projection].append(abs(float((error - best) / whole)))
        space.release()
    return {
        name: {
            "layers": len(relative[name]),
            "largest": max(relative[name]),
            "mean": sum(relative[name]) / len(relative[name]),
            "layers without error": len(of_all[name]),
            "their largest, of the whole": max(of_all[name], default=0.0),
        }
        for name in relative
    }


def terms(inputs: int, outputs: int) -> list[float]:
    small, large = sorted((inputs, outputs))
    return [small**3, small**2 * large, small * large**2]


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("part", choices=["calibrate", "memory", "growth", "optimum", "precision"])
    parser.add_argument("--folder", type=Path, help="calibrate, memory, optimum: a language model of transformers")
    parser.add_argument("--encoder", type=Path, help="optimum: a text encoder of transformers")
    parser.add_argument("--layers", default="", help="optimum: a pattern of the names of layers; by default all")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--blocks", type=int, default=2, help="of the Llama-shaped model")
    parser.add_argument("--runs", nargs="+", help="calibrate: what is timed, with 'forward'; by default all")
    parser.add_argument("--widths", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS, help="memory: steps to run, in this order")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--store", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.step is not None:
        print(json.dumps(one_memory(options)))
        return
    facts = environment(torch.device("cpu")) | {"clock": "process_time"}
    parts: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
        "calibrate": calibrate, "memory": memory, "growth": growth, "optimum": optimum, "precision": precision,
    }  # fmt: skip
    found = parts[options.part](options)
    print(json.dumps(found, indent=1))
    settings = {
        name: value
        for name, value in vars(options).items()
        if name not in ("step", "store", "part", "folder", "encoder")
    }
    write(RESULTS / f"scale_{options.part}.json", {"environment": facts, "settings": settings, "results": found})


if __name__ == "__main__":
    main()
